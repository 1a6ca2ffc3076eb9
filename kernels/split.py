"""Decode by sequence splitting: a rectangular grid of (row, KV head, split), then one merge (Flash-Decoding)."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.launch import Scales, check, device_limits, next_power_of_2, padded_queries, splits_for, tile_for
from pkv_hf.kernels.merge import merge_states
from pkv_hf.kernels.pdl import options, release, wait
from pkv_hf.kernels.tile import attend_tiles, load_queries, store_output, store_state, tile_range

RUNTIME = ["num_kv_heads", "q_len", "window", "num_splits", "stride_tb"]
"""Arguments that Triton must not specialise on: lengths and counts change without a new compilation."""


@triton.jit(do_not_specialize=RUNTIME)
def split_kernel(q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, starts_ptr, ends_ptr, out_ptr,
                 ml_ptr, acc_ptr, scale_log2, num_kv_heads, q_len, window, num_splits,
                 stride_qb, stride_qh, stride_qt, stride_kp, stride_kh, stride_vp, stride_vh, stride_sp, stride_sh,
                 stride_tb, stride_ob, stride_ot, stride_oh,
                 G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_D: tl.constexpr, STAGES: tl.constexpr, DIRECT: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    wait(PDL)
    item = tl.program_id(0)
    split = tl.program_id(1)
    row = (item // num_kv_heads).to(tl.int64)
    kv_head = (item % num_kv_heads).to(tl.int64)
    start = tl.load(starts_ptr + row)
    end = tl.load(ends_ptr + row)
    first, tiles = tile_range(start, end, q_len, window, TOKENS)
    skipped = split * tiles // num_splits
    count = (split + 1) * tiles // num_splits - skipped
    slot = item * num_splits + split
    if count == 0 and not DIRECT:
        m = tl.arange(0, BLOCK_M)
        at = ml_ptr + slot.to(tl.int64) * (2 * BLOCK_M) + m
        tl.store(at, tl.full([BLOCK_M], float("-inf"), tl.float32))
        tl.store(at + BLOCK_M, tl.zeros([BLOCK_M], tl.float32))
        d = tl.arange(0, BLOCK_D)
        at = acc_ptr + slot.to(tl.int64) * (BLOCK_M * BLOCK_D) + m[:, None] * BLOCK_D + d[None, :]
        tl.store(at, tl.zeros([BLOCK_M, BLOCK_D], tl.float32))
        return
    q = load_queries(q_ptr, row, kv_head, q_len, stride_qb, stride_qh, stride_qt, G, D, BLOCK_M, BLOCK_D)
    m_i, l_i, acc = attend_tiles(
        q, k_ptr + kv_head * stride_kh, v_ptr + kv_head * stride_vh, k_scale_ptr + kv_head * stride_sh,
        v_scale_ptr + kv_head * stride_sh, table_ptr + row * stride_tb, start, end, q_len, window, first + skipped,
        count, scale_log2, stride_kp, stride_vp, stride_sp, G, D, PAGE, TOKENS, BLOCK_M, BLOCK_D, STAGES,
    )  # fmt: skip
    release(PDL)
    if DIRECT:
        store_output(out_ptr, row, kv_head, l_i, acc, q_len, stride_ob, stride_ot, stride_oh, G, D, BLOCK_M, BLOCK_D)
    else:
        store_state(ml_ptr, acc_ptr, slot, m_i, l_i, acc, q_len, G, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["num_kv_heads", "num_splits"])
def merge_splits_kernel(ml_ptr, acc_ptr, out_ptr, num_kv_heads, num_splits, stride_ob, stride_ot, stride_oh,
                        G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
                        PARTS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    wait(PDL)
    item = tl.program_id(0)
    m_row = tl.program_id(1)
    row = (item // num_kv_heads).to(tl.int64)
    head = (item % num_kv_heads) * G + m_row % G
    out = out_ptr + row * stride_ob + (m_row // G) * stride_ot + head * stride_oh
    merge_states(ml_ptr, acc_ptr, out, m_row, item * num_splits, num_splits, D, BLOCK_M, BLOCK_D, PARTS)


def decode_split(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    *,
    scale: float,
    longest: int,
    window: int = 0,
    num_splits: int | None = None,
    scales: Scales | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of q `[rows, H_q, q_len, head_dim]` over pages, as `kernels.reference.paged_attention` defines it.

    `longest` is an upper bound of the tokens that a row attends to; it only decides the number of splits, which
    `num_splits` sets outright. fp16, bf16 or fp32; `scales` are those of quantised pages. Returns
    `[rows, q_len, H_q, head_dim]`, `out` if it is given.

    Raises ValueError for arguments that the kernel cannot take.
    """
    check(q, k_pages, v_pages, block_table, starts, ends, scales)
    rows, heads, q_len, head_dim = q.shape
    num_kv_heads, page_size = k_pages.shape[1], k_pages.shape[2]
    group, items = heads // num_kv_heads, rows * num_kv_heads
    tile = tile_for(q, k_pages)
    if num_splits is None:
        num_splits = splits_for(items, -(-longest // tile.tokens) + 1, device_limits(q.device)[0])
    if num_splits < 1:
        raise ValueError(f"num_splits={num_splits}: want 1 or more, or None to have it chosen")
    block_m, block_d = padded_queries(q_len * group), next_power_of_2(head_dim)
    if out is None:
        out = torch.empty((rows, q_len, heads, head_dim), dtype=q.dtype, device=q.device)
    direct = num_splits == 1
    ml = acc = out
    if not direct:
        ml = torch.empty((items * num_splits, 2, block_m), dtype=torch.float32, device=q.device)
        acc = torch.empty((items * num_splits, block_m, block_d), dtype=torch.float32, device=q.device)
    split_kernel[(items, num_splits)](
        q, k_pages, v_pages, *(scales or (out, out)), block_table, starts, ends, out, ml, acc,
        scale * math.log2(math.e),
        num_kv_heads, q_len, window, num_splits, *q.stride()[:3], *k_pages.stride()[:2], *v_pages.stride()[:2],
        *(scales[0].stride()[:2] if scales else (0, 0)), block_table.stride(0), *out.stride()[:3],
        G=group, D=head_dim, PAGE=page_size, TOKENS=tile.tokens, BLOCK_M=block_m, BLOCK_D=block_d,
        STAGES=tile.num_stages, DIRECT=direct, num_warps=tile.num_warps, **options(q.device),
    )  # fmt: skip
    if not direct:
        merge_splits_kernel[(items, q_len * group)](
            ml, acc, out, num_kv_heads, num_splits, *out.stride()[:3],
            G=group, D=head_dim, BLOCK_M=block_m, BLOCK_D=block_d, PARTS=32, num_warps=4, **options(q.device),
        )  # fmt: skip
    return out
