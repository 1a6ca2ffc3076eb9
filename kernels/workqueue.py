"""Decode by a workqueue: the tiles of all rows and KV heads in equal shares, one a program (stream-K).

After Osama et al. 2023 (Stream-K) and PersistentKV (arXiv 2606.26666): a program takes tiles [c T // C, (c + 1) T // C)
of the T tiles of all items (row, KV head), laid end to end, whatever their lengths (C is never more than T). An item
that one program has whole is written by it; the rest leave partial states, item i of program c in slot i + c, which a
merge adds up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.launch import (
    PROGRAMS_PER_SM,
    Scales,
    Tile,
    check,
    check_rows,
    device_limits,
    next_power_of_2,
    padded_queries,
    tile_for,
)
from pkv_hf.kernels.merge import merge_states
from pkv_hf.kernels.pdl import options, release, wait
from pkv_hf.kernels.tile import attend_tiles, load_queries, store_output, store_state, tile_range


@dataclass(frozen=True)
class Plan:
    """Where every program begins; one for all layers of a step that share their bounds."""

    row_tiles: torch.Tensor
    """int32 `[rows + 1]`: tiles of all rows before each, for one KV head; the last entry is the sum."""
    first_items: torch.Tensor
    """int32 `[programs]`: the item that holds a program's first tile."""
    tile: Tile
    window: int

    @property
    def programs(self) -> int:
        return len(self.first_items)


@triton.jit
def _tiles(starts_ptr, ends_ptr, row, rows, q_len, window, TOKENS: tl.constexpr):
    there = row < rows
    start = tl.load(starts_ptr + row, mask=there, other=0)
    end = tl.load(ends_ptr + row, mask=there, other=0)
    _, tiles = tile_range(start, end, q_len, window, TOKENS)
    return tl.where(there, tiles, 0)


