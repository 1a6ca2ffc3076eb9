"""Decode by a workqueue: the tiles of all rows and KV heads in equal shares, one a program (stream-K).

After Osama et al. 2023 (Stream-K) and PersistentKV (arXiv 2606.26666): a program takes tiles [c T // C, (c + 1) T // C)
of the T tiles of all items (row, KV head), laid end to end, whatever their lengths (C is never more than T). Each finds
where that is from the rows' bounds by itself: no plan is made, by the host or by a launch before. An item that one
program has whole is written by it; the rest leave partial states, item i of program c in slot i + c, which a merge adds
up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.attention.attend import attend
from pkv_hf.kernels.attention.layout import layout_of, score_scale, words
from pkv_hf.kernels.attention.merge import merge_states, states_of, store_state
from pkv_hf.kernels.attention.tile import first_pages, load_queries, store_output, tile_range
from pkv_hf.kernels.launch import MERGED_AT_ONCE, PROGRAMS_PER_SM, Scales, device_limits, next_power_of_2
from pkv_hf.kernels.launcher import Launcher
from pkv_hf.kernels.pdl import options, overlaps, release, wait

MOST_ROWS_AT_ONCE = 64
"""Rows whose bounds a program looks at in one go."""


@triton.jit
def _row_tiles(starts_ptr, ends_ptr, row, rows, q_len, window, TOKENS: tl.constexpr, CHUNKED: tl.constexpr):
    """Tiles of a row, or of a block of rows; none beyond the last row."""
    there = row < rows
    start = tl.load(starts_ptr + row, mask=there, other=0)
    end = tl.load(ends_ptr + row, mask=there, other=0)
    _, tiles = tile_range(start, end, q_len, window, TOKENS, CHUNKED)
    return tl.where(there, tiles, 0)


@triton.jit
def _all_tiles(starts_ptr, ends_ptr, rows, num_kv_heads, q_len, window,
               TOKENS: tl.constexpr, CHUNKED: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Tiles of all items of the first `rows` rows."""
    total = tl.zeros([], tl.int32)
    for begin in range(0, rows, ROWS):
        block = begin + tl.arange(0, ROWS)
        total += tl.sum(_row_tiles(starts_ptr, ends_ptr, block, rows, q_len, window, TOKENS, CHUNKED), 0)
    return total.to(tl.int64) * num_kv_heads


