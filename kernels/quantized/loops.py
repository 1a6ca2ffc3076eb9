"""Products of few rows with weights of 4 bits, block by block, in float32: the loops of the kernels in `linear4`.

Weights are read as elements of 16 bits, of four inputs each. An element becomes four values in four tensors, so that
none is moved between threads: four products of tensor cores, each with every fourth input, add up to one.

Scales differ from group to group of 64 inputs. Either they multiply the products of a group in float32: a group then
has columns of its own in the product, where the inputs of other groups are 0. Few rows leave columns idle, so that
these cost nothing. Or they multiply the weights, in the half type, and a product goes over all groups.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pkv_hf.kernels.pdl import release, wait
from pkv_hf.kernels.quantized import codes, weights

CONSTRAINTS = tl.constexpr(codes.CONSTRAINTS)
GROUP = tl.constexpr(weights.GROUP)
ELEMENTS = tl.constexpr(weights.GROUP // 4)
NESTED_BLOCK = tl.constexpr(weights.NESTED)


@triton.jit
def decoded(packed, PLACE: tl.constexpr, TYPE: tl.constexpr, ASM: tl.constexpr, values_ptr):
    """The values of elements' weights at a place of 0 to 3, in a half type: by PTX, or from a table."""
    if ASM is not None:
        found = tl.inline_asm_elementwise(ASM[PLACE], CONSTRAINTS, [packed], tl.uint16, True, 4).to(TYPE, bitcast=True)
    else:
        index = (packed >> (4 * (PLACE ^ 1))) & 15
        found = tl.load(values_ptr + index.to(tl.int32))
    return found


@triton.jit
def _pairs(words, TYPE: tl.constexpr):
    """The even and the odd inputs of words of 32 bits."""
    even = words.to(tl.uint16).to(TYPE, bitcast=True)
    odd = (words >> 16).to(tl.uint16).to(TYPE, bitcast=True)
    return even, odd


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
def _multiplied(y, packed, x, scale, of_group, TYPE: tl.constexpr, ASM: tl.constexpr, values_ptr,
                SCALE_WEIGHTS: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """y plus the product of a block; scale [outputs, groups]."""
    if SCALE_WEIGHTS:
        factor = _spread(scale, ELEMENTS).to(TYPE)
        for i in tl.static_range(4):
            y = tl.dot(decoded(packed, i, TYPE, ASM, values_ptr) * factor, x[i], y)
    else:
        product = tl.zeros_like(y)
        for i in tl.static_range(4):
            values = decoded(packed, i, TYPE, ASM, values_ptr)
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
        y = _multiplied(y, packed, x, scale, of_group, TYPE, ASM, values_ptr, SCALE_WEIGHTS, G, BLOCK_M)
        if TAIL > 0:
            there = tail_mask if EVEN else tail_mask & inside
            even_tail, odd_tail = _pairs(tl.load(x_ptr + tail_at + at // 2, mask=there, other=0), TYPE)
            x_tail = _dealt(even_tail, odd_tail)
            tail = _multiplied(tail, packed, x_tail, scale, of_group, TYPE, ASM, values_ptr, SCALE_WEIGHTS, G, TAIL)
        if GATED:
            packed = tl.load(w2_ptr + w_at + at // 4, mask=w_there, other=0)
            scale = _scales(absmax_2_ptr, code_2_ptr, absmax2_2_ptr, offset2, of_block, known, NESTED)
            y2 = _multiplied(y2, packed, x, scale, of_group, TYPE, ASM, values_ptr, SCALE_WEIGHTS, G, BLOCK_M)
            if TAIL > 0:
                tail2 = _multiplied(
                    tail2, packed, x_tail, scale, of_group, TYPE, ASM, values_ptr, SCALE_WEIGHTS, G, TAIL
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
            GATED: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr, values_ptr, QBLOCK: tl.constexpr,
            NESTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """As `by_dot` for one row, by multiplications and sums in float32; [1, BLOCK_N] each.

    A block of weights is loaded before the one in hand is used, the first before the kernel before this one is done.
    """
    n = first + tl.arange(0, BLOCK_N)
    b = tl.arange(0, BLOCK_K // 2)
    k = tl.arange(0, BLOCK_K // 4)
    in_row = 16 * (inputs // GROUP)  # elements; so said, rows are known to be aligned
    g = tl.arange(0, BLOCK_K // GROUP)
    w_at = n.to(tl.int64)[:, None] * in_row + k[None, :]
    w_mask = (n < outputs)[:, None]
    s_at = n[:, None] * (inputs // GROUP) + g[None, :]
    offset = 0.0
    offset2 = 0.0
    if NESTED:
        offset = tl.load(offset_ptr)
        if GATED:
            offset2 = tl.load(offset_2_ptr)
    y = tl.zeros([BLOCK_N, BLOCK_K // GROUP], tl.float32)
    y2 = y
    squares = tl.zeros([1, BLOCK_K // 2], tl.float32)
    next_w = tl.load(w_ptr + w_at, mask=w_mask & (k < in_row)[None, :], other=0, eviction_policy="evict_first")
    wait(PDL)
    release(PDL)
    for at in range(0, inputs, BLOCK_K):
        packed = next_w
        more = w_mask & (k + (at + BLOCK_K) // 4 < in_row)[None, :]
        next_w = tl.load(w_ptr + w_at + (at + BLOCK_K) // 4, mask=more, other=0, eviction_policy="evict_first")
        inside = (b + at // 2 < inputs // 2)[None, :]
        even, odd = _pairs(tl.load(x_ptr + at // 2 + b[None, :], mask=inside, other=0), TYPE)
        if NORM:
            even, odd, of_block_squares = _normed(even, odd, norm_ptr, at + 2 * b[None, :], inputs, OFFSET)
            squares += of_block_squares
        x = _dealt(even.to(tl.float32), odd.to(tl.float32))
        known = w_mask & (g + at // GROUP < inputs // GROUP)[None, :]
        of_block = (s_at + at // GROUP) // (QBLOCK // GROUP)
        scale = _scales(absmax_ptr, code_ptr, absmax2_ptr, offset, of_block, known, NESTED)
        y += _of_groups(packed, x, TYPE, ASM, values_ptr) * scale
        if GATED:
            there = w_mask if EVEN else w_mask & (k + at // 4 < in_row)[None, :]
            packed = tl.load(w2_ptr + w_at + at // 4, mask=there, other=0, eviction_policy="evict_first")
            scale = _scales(absmax_2_ptr, code_2_ptr, absmax2_2_ptr, offset2, of_block, known, NESTED)
            y2 += _of_groups(packed, x, TYPE, ASM, values_ptr) * scale
    total = tl.sum(y, 1)[None, :]
    total2 = tl.sum(y2, 1)[None, :]
    factor = 1.0
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, 1) / inputs + eps)[:, None]
        total *= factor
        total2 *= factor
    return total, total2, factor


@triton.jit
def _of_groups(packed, x, TYPE: tl.constexpr, ASM: tl.constexpr, values_ptr):
    """The products of one row, summed over each group: [outputs, groups]."""
    product = tl.zeros(packed.shape, tl.float32)
    for i in tl.static_range(4):
        product += decoded(packed, i, TYPE, ASM, values_ptr).to(tl.float32) * tl.trans(x[i])
    return tl.sum(tl.reshape(product, (packed.shape[0], packed.shape[1] // ELEMENTS, ELEMENTS)), 2)
