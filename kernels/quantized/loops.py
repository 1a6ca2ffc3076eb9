"""Products of few rows with weights of 4 bits, block by block, in float32: the loops of the kernels in `linear4`.

Tensor cores read weights as elements of 16 bits, of four inputs each. An element becomes four values in four tensors,
so that none is moved between threads: four products, each with every fourth input, add up to one.

Scales differ from group to group of 64 inputs. Either they multiply the products of a group in float32: a group then
has columns of its own in the product, where the inputs of other groups are 0. Few rows leave columns idle, so that
these cost nothing. Or they multiply the weights, in the half type, and a product goes over all groups.

One row is sums in float32. A thread reads 32 inputs of several outputs, half a group, and nothing is moved between
threads until all is added up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pkv_hf.kernels.pdl import release, wait
from pkv_hf.kernels.quantized import blocks, codes, weights

WEIGHTS, PAIRS, LANE = tl.constexpr(codes.WEIGHTS_PTX), tl.constexpr(codes.PAIRS_PTX), tl.constexpr(codes.LANE)
OF_WEIGHT, OF_PAIR = tl.constexpr(codes.WEIGHT_CONSTRAINTS), tl.constexpr(codes.PAIR_CONSTRAINTS)
OF_HALF, OF_ELEMENTS = tl.constexpr(codes.HALF_CONSTRAINTS), tl.constexpr(codes.ELEMENTS_CONSTRAINTS)
OF_LANE = tl.constexpr(codes.LANE_CONSTRAINTS)
GROUP = tl.constexpr(weights.GROUP)
ELEMENTS = tl.constexpr(weights.GROUP // 4)
NESTED_BLOCK = tl.constexpr(weights.NESTED)
OF_THREAD = tl.constexpr(blocks.OF_THREAD)


@triton.jit
def _lanes(values_ptr, ASM: tl.constexpr):
    """The value that a thread's lane holds. It differs from thread to thread, which the compiler is not told."""
    if ASM is not None:
        values_ptr += tl.inline_asm_elementwise(LANE, OF_LANE, [15], tl.int32, True, 1)
    return tl.load(values_ptr)


@triton.jit
def _values(packed, AT: tl.constexpr, values_ptr):
    """The values of the weights AT of words or elements, from memory."""
    return tl.load(values_ptr + ((packed >> (4 * (AT ^ 1))) & 15).to(tl.int32))


