"""Where weights of 4 bits and their scales lie, and which inputs are whose, in Triton.

Elements of 16 bits hold four weights of one output. An element's weight at place 0 to 3 is multiplied with the input of
that place: in rows and words, element e has inputs 4 e + place. In tiles, 32 elements have 128 inputs: element
8 c + 2 j + h has inputs 32 j + 8 place + 2 c + h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pkv_hf.kernels.quantized import weights

NESTED_BLOCK = tl.constexpr(weights.NESTED)
TILE = tl.constexpr(weights.TILE)
PADDED = tl.constexpr(weights.PADDED)


@triton.jit
def elements_of_row(inputs, LAYOUT: tl.constexpr, GROUP: tl.constexpr):
    """Elements of one output; so said, rows are known to be aligned."""
    count = (GROUP // 4) * (inputs // GROUP)
    if LAYOUT == "tiles":
        count = (PADDED // 4) * tl.cdiv(inputs, PADDED)
    return count


@triton.jit
def elements_at(n, k, outputs, inputs, LAYOUT: tl.constexpr, GROUP: tl.constexpr):
    """Where elements k [K] of outputs n [N] lie: [N, K]."""
    n = n.to(tl.int64)[:, None]
    k = k[None, :]
    if LAYOUT == "tiles":
        of_tile: tl.constexpr = TILE // 4
        tiles = elements_of_row(inputs, LAYOUT, GROUP) // of_tile
        at = ((n // 8) * tiles + k // of_tile) * (8 * of_tile) + (n % 8) * of_tile + k % of_tile
    elif LAYOUT == "words":
        at = (k // 2) * (2 * outputs) + 2 * n + k % 2
    else:
        at = n * elements_of_row(inputs, LAYOUT, GROUP) + k
    return at


@triton.jit
def moved_by(at, outputs, LAYOUT: tl.constexpr):
    """By how much `elements_at` moves with `at` inputs, which are whole tiles or words."""
    if LAYOUT == "tiles":
        by = at * 2
    elif LAYOUT == "words":
        by = at // 8 * (2 * outputs).to(tl.int64)
    else:
        by = at // 4
    return by


@triton.jit
def scales_at(absmax_ptr, code_ptr, absmax2_ptr, offset, n, block, outputs, inputs, mask, SCALES: tl.constexpr,
              QBLOCK: tl.constexpr):  # fmt: skip
    """The scales of blocks of outputs n, [N, G] in float32, and what is added to values times scales."""
    if SCALES == "blocks" or SCALES == "nested":
        at = n[:, None] * (inputs // QBLOCK) + block[None, :]
        if SCALES == "nested":
            index = tl.load(absmax_ptr + at, mask=mask, other=0).to(tl.int32)
            outer = tl.load(absmax2_ptr + at // NESTED_BLOCK, mask=mask, other=0.0)
            scale = tl.load(code_ptr + index) * outer + offset
        else:
            scale = tl.load(absmax_ptr + at, mask=mask, other=0.0)
        shift = scale
    elif SCALES == "pairs":
        at = 2 * (block[None, :] * (tl.cdiv(outputs, 8) * 8) + n[:, None])
        scale = tl.load(absmax_ptr + at, mask=mask, other=0.0).to(tl.float32)
        shift = tl.load(absmax_ptr + at + 1, mask=mask, other=0.0).to(tl.float32)
    else:
        at = block[None, :] * outputs + n[:, None]
        scale = tl.load(absmax_ptr + at, mask=mask, other=0.0).to(tl.float32)
        shift = scale
        if SCALES == "shifted":
            shift = tl.load(code_ptr + at, mask=mask, other=0.0).to(tl.float32)
        elif SCALES == "zeros" or SCALES == "zeros from 1":
            word = tl.load(code_ptr + block[None, :] * (outputs // 8) + n[:, None] // 8, mask=mask, other=0)
            zero = (word >> (4 * (n % 8))[:, None]) & 15
            if SCALES == "zeros from 1":
                zero += 1
            shift = scale * (8 - zero).to(tl.float32)
    return scale, shift


@triton.jit
def groups_of(k, LAYOUT: tl.constexpr, GROUP: tl.constexpr):
    """The group of inputs that elements k are of."""
    group = k // (GROUP // 4)
    if LAYOUT == "tiles":
        group = k // (TILE // 4) * (TILE // GROUP) + k % 8 // 2 * (TILE // 4) // GROUP
    return group


@triton.jit
def summed_by_group(values, LAYOUT: tl.constexpr, GROUP: tl.constexpr):
    """The sums of [R, elements] over the elements of each group: [R, groups]."""
    R: tl.constexpr = values.shape[0]
    E: tl.constexpr = values.shape[1]
    if LAYOUT == "tiles":
        J: tl.constexpr = TILE // GROUP
        wide = tl.reshape(values, (R, 4 * E // TILE, 4, J, 8 // J))
        sums = tl.reshape(tl.sum(tl.sum(wide, 4), 2), (R, 4 * E // TILE * J))
    else:
        sums = tl.sum(tl.reshape(values, (R, 4 * E // GROUP, GROUP // 4)), 2)
    return sums


@triton.jit
def spread(scale, COUNT: tl.constexpr):
    """scale [R, groups], each COUNT times."""
    wide = tl.broadcast_to(scale[:, :, None], (scale.shape[0], scale.shape[1], COUNT))
    return tl.reshape(wide, (scale.shape[0], scale.shape[1] * COUNT))


@triton.jit
def spread_to_elements(scale, LAYOUT: tl.constexpr, GROUP: tl.constexpr):
    """scale [R, groups] for the elements of each group: [R, elements]."""
    if LAYOUT == "tiles":
        R: tl.constexpr = scale.shape[0]
        G: tl.constexpr = scale.shape[1]
        J: tl.constexpr = TILE // GROUP
        wide = tl.reshape(scale, (R, G // J, 1, J, 1))
        wide = tl.reshape(tl.broadcast_to(wide, (R, G // J, 4, J, 8 // J)), (R, G * GROUP // 4))
    else:
        wide = spread(scale, GROUP // 4)
    return wide


@triton.jit
def pairs_of(words, TYPE: tl.constexpr):
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
def _loaded(x_ptr, row, at, mask, norm_ptr, inputs, TYPE: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
            AS: tl.constexpr):  # fmt: skip
    """The even and odd inputs of words `at` [W] of rows, as AS, and the sums of their squares where NORM."""
    even, odd = pairs_of(tl.load(x_ptr + row + at[None, :], mask=mask, other=0), TYPE)
    squares = even
    if NORM:
        even, odd, squares = _normed(even, odd, norm_ptr, 2 * at[None, :], inputs, OFFSET)
    return even.to(AS), odd.to(AS), squares


@triton.jit
def inputs_by_place(x_ptr, row, row_mask, at, norm_ptr, inputs, TYPE: tl.constexpr, NORM: tl.constexpr,
                    OFFSET: tl.constexpr, EVEN: tl.constexpr, AS: tl.constexpr, LAYOUT: tl.constexpr,
                    BLOCK_K: tl.constexpr):  # fmt: skip
    """x of a block of inputs from `at` on, four of [elements, rows] by their places, and squares as `_loaded`.

    x_ptr is of words of two inputs, rows [R, 1] begin at `row`.
    """
    if LAYOUT == "tiles":
        f = tl.arange(0, BLOCK_K // 8)
        first = at // 2 + f // 16 * 64 + f % 4 * 16 + f // 4 % 4
        a, squares = _of_tiles(x_ptr, row, row_mask, first, norm_ptr, inputs, TYPE, NORM, OFFSET, EVEN, AS)
        b, squares_b = _of_tiles(x_ptr, row, row_mask, first + 4, norm_ptr, inputs, TYPE, NORM, OFFSET, EVEN, AS)
        c, squares_c = _of_tiles(x_ptr, row, row_mask, first + 8, norm_ptr, inputs, TYPE, NORM, OFFSET, EVEN, AS)
        d, squares_d = _of_tiles(x_ptr, row, row_mask, first + 12, norm_ptr, inputs, TYPE, NORM, OFFSET, EVEN, AS)
        if NORM:
            squares += squares_b + squares_c + squares_d
    else:
        words = at // 2 + tl.arange(0, BLOCK_K // 2)
        mask = row_mask if EVEN else row_mask & (words < inputs // 2)[None, :]
        even, odd, squares = _loaded(x_ptr, row, words, mask, norm_ptr, inputs, TYPE, NORM, OFFSET, AS)
        a, b, c, d = _dealt(even, odd)
    return a, b, c, d, squares


@triton.jit
def _of_tiles(x_ptr, row, row_mask, words, norm_ptr, inputs, TYPE: tl.constexpr, NORM: tl.constexpr,
              OFFSET: tl.constexpr, EVEN: tl.constexpr, AS: tl.constexpr):  # fmt: skip
    """Inputs of one place [elements, rows], and squares: an element has the even or the odd input of a word."""
    mask = row_mask if EVEN else row_mask & (words < inputs // 2)[None, :]
    even, odd, squares = _loaded(x_ptr, row, words, mask, norm_ptr, inputs, TYPE, NORM, OFFSET, AS)
    both = tl.permute(tl.join(even, odd), (1, 2, 0))
    return tl.reshape(both, (2 * even.shape[1], even.shape[0])), squares


@triton.jit
def squares_of(rows: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_K: tl.constexpr):
    """Zeros for the sums of squares that `inputs_by_place` returns."""
    return tl.zeros([rows, BLOCK_K // (8 if LAYOUT == "tiles" else 2)], tl.float32)
