"""Partial softmax states that several programs leave of one query head, and their exact merge."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def states_of(state_ptr, slots, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Where m and l, and acc, are in the memory that `Layout.states` makes for `slots` states."""
    return state_ptr + slots.to(tl.int64) * (BLOCK_M * BLOCK_DV), state_ptr


@triton.jit
def store_state(ml_ptr, acc_ptr, slot, m_i, l_i, acc, q_len,
                G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """A partial state to its slot: m and l to [slots, 2, BLOCK_M], acc to [slots, BLOCK_M, BLOCK_DV], fp32."""
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_DV)
    real = m < q_len * G
    slot = slot.to(tl.int64)
    tl.store(ml_ptr + slot * (2 * BLOCK_M) + m, m_i, mask=real)
    tl.store(ml_ptr + slot * (2 * BLOCK_M) + BLOCK_M + m, l_i, mask=real)
    tl.store(acc_ptr + slot * (BLOCK_M * BLOCK_DV) + m[:, None] * BLOCK_DV + d[None, :], acc, mask=real[:, None])


@triton.jit
def merge_states(ml_ptr, acc_ptr, out_ptr, m_row, first_slot, count,
                 DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Row m_row of slots first_slot, ..., first_slot + count - 1, PARTS loaded at once, to the DV elements at out_ptr.

    With m = max m_i: out = sum(2^(m_i - m) acc_i) / sum(2^(m_i - m) l_i), in a fixed order. Empty states weigh 0, and
    where all are empty the output is 0.
    """
    parts = tl.arange(0, PARTS)
    d = tl.arange(0, BLOCK_DV)
    m_all = float("-inf")
    l_all = 0.0
    acc_all = tl.zeros([BLOCK_DV], tl.float32)
    for begin in range(0, count, PARTS):
        there = begin + parts < count
        slots = (first_slot + begin + parts).to(tl.int64)
        m = tl.load(ml_ptr + slots * (2 * BLOCK_M) + m_row, mask=there, other=float("-inf"))
        l = tl.load(ml_ptr + slots * (2 * BLOCK_M) + BLOCK_M + m_row, mask=there, other=0.0)
        at = slots[:, None] * (BLOCK_M * BLOCK_DV) + m_row * BLOCK_DV + d[None, :]
        acc = tl.load(acc_ptr + at, mask=there[:, None], other=0.0)
        m_new = tl.maximum(m_all, tl.max(m, 0))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2(m - m_safe)
        alpha = tl.exp2(m_all - m_safe)
        l_all = l_all * alpha + tl.sum(weight * l, 0)
        acc_all = acc_all * alpha + tl.sum(weight[:, None] * acc, 0)
        m_all = m_new
    out = acc_all / tl.where(l_all == 0.0, 1.0, l_all)
    tl.store(out_ptr + d, out.to(out_ptr.dtype.element_ty), mask=d < DV)
