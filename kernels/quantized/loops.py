"""Products of rows of x with weights of 4 bits, in float32: the loops of the kernels in `linear4`.

Weights are read as elements of 16 bits, of four inputs each. An element becomes four values in four tensors, so that
none is moved between threads: four products of tensor cores, each with every fourth input, add up to one.

Scales differ from group to group of 32 to 128 inputs. Either they multiply the products of a group in float32: a group
then has columns of its own in the product, where the inputs of other groups are 0. Few rows leave columns idle, so that
these cost nothing. Or they multiply the weights, in the half type, and a product goes over all groups.

Where values have zero points, what these add to a group's product is a number times the sum of its inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pkv_hf.kernels.pdl import release, wait
from pkv_hf.kernels.quantized import codes
from pkv_hf.kernels.quantized.layouts import (
    elements_at,
    elements_of_row,
    groups_of,
    inputs_by_place,
    moved_by,
    scales_at,
    spread,
    spread_to_elements,
    squares_of,
    summed_by_group,
)

OF_ELEMENTS = tl.constexpr(codes.ELEMENTS_CONSTRAINTS)


@triton.jit
def decoded(packed, PLACE: tl.constexpr, TYPE: tl.constexpr, ASM: tl.constexpr, values_ptr, LAYOUT: tl.constexpr):
    """The values of elements' weights at a place of 0 to 3, in a half type: by PTX, or from memory."""
    if ASM is not None:
        found = tl.inline_asm_elementwise(ASM[PLACE], OF_ELEMENTS, [packed], tl.uint16, True, 4).to(TYPE, bitcast=True)
    else:
        index = (packed >> (4 * (PLACE ^ 1 if LAYOUT == "bytes" else PLACE))) & 15
        found = tl.load(values_ptr + index.to(tl.int32))
    return found


@triton.jit
def _in_columns(x, of_group, G: tl.constexpr):
    """x [inputs, rows] as [inputs, G * rows]: a group of inputs in its own columns, 0 elsewhere."""
    if G > 1:
        x = tl.where(of_group[:, :, None], x[:, None, :], 0.0).to(x.dtype)
        x = tl.reshape(x, (x.shape[0], G * x.shape[2]))
    return x


