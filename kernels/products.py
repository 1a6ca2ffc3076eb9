"""Products of few rows with weights, block by block, in float32: the loops of the kernels in `linear`."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from pkv_hf.kernels.pdl import release, wait


@dataclass(frozen=True)
class Block:
    """How a launch cuts its weights: outputs and inputs of a block, and how its loop is compiled."""

    outputs: int
    inputs: int
    num_stages: int
    ahead: bool = False
    """Load a block of weights before the one in hand is used, the first before the kernel before this one is done."""


def choose_block(rows: int, inputs: int, outputs: int, weights: int, shared_memory: int) -> Block:
    """The block of a launch over `weights` weights at a time (two where gated) that fits `shared_memory` bytes.

    One row needs none: its products stay in registers. More rows keep `num_stages` blocks of weights and of x there.
    Small weights are mostly ramp-up, which `ahead` hides; many inputs of few outputs are not.
    """
    if rows == 1 and inputs >= 8192 and weights * outputs <= 3072:
        return Block(4, 512, 3)
    if rows == 1 and weights * outputs <= 8192:
        return Block(4, 2048 if inputs >= 8192 else 512, 1, ahead=True)
    if rows == 1:
        return Block(4, 1024 if inputs % 1024 == 0 else 512, 3)
    wide, narrow = Block(64, 256, 3), Block(32, 256, 4)
    for block in (wide if outputs > 4096 else narrow, Block(32, 128, 3), Block(16, 64, 3)):
        if block.num_stages * (weights * block.outputs + 16) * block.inputs * 2 + 4096 <= shared_memory:
            break
    return block


@triton.jit
def _read_once(pointers, mask):
    """Weights for one row: no program reads them again, so they are the first to leave L2."""
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _one_row(x_ptr, w_ptr, w2_ptr, norm_ptr, first, outputs, inputs, eps,
             NORM: tl.constexpr, OFFSET: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_K: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """As `products`, of norm(x) for one row; [1, BLOCK_N] each.

    The loop adds up products input by input, [BLOCK_N, BLOCK_K] in registers. They are summed across threads once, at
    the end, and there 1 / rms(x), which all share, multiplies the sums. AHEAD is for the first weight alone.

    Where there is a SUM, every program takes it anew, and the first writes it.
    """
    n = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    w_at = n.to(tl.int64)[:, None] * inputs + k[None, :]
    w_mask = (n < outputs)[:, None]
    products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    products2 = products
    squares = tl.zeros([BLOCK_K], tl.float32)
    release(PDL)
    if AHEAD:  # no kernel writes weights, so that they need not wait as x does
        next_w = _read_once(w_ptr + w_at, w_mask if EVEN else w_mask & (k < inputs)[None, :])
    wait(PDL)
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
        products += w.to(tl.float32) * x[None, :]
        if GATED:
            products2 += _read_once(w2_ptr + w_at + at, mask).to(tl.float32) * x[None, :]
    y = tl.sum(products, 1)[None, :]
    y2 = tl.sum(products2, 1)[None, :] if GATED else y
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / inputs + eps)
        y *= scale
        y2 *= scale
    return y, y2


@triton.jit
def _rows(x_ptr, w_ptr, w2_ptr, rows, first, outputs, inputs,
          GATED: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
          STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """As `products`, for rows padded to 16; [16, BLOCK_N] each."""
    m = tl.arange(0, 16)
    n = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    w_at = n.to(tl.int64)[:, None] * inputs + k[None, :]
    w_mask = (n < outputs)[:, None]
    x_at = m[:, None] * inputs + k[None, :]
    x_mask = (m < rows)[:, None]
    y = tl.zeros([BLOCK_N, 16], tl.float32)
    y2 = y
    wait(PDL)
    for at in tl.range(0, inputs, BLOCK_K, num_stages=STAGES):
        inside = (at + k < inputs)[None, :]
        mask = w_mask if EVEN else w_mask & inside
        w = tl.load(w_ptr + w_at + at, mask=mask, other=0.0)
        x = tl.trans(tl.load(x_ptr + x_at + at, mask=x_mask if EVEN else x_mask & inside, other=0.0))
        y = tl.dot(w, x, y)
        if GATED:
            y2 = tl.dot(tl.load(w2_ptr + w_at + at, mask=mask, other=0.0), x, y2)
    release(PDL)
    return tl.trans(y), tl.trans(y2)


@triton.jit
def products(x_ptr, w_ptr, w2_ptr, norm_ptr, rows, first, outputs, inputs, eps,
             NORM: tl.constexpr, OFFSET: tl.constexpr, GATED: tl.constexpr, ONE_ROW: tl.constexpr,
             EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
             AHEAD: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """x W^T, and x W2^T where GATED, for outputs first, ..., first + BLOCK_N - 1; float32.

    For one row x may be normed. EVEN: inputs are a multiple of BLOCK_K, so that loads of weights need no mask for the
    last block.
    """
    if ONE_ROW:
        y, y2 = _one_row(x_ptr, w_ptr, w2_ptr, norm_ptr, first, outputs, inputs, eps,
                         NORM, OFFSET, GATED, EVEN, BLOCK_N, BLOCK_K, STAGES, AHEAD, PDL)  # fmt: skip
    else:
        y, y2 = _rows(x_ptr, w_ptr, w2_ptr, rows, first, outputs, inputs,
                      GATED, EVEN, BLOCK_N, BLOCK_K, STAGES, PDL)  # fmt: skip
    return y, y2