@triton.jit(do_not_specialize=["rows", "q_len", "window", "num_kv_heads", "programs"])
def plan_kernel(starts_ptr, ends_ptr, row_tiles_ptr, first_items_ptr, rows, q_len, window, num_kv_heads, programs,
                TOKENS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Every program finds its own first item: it counts the rows whose tiles end at or before its first tile."""
    release(PDL)
    wait(PDL)
    program = tl.program_id(0)
    total = tl.zeros([], tl.int32)
    for block_row in range(0, rows, BLOCK):
        total += tl.sum(_tiles(starts_ptr, ends_ptr, block_row + tl.arange(0, BLOCK), rows, q_len, window, TOKENS), 0)
    programs = tl.maximum(tl.minimum(programs, total * num_kv_heads), 1)
    first = program.to(tl.int64) * total * num_kv_heads // programs
    before = tl.zeros([], tl.int32)
    row = tl.zeros([], tl.int32)
    row_begin = tl.zeros([], tl.int64)
    for block_row in range(0, rows, BLOCK):
        block = block_row + tl.arange(0, BLOCK)
        tiles = _tiles(starts_ptr, ends_ptr, block, rows, q_len, window, TOKENS)
        up_to = before + tl.cumsum(tiles, 0)
        if program == 0:
            tl.store(row_tiles_ptr + block, up_to - tiles, mask=block < rows)
        ends_at = up_to.to(tl.int64) * num_kv_heads
        passed = (block < rows) & (ends_at <= first)
        row += tl.sum(passed.to(tl.int32), 0)
        row_begin = tl.maximum(row_begin, tl.max(tl.where(passed, ends_at, 0), 0))
        before += tl.sum(tiles, 0)
    if program == 0:
        tl.store(row_tiles_ptr + rows, total)
    row = tl.minimum(row, rows - 1)
    start = tl.load(starts_ptr + row)
    end = tl.load(ends_ptr + row)
    _, tiles = tile_range(start, end, q_len, window, TOKENS)
    kv_head = tl.minimum((first - row_begin) // tl.maximum(tiles, 1), num_kv_heads - 1).to(tl.int32)
    tl.store(first_items_ptr + program, row * num_kv_heads + kv_head)


RUNTIME = ["rows", "num_kv_heads", "q_len", "window", "programs", "stride_tb"]
"""Arguments that Triton must not specialise on: lengths and counts change without a new compilation."""


@triton.jit(do_not_specialize=RUNTIME)
def workqueue_kernel(q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, starts_ptr, ends_ptr, row_tiles_ptr,
                     first_items_ptr, out_ptr, ml_ptr, acc_ptr, scale_log2, rows, num_kv_heads, q_len, window, programs,
                     stride_qb, stride_qh, stride_qt, stride_kp, stride_kh, stride_vp, stride_vh, stride_sp,
                     stride_sh, stride_tb, stride_ob, stride_ot, stride_oh,
                     G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
                     PDL: tl.constexpr):  # fmt: skip
    wait(PDL)
    program = tl.program_id(0).to(tl.int64)
    total = tl.load(row_tiles_ptr + rows).to(tl.int64) * num_kv_heads
    programs = tl.maximum(tl.minimum(programs, total), 1)
    if program >= programs:
        return
    tile = program * total // programs
    last = (program + 1) * total // programs
    item = tl.load(first_items_ptr + program)
    while tile < last:
        row = (item // num_kv_heads).to(tl.int64)
        kv_head = (item % num_kv_heads).to(tl.int64)
        before = tl.load(row_tiles_ptr + row)
        tiles = tl.load(row_tiles_ptr + row + 1) - before
        skipped = (tile - (before.to(tl.int64) * num_kv_heads + kv_head * tiles)).to(tl.int32)
        count = tl.minimum(tiles - skipped, (last - tile).to(tl.int32))
        if count > 0:
            start = tl.load(starts_ptr + row)
            end = tl.load(ends_ptr + row)
            first, _ = tile_range(start, end, q_len, window, TOKENS)
            q = load_queries(q_ptr, row, kv_head, q_len, stride_qb, stride_qh, stride_qt, G, D, BLOCK_M, BLOCK_D)
            m_i, l_i, acc = attend_tiles(
                q, k_ptr + kv_head * stride_kh, v_ptr + kv_head * stride_vh, k_scale_ptr + kv_head * stride_sh,
                v_scale_ptr + kv_head * stride_sh, table_ptr + row * stride_tb, start, end,
                q_len, window, first + skipped, count, scale_log2, stride_kp, stride_vp, stride_sp,
                G, D, PAGE, TOKENS, BLOCK_M, BLOCK_D, STAGES,
            )  # fmt: skip
            if count == tiles:
                store_output(
                    out_ptr, row, kv_head, l_i, acc, q_len, stride_ob, stride_ot, stride_oh, G, D, BLOCK_M, BLOCK_D
                )
            else:
                store_state(ml_ptr, acc_ptr, item + program, m_i, l_i, acc, q_len, G, BLOCK_M, BLOCK_D)
        tile += count
        item += 1


@triton.jit(do_not_specialize=["rows", "num_kv_heads", "programs"])
def merge_items_kernel(row_tiles_ptr, ml_ptr, acc_ptr, out_ptr, rows, num_kv_heads, programs,
                       stride_ob, stride_ot, stride_oh, G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
                       BLOCK_D: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Adds up what the programs left of an item; an item that one program wrote whole is left alone."""
    wait(PDL)
    item = tl.program_id(0)
    m_row = tl.program_id(1)
    row = (item // num_kv_heads).to(tl.int64)
    kv_head = item % num_kv_heads
    total = tl.load(row_tiles_ptr + rows).to(tl.int64) * num_kv_heads
    before = tl.load(row_tiles_ptr + row).to(tl.int64)
    tiles = tl.load(row_tiles_ptr + row + 1).to(tl.int64) - before
    begin_tile = before * num_kv_heads + kv_head * tiles
    first = tl.zeros([], tl.int64)
    count = tl.zeros([], tl.int32)
    programs = tl.minimum(programs, total)
    if tiles > 0:  # program of tile t: the largest c with c * total // programs <= t
        first = ((begin_tile + 1) * programs - 1) // total
        count = (((begin_tile + tiles) * programs - 1) // total - first + 1).to(tl.int32)
    if count != 1:
        out = out_ptr + row * stride_ob + (m_row // G) * stride_ot + (kv_head * G + m_row % G) * stride_oh
        merge_states(ml_ptr, acc_ptr, out, m_row, item + first, count, D, BLOCK_M, BLOCK_D, PARTS)


def make_plan(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    *,
    window: int = 0,
    programs: int | None = None,
) -> Plan:
    """The plan of a step, computed on the device from its bounds: no value is read by the host.

    q `[rows, H_q, q_len, head_dim]` and k_pages of any layer with the step's shapes; `programs` defaults to two for
    each multiprocessor.

    Raises ValueError for bounds that are not int32, one a row.
    """
    check_rows({"starts": starts, "ends": ends}, len(q))
    rows, num_kv_heads, q_len = q.shape[0], k_pages.shape[1], q.shape[2]
    tile = tile_for(q, k_pages)
    if programs is None:
        programs = PROGRAMS_PER_SM * device_limits(q.device)[0]
    row_tiles = torch.empty(rows + 1, dtype=torch.int32, device=q.device)
    first_items = torch.empty(programs, dtype=torch.int32, device=q.device)
    plan_kernel[(programs,)](
        starts, ends, row_tiles, first_items, rows, q_len, window, num_kv_heads, programs,
        TOKENS=tile.tokens, BLOCK=64, num_warps=1, **options(q.device),
    )  # fmt: skip
    return Plan(row_tiles, first_items, tile, window)


def decode_workqueue(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    plan: Plan,
    *,
    scale: float,
    scales: Scales | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of q `[rows, H_q, q_len, head_dim]` over pages, as `kernels.reference.paged_attention` defines it.

    `plan` is `make_plan` of the same starts, ends, window and shapes. fp16, bf16 or fp32; `scales` are
    those of quantised pages. Returns `[rows, q_len, H_q, head_dim]`, `out` if it is given.

    Raises ValueError for arguments that the kernel cannot take.
    """
    check(q, k_pages, v_pages, block_table, starts, ends, scales)
    rows, heads, q_len, head_dim = q.shape
    if len(plan.row_tiles) != rows + 1:
        raise ValueError(f"plan is of {len(plan.row_tiles) - 1} rows, q has {rows}: make a plan of these bounds")
    num_kv_heads, page_size = k_pages.shape[1], k_pages.shape[2]
    group, items, tile = heads // num_kv_heads, rows * num_kv_heads, plan.tile
    block_m, block_d = padded_queries(q_len * group), next_power_of_2(head_dim)
    if out is None:
        out = torch.empty((rows, q_len, heads, head_dim), dtype=q.dtype, device=q.device)
    slots = items + plan.programs
    ml = torch.empty((slots, 2, block_m), dtype=torch.float32, device=q.device)
    acc = torch.empty((slots, block_m, block_d), dtype=torch.float32, device=q.device)
    workqueue_kernel[(plan.programs,)](
        q, k_pages, v_pages, *(scales or (out, out)), block_table, starts, ends, plan.row_tiles, plan.first_items,
        out, ml, acc,
        scale * math.log2(math.e), rows, num_kv_heads, q_len, plan.window, plan.programs, *q.stride()[:3],
        *k_pages.stride()[:2], *v_pages.stride()[:2], *(scales[0].stride()[:2] if scales else (0, 0)),
        block_table.stride(0), *out.stride()[:3],
        G=group, D=head_dim, PAGE=page_size, TOKENS=tile.tokens, BLOCK_M=block_m, BLOCK_D=block_d,
        STAGES=tile.num_stages, num_warps=tile.num_warps, **options(q.device),
    )  # fmt: skip
    merge_items_kernel[(items, q_len * group)](
        plan.row_tiles, ml, acc, out, rows, num_kv_heads, plan.programs, *out.stride()[:3],
        G=group, D=head_dim, BLOCK_M=block_m, BLOCK_D=block_d, PARTS=32, num_warps=4, **options(q.device),
    )  # fmt: skip
    return out
