"""Decode by sequence splitting: a rectangular grid of (row, KV head, split), then one merge (Flash-Decoding)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.attention.attend import attend
from pkv_hf.kernels.attention.layout import layout_of, score_scale, words
from pkv_hf.kernels.attention.merge import merge_states, states_of, store_state
from pkv_hf.kernels.attention.tile import store_output, tile_range
from pkv_hf.kernels.launch import MERGED_AT_ONCE, Scales, device_limits, splits_for
from pkv_hf.kernels.launcher import Launcher
from pkv_hf.kernels.pdl import options, overlaps, release, wait

RUNTIME = ["scale", "num_kv_heads", "q_len", "window", "num_splits", "stride_tb"]
"""Arguments that Triton must not specialise on: lengths and counts change without a new compilation."""


@triton.jit(do_not_specialize=RUNTIME)
def split_kernel(q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, sinks_ptr, table_ptr, starts_ptr, ends_ptr, out_ptr,
                 state_ptr, scale, num_kv_heads, q_len, window, num_splits, stride_tb,
                 stride_qb, stride_qh, stride_qt, stride_kp, stride_kh, stride_vp, stride_vh, stride_sp, stride_sh,
                 stride_ob, stride_ot, stride_oh,
                 G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, STAGES: tl.constexpr,
                 EIGHT_BIT: tl.constexpr, NATIVE: tl.constexpr, CAP: tl.constexpr, CHUNKED: tl.constexpr,
                 DIRECT: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    wait(PDL)
    item = tl.program_id(0)
    split = tl.program_id(1)
    row = (item // num_kv_heads).to(tl.int64)
    kv_head = (item % num_kv_heads).to(tl.int64)
    start = tl.load(starts_ptr + row)
    end = tl.load(ends_ptr + row)
    first, tiles = tile_range(start, end, q_len, window, TOKENS, CHUNKED)
    skipped = split * tiles // num_splits
    count = (split + 1) * tiles // num_splits - skipped
    slot = item * num_splits + split
    ml_ptr, acc_ptr = states_of(state_ptr, tl.num_programs(0) * num_splits, BLOCK_M, BLOCK_DV)
    if count == 0 and not DIRECT:
        m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        store_state(ml_ptr, acc_ptr, slot, m_i, l_i, tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), q_len,
                    G, BLOCK_M, BLOCK_DV)  # fmt: skip
        return
    m_i, l_i, acc = attend(
        q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, sinks_ptr, table_ptr, row, kv_head, start, end, q_len, window,
        first + skipped, count, skipped + count == tiles, scale, stride_qb, stride_qh, stride_qt, stride_kp, stride_kh,
        stride_vp, stride_vh, stride_sp, stride_sh, stride_tb, G, D, DV, PAGE, TOKENS, BLOCK_M, BLOCK_D, BLOCK_DV,
        STAGES, EIGHT_BIT, NATIVE, CAP, CHUNKED,
    )  # fmt: skip
    release(PDL)
    if DIRECT:
        store_output(out_ptr, row, kv_head, l_i, acc, q_len, stride_ob, stride_ot, stride_oh, G, DV, BLOCK_M, BLOCK_DV)
    else:
        store_state(ml_ptr, acc_ptr, slot, m_i, l_i, acc, q_len, G, BLOCK_M, BLOCK_DV)


@triton.jit(do_not_specialize=["num_kv_heads", "num_splits"])
def merge_splits_kernel(state_ptr, out_ptr, num_kv_heads, num_splits, stride_ob, stride_ot, stride_oh,
                        G: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
                        PARTS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    wait(PDL)
    item = tl.program_id(0)
    m_row = tl.program_id(1)
    row = (item // num_kv_heads).to(tl.int64)
    head = (item % num_kv_heads) * G + m_row % G
    out = out_ptr + row * stride_ob + (m_row // G) * stride_ot + head * stride_oh
    ml_ptr, acc_ptr = states_of(state_ptr, tl.num_programs(0) * num_splits, BLOCK_M, BLOCK_DV)
    merge_states(ml_ptr, acc_ptr, out, m_row, item * num_splits, num_splits, DV, BLOCK_M, BLOCK_DV, PARTS)


_split, _merge = Launcher(split_kernel, fp_fusion=True), Launcher(merge_splits_kernel, fp_fusion=True)


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
    chunked: bool = False,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    num_splits: int | None = None,
    scales: Scales | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of q `[rows, H_q, q_len, head_dim]` over pages, as `kernels.reference.paged_attention` defines it.

    `longest` is an upper bound of the tokens that a row attends to; it only decides the number of splits, which
    `num_splits` sets outright. fp16, bf16 or fp32; `scales` are those of quantised pages. Returns
    `[rows, q_len, H_q, value_dim]`, `out` if it is given.

    Raises ValueError for arguments that the kernel cannot take.
    """
    layout = layout_of(q, k_pages, v_pages, block_table, starts, ends, scales, sinks, softcap, window, chunked)
    items, tile = layout.items, layout.tile
    if num_splits is None:
        num_splits = splits_for(items, -(-longest // tile.tokens), device_limits(q.device)[0])
    if num_splits < 1:
        raise ValueError(f"num_splits={num_splits}: want 1 or more, or None to have it chosen")
    out = layout.output(q, out)
    direct, overlap = num_splits == 1, overlaps(q.device)
    states = out if direct else layout.states(items * num_splits, q.device)
    of_scales = (out, out) if scales is None else scales
    _split(
        (layout.kind, direct), (items, num_splits, 1),
        (q, words(k_pages), words(v_pages), *of_scales, sinks, block_table, starts, ends, out, states),
        (score_scale(scale, softcap), layout.num_kv_heads, layout.q_len, window, num_splits, block_table.stride(0),
         *layout.strides, *out.stride()[:3]),
        (*layout.constants, direct, overlap), num_warps=tile.num_warps, **options(q.device),
    )  # fmt: skip
    if not direct:
        _merge(
            layout.kind, (items, layout.q_len * layout.group, 1), (states, out),
            (layout.num_kv_heads, num_splits, *out.stride()[:3]), (*layout.merge_constants, MERGED_AT_ONCE, overlap),
            num_warps=layout.merge_warps, **options(q.device),
        )  # fmt: skip
    return out
