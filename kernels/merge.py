"""Exact merge of the partial softmax states that several programs left of one query head."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merge_states(ml_ptr, acc_ptr, out_ptr, m_row, first_slot, count,
                 D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Row m_row of slots first_slot, ..., first_slot + count - 1, PARTS loaded at once, to the D elements at out_ptr.

    With m = max m_i: out = sum(2^(m_i - m) acc_i) / sum(2^(m_i - m) l_i), in a fixed order. Empty states weigh 0, and
    where all are empty the output is 0.
    """
    parts = tl.arange(0, PARTS)
    d = tl.arange(0, BLOCK_D)
    m_all = float("-inf")
    l_all = 0.0
    acc_all = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(0, count, PARTS):
        there = begin + parts < count
        slots = (first_slot + begin + parts).to(tl.int64)
        m = tl.load(ml_ptr + slots * (2 * BLOCK_M) + m_row, mask=there, other=float("-inf"))
        l = tl.load(ml_ptr + slots * (2 * BLOCK_M) + BLOCK_M + m_row, mask=there, other=0.0)
        at = slots[:, None] * (BLOCK_M * BLOCK_D) + m_row * BLOCK_D + d[None, :]
        acc = tl.load(acc_ptr + at, mask=there[:, None], other=0.0)
        m_new = tl.maximum(m_all, tl.max(m, 0))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2(m - m_safe)
        alpha = tl.exp2(m_all - m_safe)
        l_all = l_all * alpha + tl.sum(weight * l, 0)
        acc_all = acc_all * alpha + tl.sum(weight[:, None] * acc, 0)
        m_all = m_new
    out = acc_all / tl.where(l_all == 0.0, 1.0, l_all)
    tl.store(out_ptr + d, out.to(out_ptr.dtype.element_ty), mask=d < D)