@triton.jit
def _multiplied(y, packed, x, scale, shift, of_group, TYPE: tl.constexpr, ASM: tl.constexpr, values_ptr,
                SCALE_WEIGHTS: tl.constexpr, SHIFTED: tl.constexpr, LAYOUT: tl.constexpr, GROUP: tl.constexpr,
                G: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """y plus the product of a block; scale and shift [outputs, groups]."""
    if SCALE_WEIGHTS:
        factor = spread_to_elements(scale, LAYOUT, GROUP)
        for i in tl.static_range(4):
            values = decoded(packed, i, TYPE, ASM, values_ptr, LAYOUT)
            if SHIFTED:  # rounded once: a value and a zero point may cancel
                values = values.to(tl.float32) * factor + spread_to_elements(shift, LAYOUT, GROUP)
                y = tl.dot(values.to(TYPE), x[i], y)
            else:
                y = tl.dot(values * factor.to(TYPE), x[i], y)
    else:
        product = tl.zeros_like(y)
        for i in tl.static_range(4):
            values = decoded(packed, i, TYPE, ASM, values_ptr, LAYOUT)
            product = tl.dot(values, _in_columns(x[i], of_group, G), product)
        y += product * spread(scale, ROWS)
        if SHIFTED:
            y += spread(shift, ROWS) * tl.reshape(tl.trans(_sums(x, LAYOUT, GROUP)), (1, G * ROWS))
    return y


@triton.jit
def _sums(x, LAYOUT: tl.constexpr, GROUP: tl.constexpr):
    """The sums of each group's inputs, four of [elements, rows], in float32: [rows, groups]."""
    total = x[0].to(tl.float32) + x[1].to(tl.float32) + x[2].to(tl.float32) + x[3].to(tl.float32)
    return summed_by_group(tl.trans(total), LAYOUT, GROUP)


@triton.jit
def by_dot(x_ptr, w_ptr, absmax_ptr, code_ptr, absmax2_ptr, offset_ptr,
           w2_ptr, absmax_2_ptr, code_2_ptr, absmax2_2_ptr, offset_2_ptr, norm_ptr,
           rows, first, outputs, inputs, begin, end, eps, TYPE: tl.constexpr, NORM: tl.constexpr,
           OFFSET: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr, values_ptr,
           LAYOUT: tl.constexpr, SCALES: tl.constexpr, QBLOCK: tl.constexpr, GROUP: tl.constexpr,
           SCALE_WEIGHTS: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
           BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """x W^T, and x W2^T where GATED, by tensor cores; returns both of BLOCK_M rows, then both of the TAIL after them.

    x_ptr is of words of two inputs. The norm is an RMSNorm of each row, whose factor multiplies the sums at the end.
    """
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    G: tl.constexpr = 1 if SCALE_WEIGHTS else GROUPS
    SHIFTED: tl.constexpr = not (SCALES == "blocks" or SCALES == "nested" or SCALES == "groups")
    m = tl.arange(0, BLOCK_M)
    n = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K // 4)
    in_row = elements_of_row(inputs, LAYOUT, GROUP)
    g = tl.arange(0, GROUPS)
    of_group = groups_of(k, LAYOUT, GROUP)[:, None] == g[None, :]
    w_at = elements_at(n, k, outputs, inputs, LAYOUT, GROUP)
    w_mask = (n < outputs)[:, None]
    x_at = m[:, None] * (inputs // 2)
    x_mask = (m < rows)[:, None]
    offset = 0.0
    offset2 = 0.0
    if SCALES == "nested":
        offset = tl.load(offset_ptr)
        if GATED:
            offset2 = tl.load(offset_2_ptr)
    y = tl.zeros([BLOCK_N, G * BLOCK_M], tl.float32)
    y2 = y
    tail = y
    squares = squares_of(BLOCK_M, LAYOUT, BLOCK_K)
    if TAIL > 0:
        m_tail = BLOCK_M + tl.arange(0, TAIL)
        tail_at = m_tail[:, None] * (inputs // 2)
        tail_mask = (m_tail < rows)[:, None]
        tail = tl.zeros([BLOCK_N, G * TAIL], tl.float32)
    tail2 = tail
    wait(PDL)
    for at in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        known = w_mask & (g + at // GROUP < inputs // GROUP)[None, :]
        block = (g + at // GROUP) // (QBLOCK // GROUP)
        w_there = w_mask if EVEN else w_mask & (k + at // 4 < in_row)[None, :]
        packed = tl.load(w_ptr + w_at + moved_by(at, outputs, LAYOUT), mask=w_there, other=0)
        scale, shift = scales_at(
            absmax_ptr, code_ptr, absmax2_ptr, offset, n, block, outputs, inputs, known, SCALES, QBLOCK
        )
        a, b, c, d, of_block = inputs_by_place(
            x_ptr, x_at, x_mask, at, norm_ptr, inputs, TYPE, NORM, OFFSET, EVEN, TYPE, LAYOUT, BLOCK_K
        )
        x = (a, b, c, d)
        if NORM:
            squares += of_block
        y = _multiplied(y, packed, x, scale, shift, of_group, TYPE, ASM, values_ptr, SCALE_WEIGHTS, SHIFTED,
                        LAYOUT, GROUP, G, BLOCK_M)  # fmt: skip
        if TAIL > 0:
            a, b, c, d, _ = inputs_by_place(
                x_ptr, tail_at, tail_mask, at, norm_ptr, inputs, TYPE, False, OFFSET, EVEN, TYPE, LAYOUT, BLOCK_K
            )
            x_tail = (a, b, c, d)
            tail = _multiplied(tail, packed, x_tail, scale, shift, of_group, TYPE, ASM, values_ptr,
                               SCALE_WEIGHTS, SHIFTED, LAYOUT, GROUP, G, TAIL)  # fmt: skip
        if GATED:
            packed = tl.load(w2_ptr + w_at + moved_by(at, outputs, LAYOUT), mask=w_there, other=0)
            scale, shift = scales_at(
                absmax_2_ptr, code_2_ptr, absmax2_2_ptr, offset2, n, block, outputs, inputs, known, SCALES, QBLOCK
            )
            y2 = _multiplied(y2, packed, x, scale, shift, of_group, TYPE, ASM, values_ptr, SCALE_WEIGHTS,
                             SHIFTED, LAYOUT, GROUP, G, BLOCK_M)  # fmt: skip
            if TAIL > 0:
                tail2 = _multiplied(tail2, packed, x_tail, scale, shift, of_group, TYPE, ASM, values_ptr,
                                    SCALE_WEIGHTS, SHIFTED, LAYOUT, GROUP, G, TAIL)  # fmt: skip
    release(PDL)
    y = _rows(y, G, BLOCK_M)
    y2 = _rows(y2, G, BLOCK_M)
    if TAIL > 0:
        tail = _rows(tail, G, TAIL)
        tail2 = _rows(tail2, G, TAIL)
    factor = 1.0
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, 1) / inputs + eps)[:, None]
        y *= factor
        y2 *= factor
    return y, y2, tail, tail2, factor


@triton.jit
def _rows(y, G: tl.constexpr, ROWS: tl.constexpr):
    """The sum over groups' columns, [rows, outputs]."""
    if G > 1:
        y = tl.sum(tl.reshape(y, (y.shape[0], G, ROWS)), 1)
    return tl.trans(y)


@triton.jit
def by_sums(x_ptr, w_ptr, absmax_ptr, code_ptr, absmax2_ptr, offset_ptr,
            w2_ptr, absmax_2_ptr, code_2_ptr, absmax2_2_ptr, offset_2_ptr, norm_ptr,
            first, outputs, inputs, eps, TYPE: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
            GATED: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr, values_ptr, LAYOUT: tl.constexpr,
            SCALES: tl.constexpr, QBLOCK: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_K: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """As `by_dot` for one row, by multiplications and sums in float32; [1, BLOCK_N] each.

    A block of weights is loaded before the one in hand is used, the first before the kernel before this one is done.
    """
    SHIFTED: tl.constexpr = not (SCALES == "blocks" or SCALES == "nested" or SCALES == "groups")
    n = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K // 4)
    in_row = elements_of_row(inputs, LAYOUT, GROUP)
    g = tl.arange(0, BLOCK_K // GROUP)
    w_at = elements_at(n, k, outputs, inputs, LAYOUT, GROUP)
    w_mask = (n < outputs)[:, None]
    row = tl.zeros([1, 1], tl.int32)
    offset = 0.0
    offset2 = 0.0
    if SCALES == "nested":
        offset = tl.load(offset_ptr)
        if GATED:
            offset2 = tl.load(offset_2_ptr)
    y = tl.zeros([BLOCK_N, BLOCK_K // GROUP], tl.float32)
    y2 = y
    squares = squares_of(1, LAYOUT, BLOCK_K)
    next_w = tl.load(w_ptr + w_at, mask=w_mask & (k < in_row)[None, :], other=0, eviction_policy="evict_first")
    wait(PDL)
    release(PDL)
    for at in range(0, inputs, BLOCK_K):
        packed = next_w
        more = w_mask & (k + (at + BLOCK_K) // 4 < in_row)[None, :]
        next_at = w_at + moved_by(at + BLOCK_K, outputs, LAYOUT)
        next_w = tl.load(w_ptr + next_at, mask=more, other=0, eviction_policy="evict_first")
        a, b, c, d, of_block = inputs_by_place(
            x_ptr, row, row == 0, at, norm_ptr, inputs, TYPE, NORM, OFFSET, EVEN, tl.float32, LAYOUT, BLOCK_K
        )
        x = (a, b, c, d)
        if NORM:
            squares += of_block
        known = w_mask & (g + at // GROUP < inputs // GROUP)[None, :]
        block = (g + at // GROUP) // (QBLOCK // GROUP)
        scale, shift = scales_at(
            absmax_ptr, code_ptr, absmax2_ptr, offset, n, block, outputs, inputs, known, SCALES, QBLOCK
        )
        y += _of_groups(packed, x, TYPE, ASM, values_ptr, LAYOUT, GROUP) * scale
        if SHIFTED:
            y += shift * _sums(x, LAYOUT, GROUP)
        if GATED:
            there = w_mask if EVEN else w_mask & (k + at // 4 < in_row)[None, :]
            w2_at = w_at + moved_by(at, outputs, LAYOUT)
            packed = tl.load(w2_ptr + w2_at, mask=there, other=0, eviction_policy="evict_first")
            scale, shift = scales_at(
                absmax_2_ptr, code_2_ptr, absmax2_2_ptr, offset2, n, block, outputs, inputs, known, SCALES, QBLOCK
            )
            y2 += _of_groups(packed, x, TYPE, ASM, values_ptr, LAYOUT, GROUP) * scale
            if SHIFTED:
                y2 += shift * _sums(x, LAYOUT, GROUP)
    return summed(y, y2, squares, inputs, eps, NORM)


@triton.jit
def summed(y, y2, squares, inputs, eps, NORM: tl.constexpr):
    """One row's sums [outputs, any] of both weights over their last dimension, [1, outputs], and its norm's factor."""
    total = tl.sum(y, 1)[None, :]
    total2 = tl.sum(y2, 1)[None, :]
    factor = 1.0
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, 1) / inputs + eps)[:, None]
        total *= factor
        total2 *= factor
    return total, total2, factor


@triton.jit
def _of_groups(packed, x, TYPE: tl.constexpr, ASM: tl.constexpr, values_ptr, LAYOUT: tl.constexpr,
               GROUP: tl.constexpr):  # fmt: skip
    """The products of one row, summed over each group: [outputs, groups]."""
    product = tl.zeros(packed.shape, tl.float32)
    for i in tl.static_range(4):
        product += decoded(packed, i, TYPE, ASM, values_ptr, LAYOUT).to(tl.float32) * tl.trans(x[i])
    return summed_by_group(product, LAYOUT, GROUP)