@triton.jit
def _find_row(tile, starts_ptr, ends_ptr, rows, num_kv_heads, q_len, window,
              TOKENS: tl.constexpr, CHUNKED: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """The row that holds a tile, and the first tile of that row: before it are all rows that end at or before the tile.

    ROWS rows are looked at in one go. Ends ascend, so that the largest of the rows before is where the row begins.
    """
    head_tiles = tl.zeros([], tl.int32)  # of one KV head, in the rows of earlier blocks
    row = tl.zeros([], tl.int32)
    row_begin = tl.zeros([], tl.int64)
    for begin in range(0, rows, ROWS):
        block = begin + tl.arange(0, ROWS)
        tiles = _row_tiles(starts_ptr, ends_ptr, block, rows, q_len, window, TOKENS, CHUNKED)
        row_ends = (head_tiles + tl.cumsum(tiles, 0)).to(tl.int64) * num_kv_heads
        before = (block < rows) & (row_ends <= tile)
        row += tl.sum(before.to(tl.int32), 0)
        row_begin = tl.maximum(row_begin, tl.max(tl.where(before, row_ends, 0), 0))
        head_tiles += tl.sum(tiles, 0)
    return row, row_begin


@triton.jit
def _find_item(tile, starts_ptr, ends_ptr, rows, num_kv_heads, q_len, window,
               TOKENS: tl.constexpr, CHUNKED: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """The item that holds a tile, and how many tiles of the item come before the tile."""
    row, row_begin = _find_row(tile, starts_ptr, ends_ptr, rows, num_kv_heads, q_len, window, TOKENS, CHUNKED, ROWS)
    row = tl.minimum(row, rows - 1)  # where no row has a tile, the last row stands in
    tiles = _row_tiles(starts_ptr, ends_ptr, row, rows, q_len, window, TOKENS, CHUNKED)
    tile_in_row = tile - row_begin
    kv_head = tl.minimum(tile_in_row // tl.maximum(tiles, 1), num_kv_heads - 1).to(tl.int32)
    return row * num_kv_heads + kv_head, tile_in_row.to(tl.int32) - kv_head * tiles


@triton.jit
def _share_begin(program, total, programs):
    """The first tile of a program's share; of program `programs`, the end of all tiles."""
    return program * total // programs


@triton.jit
def _program_of(tile, total, programs):
    """The program whose share holds a tile: the last whose `_share_begin` is not beyond it."""
    return ((tile + 1) * programs - 1) // total


RUNTIME = ["scale", "rows", "num_kv_heads", "q_len", "window", "stride_tb"]
"""Arguments that Triton must not specialise on: lengths and counts change without a new compilation."""


@triton.jit(do_not_specialize=RUNTIME)
def workqueue_kernel(q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, sinks_ptr, table_ptr, starts_ptr, ends_ptr, out_ptr,
                     state_ptr, scale, rows, num_kv_heads, q_len, window, stride_tb,
                     stride_qb, stride_qh, stride_qt, stride_kp, stride_kh, stride_vp, stride_vh, stride_sp,
                     stride_sh, stride_ob, stride_ot, stride_oh,
                     G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, STAGES: tl.constexpr,
                     EIGHT_BIT: tl.constexpr, NATIVE: tl.constexpr, CAP: tl.constexpr, CHUNKED: tl.constexpr,
                     ROWS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A program's share of the tiles: whole items to out [rows, q_len, H_q, DV], parts of items to their slots."""
    wait(PDL)
    program = tl.program_id(0).to(tl.int64)
    ml_ptr, acc_ptr = states_of(state_ptr, rows * num_kv_heads + tl.num_programs(0), BLOCK_M, BLOCK_DV)
    total = _all_tiles(starts_ptr, ends_ptr, rows, num_kv_heads, q_len, window, TOKENS, CHUNKED, ROWS)
    programs = tl.maximum(tl.minimum(tl.num_programs(0), total), 1)
    if program >= programs:
        return
    tile = _share_begin(program, total, programs)
    left = (_share_begin(program + 1, total, programs) - tile).to(tl.int32)
    item, skipped = _find_item(tile, starts_ptr, ends_ptr, rows, num_kv_heads, q_len, window, TOKENS, CHUNKED, ROWS)
    while left > 0:
        row = (item // num_kv_heads).to(tl.int64)
        kv_head = (item % num_kv_heads).to(tl.int64)
        start = tl.load(starts_ptr + row)
        end = tl.load(ends_ptr + row)
        first, tiles = tile_range(start, end, q_len, window, TOKENS, CHUNKED)
        count = tl.minimum(tiles - skipped, left)
        if count > 0:  # an item whose row has nothing to attend to has no tiles
            row_table_ptr = table_ptr + row * stride_tb
            next_page = first_pages(row_table_ptr, start, end, q_len, window, first + skipped, PAGE, TOKENS, CHUNKED)
            q = load_queries(q_ptr, row, kv_head, q_len, stride_qb, stride_qh, stride_qt, G, D, BLOCK_M, BLOCK_D)
            m_i, l_i, acc = attend(
                q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, sinks_ptr, row_table_ptr, next_page, kv_head, start, end,
                q_len, window, first + skipped, count, skipped + count == tiles, scale, stride_kp, stride_kh, stride_vp,
                stride_vh, stride_sp, stride_sh, G, D, DV, PAGE, TOKENS, BLOCK_M, BLOCK_DV, STAGES,
                EIGHT_BIT, NATIVE, CAP, CHUNKED,
            )  # fmt: skip
            if count == tiles:
                store_output(
                    out_ptr, row, kv_head, l_i, acc, q_len, stride_ob, stride_ot, stride_oh, G, DV, BLOCK_M, BLOCK_DV
                )
            else:
                store_state(ml_ptr, acc_ptr, item + program, m_i, l_i, acc, q_len, G, BLOCK_M, BLOCK_DV)
        left -= count
        skipped = tl.zeros([], tl.int32)
        item += 1


@triton.jit(do_not_specialize=["rows", "num_kv_heads", "q_len", "window", "programs"])
def merge_items_kernel(starts_ptr, ends_ptr, state_ptr, out_ptr, rows, num_kv_heads, q_len, window, programs,
                       stride_ob, stride_ot, stride_oh, G: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
                       BLOCK_DV: tl.constexpr, TOKENS: tl.constexpr, CHUNKED: tl.constexpr, PARTS: tl.constexpr,
                       ROWS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Adds up what the programs left of an item, to 0 where it has no tiles; leaves alone what one wrote whole."""
    wait(PDL)
    release(PDL)
    item = tl.program_id(0)
    m_row = tl.program_id(1)
    row = item // num_kv_heads
    kv_head = item % num_kv_heads
    ml_ptr, acc_ptr = states_of(state_ptr, rows * num_kv_heads + programs, BLOCK_M, BLOCK_DV)
    total = _all_tiles(starts_ptr, ends_ptr, rows, num_kv_heads, q_len, window, TOKENS, CHUNKED, ROWS)
    row_begin = _all_tiles(starts_ptr, ends_ptr, row, num_kv_heads, q_len, window, TOKENS, CHUNKED, ROWS)
    tiles = _row_tiles(starts_ptr, ends_ptr, row, rows, q_len, window, TOKENS, CHUNKED)
    begin = row_begin + kv_head * tiles
    first = tl.zeros([], tl.int64)
    count = tl.zeros([], tl.int32)
    programs = tl.minimum(programs, total)
    if tiles > 0:
        first = _program_of(begin, total, programs)
        count = (_program_of(begin + tiles - 1, total, programs) - first + 1).to(tl.int32)
    if count != 1:
        out = out_ptr + row.to(tl.int64) * stride_ob + (m_row // G) * stride_ot + (kv_head * G + m_row % G) * stride_oh
        merge_states(ml_ptr, acc_ptr, out, m_row, item + first, count, DV, BLOCK_M, BLOCK_DV, PARTS)


_workqueue, _merge = Launcher(workqueue_kernel, fp_fusion=True), Launcher(merge_items_kernel, fp_fusion=True)


def decode_workqueue(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    chunked: bool = False,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    programs: int | None = None,
    scales: Scales | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of q `[rows, H_q, q_len, head_dim]` over pages, as `kernels.reference.paged_attention` defines it.

    `programs` defaults to two for each multiprocessor. fp16, bf16 or fp32; `scales` are those of quantised pages.
    Returns `[rows, q_len, H_q, value_dim]`, `out` if it is given.

    Raises ValueError for arguments that the kernel cannot take.
    """
    layout = layout_of(q, k_pages, v_pages, block_table, starts, ends, scales, sinks, softcap, window, chunked)
    if programs is None:
        programs = PROGRAMS_PER_SM * device_limits(q.device)[0]
    if programs < 1:
        raise ValueError(f"programs={programs}: want 1 or more, or None to have it chosen")
    out, overlap = layout.output(q, out), overlaps(q.device)
    states = layout.states(layout.items + programs, q.device)
    rows_at_once = min(max(next_power_of_2(layout.rows), 2), MOST_ROWS_AT_ONCE)
    kind = layout.kind, rows_at_once
    counts = layout.rows, layout.num_kv_heads, layout.q_len, window
    of_scales = (out, out) if scales is None else scales
    _workqueue(
        kind, (programs, 1, 1),
        (q, words(k_pages), words(v_pages), *of_scales, sinks, block_table, starts, ends, out, states),
        (score_scale(scale, softcap), *counts, block_table.stride(0), *layout.strides, *out.stride()[:3]),
        (*layout.constants, rows_at_once, overlap), num_warps=layout.tile.num_warps, **options(q.device),
    )  # fmt: skip
    _merge(
        kind, (layout.items, layout.q_len * layout.group, 1), (starts, ends, states, out),
        (*counts, programs, *out.stride()[:3]),
        (*layout.merge_constants, layout.tile.tokens, chunked, MERGED_AT_ONCE, rows_at_once, overlap),
        num_warps=layout.merge_warps, **options(q.device),
    )  # fmt: skip
    return out
