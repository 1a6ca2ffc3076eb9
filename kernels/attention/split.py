"""Decode by sequence splitting: a rectangular grid of (row, KV head, split), then one merge (Flash-Decoding)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.attention.attend import attend
from pkv_hf.kernels.attention.layout import layout_of, score_scale, words
from pkv_hf.kernels.attention.merge import merge_states, states_of, store_state
from pkv_hf.kernels.attention.new_token import (
    NOTHING_NEW,
    NewToken,
    launched,
    load_norms,
    load_token,
    write_token,
)
from pkv_hf.kernels.attention.tile import PART, first_pages, load_queries, store_output, tile_range
from pkv_hf.kernels.launch import MERGED_AT_ONCE, Scales, device_limits, splits_for
from pkv_hf.kernels.launcher import Launcher
from pkv_hf.kernels.pdl import options, overlaps, release, wait
from pkv_hf.kernels.rope import turned

RUNTIME = ["scale", "num_kv_heads", "q_len", "window", "num_splits", "stride_tb", "eps"]
"""Arguments that Triton must not specialise on: lengths and counts change without a new compilation."""


@triton.jit(do_not_specialize=RUNTIME)
def split_kernel(q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, sinks_ptr, table_ptr, starts_ptr, ends_ptr, out_ptr,
                 state_ptr, new_k_ptr, new_v_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, first_ptr,
                 scale, num_kv_heads, q_len, window, num_splits, stride_tb,
                 stride_qb, stride_qh, stride_qt, stride_kp, stride_kh, stride_vp, stride_vh, stride_sp, stride_sh,
                 stride_ob, stride_ot, stride_oh, stride_nkb, stride_nkh, stride_nvb, stride_nvh, stride_cb, eps,
                 G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, STAGES: tl.constexpr,
                 EIGHT_BIT: tl.constexpr, NATIVE: tl.constexpr, CAP: tl.constexpr, CHUNKED: tl.constexpr,
                 ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRED: tl.constexpr, NORM: tl.constexpr,
                 OFFSET: tl.constexpr, WHOLE: tl.constexpr, LARGEST: tl.constexpr,
                 DIRECT: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program a row, KV head and split. With a new token, new_k_ptr and what follows it, q is as projected.

    Every position is in one split: only the last one, which has tiles if the row has any, reads the new token, so that
    this one writes it, before all that it reads.
    """
    item = tl.program_id(0)
    split = tl.program_id(1)
    row = (item // num_kv_heads).to(tl.int64)
    kv_head = (item % num_kv_heads).to(tl.int64)
    last = split == num_splits - 1
    if new_k_ptr is not None:
        WIDTH: tl.constexpr = PART if q_ptr.dtype.element_ty == tl.float32 and BLOCK_D > 128 else BLOCK_D
        q_norm, k_norm = load_norms(q_norm_ptr, k_norm_ptr, kv_head, last, G, D, BLOCK_M, BLOCK_D, WIDTH, ROTARY,
                                    INTERLEAVED, NORM, WHOLE)  # fmt: skip
    start = tl.load(starts_ptr + row)  # as the block table, written before the step
    end = tl.load(ends_ptr + row)
    first, tiles = tile_range(start, end, q_len, window, TOKENS, CHUNKED)
    skipped = split * tiles // num_splits
    count = (split + 1) * tiles // num_splits - skipped
    table_ptr += row * stride_tb
    next_page = first_pages(table_ptr, start, end, q_len, window, first + skipped, PAGE, TOKENS, CHUNKED)
    if new_k_ptr is not None:
        first_held = tl.load(first_ptr + row)
    wait(PDL)
    if new_k_ptr is not None:
        q_ptr += row * stride_qb
        new_k_ptr += row * stride_nkb
        loaded_q, loaded_k, v = load_token(
            q_ptr, new_k_ptr, new_v_ptr + row * stride_nvb, cos_ptr + row * stride_cb, sin_ptr + row * stride_cb,
            kv_head, last, stride_qh, stride_nkh, stride_nvh, G, D, BLOCK_M, BLOCK_D, WIDTH, ROTARY, INTERLEAVED,
            PAIRED,
        )  # fmt: skip
    slot = item * num_splits + split
    ml_ptr, acc_ptr = states_of(state_ptr, tl.num_programs(0) * num_splits, BLOCK_M, BLOCK_DV)
    if count == 0 and not DIRECT:
        m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        store_state(ml_ptr, acc_ptr, slot, m_i, l_i, tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), q_len,
                    G, BLOCK_M, BLOCK_DV)  # fmt: skip
        return
    if new_k_ptr is not None:
        q = turned(loaded_q, q_norm, q_ptr, num_kv_heads * G, stride_qh, eps, D, ROTARY, INTERLEAVED, NORM, OFFSET,
                   WHOLE, NATIVE)  # fmt: skip
        if last:
            write_token(
                loaded_k, k_norm, v, new_k_ptr, num_kv_heads, stride_nkh, eps, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr,
                table_ptr, end - 1, first_held, kv_head, stride_kp, stride_kh, stride_vp, stride_vh,
                stride_sp, stride_sh, D, PAGE, BLOCK_D, ROTARY, INTERLEAVED, NORM, OFFSET, WHOLE, EIGHT_BIT, LARGEST,
                NATIVE,
            )  # fmt: skip
    else:
        q = load_queries(q_ptr, row, kv_head, q_len, stride_qb, stride_qh, stride_qt, G, D, BLOCK_M, BLOCK_D)
    m_i, l_i, acc = attend(
        q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, sinks_ptr, table_ptr, next_page, kv_head, start, end, q_len,
        window, first + skipped, count, skipped + count == tiles, scale, stride_kp, stride_kh, stride_vp, stride_vh,
        stride_sp, stride_sh, G, D, DV, PAGE, TOKENS, BLOCK_M, BLOCK_DV, STAGES, EIGHT_BIT, NATIVE, CAP, CHUNKED,
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
    release(PDL)
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
    new: NewToken | None = None,
) -> torch.Tensor:
    """Attention of q `[rows, H_q, q_len, head_dim]` over pages, as `kernels.reference.paged_attention` defines it.

    `longest` is an upper bound of the tokens that a row attends to; it only decides the number of splits, which
    `num_splits` sets outright. fp16, bf16 or fp32; `scales` are those of quantised pages. Returns
    `[rows, q_len, H_q, value_dim]`, `out` if it is given.

    With `new`, q is that of one new token a row, as it was projected. In the same launch q and the token's k and v
    become what `append.rope_append` makes of them, k and v in the pages at `ends` - 1.

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
    token = NOTHING_NEW if new is None else launched(new, q, k_pages, v_pages, block_table, ends, scales)
    states = out if direct else layout.states(items * num_splits, q.device)
    of_scales = (out, out) if scales is None else scales
    _split(
        (layout.kind, direct, token.kind), (items, num_splits, 1),
        (q, words(k_pages), words(v_pages), *of_scales, sinks, block_table, starts, ends, out, states,
         *token.tensors),
        (score_scale(scale, softcap), layout.num_kv_heads, layout.q_len, window, num_splits, block_table.stride(0),
         *layout.strides, *out.stride()[:3], *token.numbers),
        (*layout.constants, *token.constants, direct, overlap), num_warps=tile.num_warps, **options(q.device),
    )  # fmt: skip
    if not direct:
        _merge(
            layout.kind, (items, layout.q_len * layout.group, 1), (states, out),
            (layout.num_kv_heads, num_splits, *out.stride()[:3]), (*layout.merge_constants, MERGED_AT_ONCE, overlap),
            num_warps=layout.merge_warps, **options(q.device),
        )  # fmt: skip
    return out
