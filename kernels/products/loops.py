"""Products of few rows with weights, block by block, in float32: the loops of the kernels in `linear`.

Weights of 8 bits are converted in registers, which is exact, and scaled after. A row's scale multiplies its sum at the
end; the scale of a block of 128 outputs and 128 inputs multiplies what is summed of that block. A program's outputs
are of one such block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pkv_hf.kernels.pdl import release, wait
from pkv_hf.kernels.products import scales

OF_ROWS, OF_BLOCKS = tl.constexpr(scales.OF_ROWS), tl.constexpr(scales.OF_BLOCKS)
SCALE_BLOCK = tl.constexpr(scales.BLOCK)


@triton.jit
def _read_once(pointers, mask):
    """Weights for one row: no program reads them again, so they are the first to leave L2."""
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _of_block(scale_ptr, first, inputs):
    """Where the scales of the block of outputs that begins at or before `first` are."""
    return scale_ptr + (first // SCALE_BLOCK).to(tl.int64) * tl.cdiv(inputs, SCALE_BLOCK)


@triton.jit
def _one_row(x_ptr, w_ptr, w2_ptr, scale_ptr, scale2_ptr, norm_ptr, residual_ptr, first, outputs, inputs, eps,
             NORM: tl.constexpr, OFFSET: tl.constexpr, SCALES: tl.constexpr, RESIDUAL: tl.constexpr,
             GATED: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
             STAGES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """As `products`, of norm(x) for one row; [1, BLOCK_N] each, the residual's outputs, and 1 / rms(x) where NORM.

    The loop adds up products input by input, [BLOCK_N, BLOCK_K] in registers. They are summed across threads once, at
    the end, and there 1 / rms(x), which all share, multiplies the sums. AHEAD is for the first weight alone.
    """
    n = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    w_at = n.to(tl.int64)[:, None] * inputs + k[None, :]
    w_mask = (n < outputs)[:, None]
    products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    products2 = products
    squares = tl.zeros([BLOCK_K], tl.float32)
    if AHEAD:  # no kernel writes weights, so that they need not wait as x does
        next_w = _read_once(w_ptr + w_at, w_mask if EVEN else w_mask & (k < inputs)[None, :])
    wait(PDL)
    release(PDL)
    residual = 0.0
    if RESIDUAL:  # loads do not pass a sum over threads
        residual = tl.load(residual_ptr + n, mask=n < outputs, other=0.0)[None, :]
    for at in tl.range(0, inputs, BLOCK_K, num_stages=STAGES):
        inside = at + k < inputs
        mask = w_mask if EVEN else w_mask & inside[None, :]
        if AHEAD:
            w = next_w
            more = at + BLOCK_K < inputs if EVEN else (at + BLOCK_K + k < inputs)[None, :]
            next_w = _read_once(w_ptr + w_at + at + BLOCK_K, w_mask & more)
        else:
            w = _read_once(w_ptr + w_at + at, mask)
        x = tl.load(x_ptr + at + k, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            weight = tl.load(norm_ptr + at + k, mask=inside, other=0.0).to(tl.float32)
            if OFFSET != 0:
                weight += OFFSET
            x *= weight
        x2 = x
        if SCALES == OF_BLOCKS:
            block = (at + k) // SCALE_BLOCK
            if GATED:
                x2 = x * tl.load(_of_block(scale2_ptr, first, inputs) + block, mask=inside, other=0.0)
            x *= tl.load(_of_block(scale_ptr, first, inputs) + block, mask=inside, other=0.0)
        products += w.to(tl.float32) * x[None, :]
        if GATED:
            products2 += _read_once(w2_ptr + w_at + at, mask).to(tl.float32) * x2[None, :]
    y = tl.sum(products, 1)[None, :]
    y2 = tl.sum(products2, 1)[None, :] if GATED else y
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / inputs + eps)
        y *= scale
        y2 *= scale
    return y, y2, residual, scale


@triton.jit
def _added(y, w, x, scale, SCALES: tl.constexpr):
    """y plus the product of a block, times its scale where blocks have scales."""
    w = w.to(x.dtype)
    if SCALES == OF_BLOCKS:
        y += tl.dot(w, x) * scale
    else:
        y = tl.dot(w, x, y)
    return y


@triton.jit
def _rows(x_ptr, w_ptr, w2_ptr, scale_ptr, scale2_ptr, rows, first, outputs, inputs, begin, end,
          SCALES: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr,
          BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """As `products`, for rows padded to BLOCK_M + TAIL."""
    m = tl.arange(0, BLOCK_M)
    n = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    w_at = n.to(tl.int64)[:, None] * inputs + k[None, :]
    w_mask = (n < outputs)[:, None]
    x_at = m[:, None] * inputs + k[None, :]
    x_mask = (m < rows)[:, None]
    y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    y2 = y
    tail = y
    if TAIL > 0:
        m_tail = BLOCK_M + tl.arange(0, TAIL)
        tail_at = m_tail[:, None] * inputs + k[None, :]
        tail_mask = (m_tail < rows)[:, None]
        tail = tl.zeros([BLOCK_N, TAIL], tl.float32)
    tail2 = tail
    wait(PDL)
    for at in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        inside = (at + k < inputs)[None, :]
        scale = 1.0
        scale2 = 1.0
        if SCALES == OF_BLOCKS:
            scale = tl.load(_of_block(scale_ptr, first, inputs) + at // SCALE_BLOCK)
            if GATED:
                scale2 = tl.load(_of_block(scale2_ptr, first, inputs) + at // SCALE_BLOCK)
        mask = w_mask if EVEN else w_mask & inside
        w = tl.load(w_ptr + w_at + at, mask=mask, other=0.0)
        x = tl.trans(tl.load(x_ptr + x_at + at, mask=x_mask if EVEN else x_mask & inside, other=0.0))
        y = _added(y, w, x, scale, SCALES)
        if TAIL > 0:
            t = tl.trans(tl.load(x_ptr + tail_at + at, mask=tail_mask if EVEN else tail_mask & inside, other=0.0))
            tail = _added(tail, w, t, scale, SCALES)
        if GATED:
            w2 = tl.load(w2_ptr + w_at + at, mask=mask, other=0.0)
            y2 = _added(y2, w2, x, scale2, SCALES)
            if TAIL > 0:
                tail2 = _added(tail2, w2, t, scale2, SCALES)
    release(PDL)
    return tl.trans(y), tl.trans(y2), tl.trans(tail), tl.trans(tail2)


@triton.jit
def _of_rows(scale_ptr, n, outputs, UNIT: tl.constexpr):
    """The scales of outputs n, as a row."""
    return (tl.load(scale_ptr + n, mask=n < outputs, other=0.0) * UNIT)[None, :]


@triton.jit
def products(x_ptr, w_ptr, w2_ptr, scale_ptr, scale2_ptr, norm_ptr, residual_ptr, rows, first, outputs, inputs,
             part_blocks, eps, NORM: tl.constexpr, OFFSET: tl.constexpr, SCALES: tl.constexpr, UNIT: tl.constexpr,
             RESIDUAL: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr,
             BLOCK_M: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
             STAGES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """x W^T, and x W2^T where GATED, for outputs first, ..., first + BLOCK_N - 1; float32.

    Returns both for the first BLOCK_M rows, then both for the TAIL after them. EVEN: inputs are a multiple of BLOCK_K,
    so that loads of weights need no mask for the last block. SCALES says what the weights' scales are of, 0 for weights
    without; those of rows count in UNITs.

    One row, BLOCK_M 1, may be normed, and its RESIDUAL is loaded early and returned, before the norm's 1 / rms(x). Of
    more rows with PARTS of inputs, program 1 of the grid takes `part_blocks` blocks of them.
    """
    if SCALES == OF_ROWS:
        n = first + tl.arange(0, BLOCK_N)
        of_rows = _of_rows(scale_ptr, n, outputs, UNIT)
        of_rows2 = _of_rows(scale2_ptr, n, outputs, UNIT) if GATED else of_rows
    if BLOCK_M == 1:
        y, y2, residual, factor = _one_row(
            x_ptr, w_ptr, w2_ptr, scale_ptr, scale2_ptr, norm_ptr, residual_ptr, first, outputs, inputs, eps, NORM,
            OFFSET, SCALES, RESIDUAL, GATED, EVEN, BLOCK_N, BLOCK_K, STAGES, AHEAD, PDL)  # fmt: skip
        tail, tail2 = y, y2
    else:
        residual = 0.0
        factor = 1.0
        begin = 0
        end = inputs
        if PARTS:
            begin = tl.program_id(1) * part_blocks * BLOCK_K
            end = tl.minimum(begin + part_blocks * BLOCK_K, inputs)
        y, y2, tail, tail2 = _rows(x_ptr, w_ptr, w2_ptr, scale_ptr, scale2_ptr, rows, first, outputs, inputs, begin,
                                   end, SCALES, GATED, EVEN, BLOCK_M, TAIL, BLOCK_N, BLOCK_K, STAGES,
                                   PDL)  # fmt: skip
    if SCALES == OF_ROWS:
        y *= of_rows
        y2 *= of_rows2
        tail *= of_rows
        tail2 *= of_rows2
    return y, y2, tail, tail2, residual, factor