@triton.jit
def _element_values(packed, PLACE: tl.constexpr, TYPE: tl.constexpr, ASM: tl.constexpr, lanes, values_ptr):
    """The values of elements' weights at a place of 0 to 3, in a half type."""
    if ASM is None:
        found = _values(packed, PLACE, values_ptr)
    elif PLACE % 2 == 0:
        found = tl.inline_asm_elementwise(ASM[1 + PLACE // 2], OF_ELEMENTS, [packed], tl.uint16, True, 4)
        found = found.to(TYPE, bitcast=True)
    else:
        bits = lanes.to(tl.uint16, bitcast=True).to(tl.uint32)
        found = tl.inline_asm_elementwise(PAIRS[PLACE], OF_PAIR, [packed, bits], tl.uint16, True, 2)
        found = found.to(TYPE, bitcast=True)
    return found


@triton.jit
def _half_values(packed, UPPER: tl.constexpr, ASM: tl.constexpr, lanes, values_ptr):
    """The values of four of words' eight weights, in float32."""
    if ASM is None:
        a = _values(packed, 4 * UPPER, values_ptr).to(tl.float32)
        b = _values(packed, 4 * UPPER + 1, values_ptr).to(tl.float32)
        c = _values(packed, 4 * UPPER + 2, values_ptr).to(tl.float32)
        d = _values(packed, 4 * UPPER + 3, values_ptr).to(tl.float32)
    elif UPPER:
        wide = lanes.to(tl.float32)
        a = tl.inline_asm_elementwise(WEIGHTS[4], OF_WEIGHT, [packed, wide], tl.float32, True, 1)
        b = tl.inline_asm_elementwise(WEIGHTS[5], OF_WEIGHT, [packed, wide], tl.float32, True, 1)
        c = tl.inline_asm_elementwise(WEIGHTS[6], OF_WEIGHT, [packed, wide], tl.float32, True, 1)
        d = tl.inline_asm_elementwise(WEIGHTS[7], OF_WEIGHT, [packed, wide], tl.float32, True, 1)
    else:
        four: tl.constexpr = (tl.float32, tl.float32, tl.float32, tl.float32)
        a, b, c, d = tl.inline_asm_elementwise(ASM[0], OF_HALF, [packed], four, True, 1)
    return a, b, c, d


@triton.jit
def _pairs(words, TYPE: tl.constexpr):
    """The even and the odd inputs of words of 32 bits."""
    even = words.to(tl.uint16).to(TYPE, bitcast=True)
    odd = (words >> 16).to(tl.uint16).to(TYPE, bitcast=True)
    return even, odd


@triton.jit
def _floats(words, TYPE: tl.constexpr):
    """`_pairs` in float32."""
    even, odd = _pairs(words, TYPE)
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
def _normed(even, odd, norm_ptr, k, inputs, OFFSET: tl.constexpr):
    """Inputs k and k + 1 times the norm's weights, in float32, and the sums of their squares."""
    even = even.to(tl.float32)
    odd = odd.to(tl.float32)
    weight_even = tl.load(norm_ptr + k, mask=k < inputs, other=0.0).to(tl.float32)
    weight_odd = tl.load(norm_ptr + k + 1, mask=k < inputs, other=0.0).to(tl.float32)
    if OFFSET != 0:
        weight_even += OFFSET
        weight_odd += OFFSET
    return even * weight_even, odd * weight_odd, even * even + odd * odd


@triton.jit
def _dealt(even, odd):
    """Inputs by their place in groups of four: even and odd ones [rows, 2 * n] as four [n, rows]."""
    R: tl.constexpr = even.shape[0]
    N: tl.constexpr = even.shape[1] // 2
    a, c = tl.split(tl.reshape(even, (R, N, 2)))
    b, d = tl.split(tl.reshape(odd, (R, N, 2)))
    return tl.trans(a), tl.trans(b), tl.trans(c), tl.trans(d)


@triton.jit
def _scales(absmax_ptr, code_ptr, absmax2_ptr, offset, at, mask, NESTED: tl.constexpr):
    """The scales of blocks `at`."""
    if NESTED:
        index = tl.load(absmax_ptr + at, mask=mask, other=0).to(tl.int32)
        outer = tl.load(absmax2_ptr + at // NESTED_BLOCK, mask=mask, other=0.0)
        found = tl.load(code_ptr + index) * outer + offset
    else:
        found = tl.load(absmax_ptr + at, mask=mask, other=0.0)
    return found


@triton.jit
def _in_columns(x, of_group, G: tl.constexpr):
    """x [inputs, rows] as [inputs, G * rows]: a group of inputs in its own columns, 0 elsewhere."""
    if G > 1:
        x = tl.where(of_group[:, :, None], x[:, None, :], 0.0).to(x.dtype)
        x = tl.reshape(x, (x.shape[0], G * x.shape[2]))
    return x


@triton.jit
def _spread(scale, COUNT: tl.constexpr):
    """scale [outputs, groups], each COUNT times: for the columns of `_in_columns`, or for the elements of groups."""
    wide = tl.broadcast_to(scale[:, :, None], (scale.shape[0], scale.shape[1], COUNT))
    return tl.reshape(wide, (scale.shape[0], scale.shape[1] * COUNT))


@triton.jit
def _multiplied(y, packed, x, scale, of_group, TYPE: tl.constexpr, ASM: tl.constexpr, lanes, values_ptr,
                SCALE_WEIGHTS: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """y plus the product of a block; scale [outputs, groups]."""
    if SCALE_WEIGHTS:
        factor = _spread(scale, ELEMENTS).to(TYPE)
        for i in tl.static_range(4):
            y = tl.dot(_element_values(packed, i, TYPE, ASM, lanes, values_ptr) * factor, x[i], y)
    else:
        product = tl.zeros_like(y)
        for i in tl.static_range(4):
            values = _element_values(packed, i, TYPE, ASM, lanes, values_ptr)
            product = tl.dot(values, _in_columns(x[i], of_group, G), product)
        y += product * _spread(scale, ROWS)
    return y


@triton.jit
def by_dot(x_ptr, w_ptr, absmax_ptr, code_ptr, absmax2_ptr, offset_ptr,
           w2_ptr, absmax_2_ptr, code_2_ptr, absmax2_2_ptr, offset_2_ptr, norm_ptr,
           rows, first, outputs, inputs, begin, end, eps, TYPE: tl.constexpr, NORM: tl.constexpr,
           OFFSET: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr, values_ptr,
           QBLOCK: tl.constexpr, NESTED: tl.constexpr, SCALE_WEIGHTS: tl.constexpr, BLOCK_M: tl.constexpr,
           TAIL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
           PDL: tl.constexpr):  # fmt: skip
    """x W^T, and x W2^T where GATED, by tensor cores; returns both of BLOCK_M rows, then both of the TAIL after them.

    x_ptr is of words of two inputs. The norm is an RMSNorm of each row, whose factor multiplies the sums at the end.
    """
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    G: tl.constexpr = 1 if SCALE_WEIGHTS else GROUPS
    m = tl.arange(0, BLOCK_M)
    n = first + tl.arange(0, BLOCK_N)
    b = tl.arange(0, BLOCK_K // 2)
    k = tl.arange(0, BLOCK_K // 4)
    in_row = 16 * (inputs // GROUP)  # elements; so said, rows are known to be aligned
    g = tl.arange(0, GROUPS)
    of_group = (k // ELEMENTS)[:, None] == g[None, :]
    w_at = n.to(tl.int64)[:, None] * in_row + k[None, :]
    w_mask = (n < outputs)[:, None]
    x_at = m[:, None] * (inputs // 2) + b[None, :]
    x_mask = (m < rows)[:, None]
    s_at = n[:, None] * (inputs // GROUP) + g[None, :]
    offset = 0.0
    offset2 = 0.0
    if NESTED:
        offset = tl.load(offset_ptr)
        if GATED:
            offset2 = tl.load(offset_2_ptr)
    y = tl.zeros([BLOCK_N, G * BLOCK_M], tl.float32)
    y2 = y
    tail = y
    squares = tl.zeros([BLOCK_M, BLOCK_K // 2], tl.float32)
    if TAIL > 0:
        m_tail = BLOCK_M + tl.arange(0, TAIL)
        tail_at = m_tail[:, None] * (inputs // 2) + b[None, :]
        tail_mask = (m_tail < rows)[:, None]
        tail = tl.zeros([BLOCK_N, G * TAIL], tl.float32)
    tail2 = tail
    lanes = _lanes(values_ptr, ASM)
    wait(PDL)
    for at in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        inside = (b + at // 2 < inputs // 2)[None, :]
        known = w_mask & (g + at // GROUP < inputs // GROUP)[None, :]
        w_there = w_mask if EVEN else w_mask & (k + at // 4 < in_row)[None, :]
        packed = tl.load(w_ptr + w_at + at // 4, mask=w_there, other=0)
        of_block = (s_at + at // GROUP) // (QBLOCK // GROUP)
        scale = _scales(absmax_ptr, code_ptr, absmax2_ptr, offset, of_block, known, NESTED)
        even, odd = _pairs(tl.load(x_ptr + x_at + at // 2, mask=x_mask if EVEN else x_mask & inside, other=0), TYPE)
        if NORM:
            even, odd, of_block_squares = _normed(even, odd, norm_ptr, at + 2 * b[None, :], inputs, OFFSET)
            even = even.to(TYPE)
            odd = odd.to(TYPE)
            squares += of_block_squares
        x = _dealt(even, odd)
        y = _multiplied(y, packed, x, scale, of_group, TYPE, ASM, lanes, values_ptr, SCALE_WEIGHTS, G, BLOCK_M)
        if TAIL > 0:
            there = tail_mask if EVEN else tail_mask & inside
            even_tail, odd_tail = _pairs(tl.load(x_ptr + tail_at + at // 2, mask=there, other=0), TYPE)
            x_tail = _dealt(even_tail, odd_tail)
            tail = _multiplied(
                tail, packed, x_tail, scale, of_group, TYPE, ASM, lanes, values_ptr, SCALE_WEIGHTS, G, TAIL
            )
        if GATED:
            packed = tl.load(w2_ptr + w_at + at // 4, mask=w_there, other=0)
            scale = _scales(absmax_2_ptr, code_2_ptr, absmax2_2_ptr, offset2, of_block, known, NESTED)
            y2 = _multiplied(y2, packed, x, scale, of_group, TYPE, ASM, lanes, values_ptr, SCALE_WEIGHTS, G, BLOCK_M)
            if TAIL > 0:
                tail2 = _multiplied(
                    tail2, packed, x_tail, scale, of_group, TYPE, ASM, lanes, values_ptr, SCALE_WEIGHTS, G, TAIL
                )
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
            GATED: tl.constexpr, ASM: tl.constexpr, values_ptr, QBLOCK: tl.constexpr, NESTED: tl.constexpr,
            BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """As `by_dot` for one row, by multiplications and sums in float32; [1, BLOCK_N] each. Weights are words.

    A block of weights is loaded before the one in hand is used, the first before the kernel before this one is done.
    """
    T: tl.constexpr = BLOCK_K // OF_THREAD
    n = first + tl.arange(0, BLOCK_N)
    t = tl.arange(0, T)
    p = tl.arange(0, 4)
    k = tl.arange(0, BLOCK_K // 8)
    in_row = 8 * (inputs // GROUP)  # words; so said, rows are known to be aligned
    w_at = n.to(tl.int64)[:, None] * in_row + k[None, :]
    w_mask = (n < outputs)[:, None]
    s_at = n[:, None] * (inputs // GROUP)
    offset = 0.0
    offset2 = 0.0
    if NESTED:
        offset = tl.load(offset_ptr)
        if GATED:
            offset2 = tl.load(offset_2_ptr)
    lanes = _lanes(values_ptr, ASM)
    y = tl.zeros([BLOCK_N, T], tl.float32)
    y2 = y
    squares = tl.zeros([1, T], tl.float32)
    there = w_mask & (k < in_row)[None, :]
    known = w_mask & (t * OF_THREAD < inputs)[None, :]
    of_block = (s_at + (t * OF_THREAD // GROUP)[None, :]) // (QBLOCK // GROUP)
    next_w = tl.load(w_ptr + w_at, mask=there, other=0, eviction_policy="evict_first")
    next_scale = _scales(absmax_ptr, code_ptr, absmax2_ptr, offset, of_block, known, NESTED)
    if GATED:
        next_w2 = tl.load(w2_ptr + w_at, mask=there, other=0, eviction_policy="evict_first")
        next_scale2 = _scales(absmax_2_ptr, code_2_ptr, absmax2_2_ptr, offset2, of_block, known, NESTED)
    wait(PDL)
    release(PDL)
    for at in range(0, inputs, BLOCK_K):
        packed = next_w
        scale = next_scale
        after = at + BLOCK_K
        there = w_mask & (k + after // 8 < in_row)[None, :]
        known = w_mask & (after + t * OF_THREAD < inputs)[None, :]
        of_block = (s_at + ((after + t * OF_THREAD) // GROUP)[None, :]) // (QBLOCK // GROUP)
        next_w = tl.load(w_ptr + w_at + after // 8, mask=there, other=0, eviction_policy="evict_first")
        next_scale = _scales(absmax_ptr, code_ptr, absmax2_ptr, offset, of_block, known, NESTED)
        of_thread = _four(tl.reshape(packed, (BLOCK_N, T, 4)))
        if GATED:
            packed = next_w2
            scale2 = next_scale2
            next_w2 = tl.load(w2_ptr + w_at + after // 8, mask=there, other=0, eviction_policy="evict_first")
            next_scale2 = _scales(absmax_2_ptr, code_2_ptr, absmax2_2_ptr, offset2, of_block, known, NESTED)
            of_thread2 = _four(tl.reshape(packed, (BLOCK_N, T, 4)))
        sums = tl.zeros([BLOCK_N, T], tl.float32)
        sums2 = sums
        for word in tl.static_range(4):
            pair = (t * (OF_THREAD // 2) + 4 * word)[None, :, None] + p[None, None, :] + at // 2
            inside = pair < inputs // 2
            x = _four(tl.load(x_ptr + pair, mask=inside, other=0))
            if NORM:
                norm = _four(tl.load(norm_ptr.to(tl.pointer_type(tl.int32)) + pair, mask=inside, other=0))
            for half in tl.static_range(2):
                even, odd = _floats(x[2 * half], TYPE)
                even2, odd2 = _floats(x[2 * half + 1], TYPE)
                if NORM:
                    squares += even * even + odd * odd + even2 * even2 + odd2 * odd2
                    even, odd = _by_norm(even, odd, norm[2 * half], TYPE, OFFSET)
                    even2, odd2 = _by_norm(even2, odd2, norm[2 * half + 1], TYPE, OFFSET)
                a, b, c, d = _half_values(of_thread[word], half, ASM, lanes, values_ptr)
                sums += a * even
                sums += b * odd
                sums += c * even2
                sums += d * odd2
                if GATED:
                    a, b, c, d = _half_values(of_thread2[word], half, ASM, lanes, values_ptr)
                    sums2 += a * even
                    sums2 += b * odd
                    sums2 += c * even2
                    sums2 += d * odd2
        y += sums * scale
        if GATED:
            y2 += sums2 * scale2
    total = tl.sum(y, 1)[None, :]
    total2 = tl.sum(y2, 1)[None, :]
    factor = 1.0
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, 1) / inputs + eps)[:, None]
        total *= factor
        total2 *= factor
    return total, total2, factor


@triton.jit
def _four(x):
    """x [A, B, 4] as four [A, B], which a thread has that has four in a row."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d
