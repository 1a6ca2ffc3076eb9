"""One row's products with weights of 4 bits in rows of bytes: every thread sums what it reads, in float32.

A thread reads 32 inputs of several outputs, which share a scale, and the inputs once for all of these. Nothing is moved
between threads until all is added up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pkv_hf.kernels.pdl import release, wait
from pkv_hf.kernels.quantized import blocks, codes
from pkv_hf.kernels.quantized.layouts import pairs_of, scales_at
from pkv_hf.kernels.quantized.loops import summed

WEIGHTS, OF_WEIGHT = tl.constexpr(codes.WEIGHTS_PTX), tl.constexpr(codes.WEIGHT_CONSTRAINTS)
LANE, OF_LANE = tl.constexpr(codes.LANE), tl.constexpr(codes.LANE_CONSTRAINTS)
OF_THREAD = tl.constexpr(blocks.OF_THREAD)


@triton.jit
def _lanes(values_ptr, ASM: tl.constexpr):
    """The value that a thread's lane holds. It differs from thread to thread, which the compiler is not told."""
    if ASM is not None:
        values_ptr += tl.inline_asm_elementwise(LANE, OF_LANE, [15], tl.int32, True, 1)
    return tl.load(values_ptr).to(tl.float32)


@triton.jit
def _values(packed, WEIGHT: tl.constexpr, ASM: tl.constexpr, lanes, values_ptr):
    """The values of words' weights 0 to 7, in float32: from lanes, or from memory."""
    if ASM is not None:
        found = tl.inline_asm_elementwise(WEIGHTS[WEIGHT], OF_WEIGHT, [packed, lanes], tl.float32, True, 1)
    else:
        found = tl.load(values_ptr + ((packed >> (4 * (WEIGHT ^ 1))) & 15).to(tl.int32)).to(tl.float32)
    return found


@triton.jit
def _floats(words, TYPE: tl.constexpr):
    """The even and the odd inputs of words, in float32."""
    even, odd = pairs_of(words, TYPE)
    return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def _by_norm(even, odd, words, TYPE: tl.constexpr, OFFSET: tl.constexpr):
    """Inputs times the norm's weights."""
    of_even, of_odd = _floats(words, TYPE)
    if OFFSET != 0:
        of_even += OFFSET
        of_odd += OFFSET
    return even * of_even, odd * of_odd


@triton.jit
def by_threads(x_ptr, w_ptr, absmax_ptr, code_ptr, absmax2_ptr, offset_ptr,
               w2_ptr, absmax_2_ptr, code_2_ptr, absmax2_2_ptr, offset_2_ptr, norm_ptr,
               first, outputs, inputs, eps, TYPE: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
               GATED: tl.constexpr, ASM: tl.constexpr, values_ptr, SCALES: tl.constexpr, QBLOCK: tl.constexpr,
               BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """As `loops.by_sums`, of weights as words of 32 bits; [1, BLOCK_N] each.

    A block of weights is loaded before the one in hand is used, the first before the kernel before this one is done.
    """
    T: tl.constexpr = BLOCK_K // OF_THREAD
    n = first + tl.arange(0, BLOCK_N)
    t = tl.arange(0, T)
    p = tl.arange(0, 4)
    k = tl.arange(0, BLOCK_K // 8)
    in_row = 4 * (inputs // OF_THREAD)  # words; so said, rows are known to be aligned
    w_at = n.to(tl.int64)[:, None] * in_row + k[None, :]
    w_mask = (n < outputs)[:, None]
    offset = 0.0
    offset2 = 0.0
    if SCALES == "nested":
        offset = tl.load(offset_ptr)
        if GATED:
            offset2 = tl.load(offset_2_ptr)
    lanes = _lanes(values_ptr, ASM)
    y = tl.zeros([BLOCK_N, T], tl.float32)
    y2 = y
    squares = tl.zeros([1, T], tl.float32)
    there = w_mask & (k < in_row)[None, :]
    known = w_mask & (t * OF_THREAD < inputs)[None, :]
    block = t * OF_THREAD // QBLOCK
    next_w = tl.load(w_ptr + w_at, mask=there, other=0, eviction_policy="evict_first")
    next_scale, _ = scales_at(
        absmax_ptr, code_ptr, absmax2_ptr, offset, n, block, outputs, inputs, known, SCALES, QBLOCK
    )
    if GATED:
        next_w2 = tl.load(w2_ptr + w_at, mask=there, other=0, eviction_policy="evict_first")
        next_scale2, _ = scales_at(
            absmax_2_ptr, code_2_ptr, absmax2_2_ptr, offset2, n, block, outputs, inputs, known, SCALES, QBLOCK
        )
    wait(PDL)
    release(PDL)
    for at in range(0, inputs, BLOCK_K):
        packed = next_w
        scale = next_scale
        after = at + BLOCK_K
        there = w_mask & (k + after // 8 < in_row)[None, :]
        known = w_mask & (after + t * OF_THREAD < inputs)[None, :]
        block = (after + t * OF_THREAD) // QBLOCK
        next_w = tl.load(w_ptr + w_at + after // 8, mask=there, other=0, eviction_policy="evict_first")
        next_scale, _ = scales_at(
            absmax_ptr, code_ptr, absmax2_ptr, offset, n, block, outputs, inputs, known, SCALES, QBLOCK
        )
        of_thread = _four(tl.reshape(packed, (BLOCK_N, T, 4)))
        if GATED:
            packed = next_w2
            scale2 = next_scale2
            next_w2 = tl.load(w2_ptr + w_at + after // 8, mask=there, other=0, eviction_policy="evict_first")
            next_scale2, _ = scales_at(
                absmax_2_ptr, code_2_ptr, absmax2_2_ptr, offset2, n, block, outputs, inputs, known, SCALES, QBLOCK
            )
            of_thread2 = _four(tl.reshape(packed, (BLOCK_N, T, 4)))
        sums = tl.zeros([BLOCK_N, T], tl.float32)
        sums2 = sums
        for word in tl.static_range(4):
            pair = (t * (OF_THREAD // 2) + 4 * word)[None, :, None] + p[None, None, :] + at // 2
            inside = pair < inputs // 2
            x = _four(tl.load(x_ptr + pair, mask=inside, other=0))
            if NORM:
                norm = _four(tl.load(norm_ptr.to(tl.pointer_type(tl.int32)) + pair, mask=inside, other=0))
            for i in tl.static_range(4):
                even, odd = _floats(x[i], TYPE)
                if NORM:
                    squares += even * even + odd * odd
                    even, odd = _by_norm(even, odd, norm[i], TYPE, OFFSET)
                sums += _values(of_thread[word], 2 * i, ASM, lanes, values_ptr) * even
                sums += _values(of_thread[word], 2 * i + 1, ASM, lanes, values_ptr) * odd
                if GATED:
                    sums2 += _values(of_thread2[word], 2 * i, ASM, lanes, values_ptr) * even
                    sums2 += _values(of_thread2[word], 2 * i + 1, ASM, lanes, values_ptr) * odd
        y += sums * scale
        if GATED:
            y2 += sums2 * scale2
    return summed(y, y2, squares, inputs, eps, NORM)


@triton.jit
def _four(x):
    """x [A, B, 4] as four [A, B], which a thread has that has four in a row."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d
