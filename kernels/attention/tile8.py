"""`attend_tiles` over pages of 8 bits: two neighbouring elements are one 16-bit word, unpacked into float16 operands.

Tensor cores want V by columns. Shared memory gives words of 16 bits so, but bytes one by one. A word's two elements
become two operands of half the width, the even elements and the odd ones, with a product for each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pkv_hf.kernels.attention.tile import (
    add_compensated,
    add_scaled,
    cap_scores,
    first_seen,
    mask_scores,
    softmax_step,
)


@triton.jit
def _unpack(words, FP8: tl.constexpr, OPERAND: tl.constexpr, NATIVE: tl.constexpr):
    """The even and the odd elements of words, their lower and upper bytes, as OPERAND.

    NATIVE: by a GPU's own conversions to float16, which take two words at a time and give their two even elements in
    one register, their two odd ones in another.
    """
    if NATIVE and tl.float16 == OPERAND:
        if FP8:
            even, odd = tl.inline_asm_elementwise(
                "{ .reg .b16 a, b; .reg .b32 x, y; mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 x, a; "
                "cvt.rn.f16x2.e4m3x2 y, b; prmt.b32 $0, x, y, 0x5410; prmt.b32 $1, x, y, 0x7632; }",
                "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
        else:  # with its sign bit turned, a byte in the mantissa of 1024 is 1024 + 128 + its value
            even, odd = tl.inline_asm_elementwise(
                "{ .reg .b32 x, y, bias; mov.b32 bias, 0x64806480; and.b32 x, $2, 0x00FF00FF; xor.b32 x, x, bias; "
                "sub.f16x2 $0, x, bias; shr.u32 y, $2, 8; and.b32 y, y, 0x00FF00FF; xor.b32 y, y, bias; "
                "sub.f16x2 $1, y, bias; }",
                "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
    elif FP8:
        even = (words & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(OPERAND)
        odd = ((words >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(OPERAND)
    else:
        even = (words << 8 >> 8).to(OPERAND)
        odd = (words >> 8).to(OPERAND)
    return even, odd


@triton.jit
def _split_queries(q, scale, OPERAND: tl.constexpr, BLOCK_M: tl.constexpr, HALF: tl.constexpr):
    """The even and the odd elements of q as OPERAND, [BLOCK_M, HALF] each, and what scales each query's scores.

    float16 has not the range of bfloat16: such a query is divided by a power of two, which goes into its scale.
    """
    scales = tl.full([BLOCK_M], 1.0, tl.float32) * scale
    if q.dtype == tl.bfloat16:
        largest = tl.max(tl.abs(q.to(tl.float32)), 1)
        power = tl.exp2(tl.floor(tl.log2(tl.where(largest > 0.0, largest, 1.0))))
        q = q.to(tl.float32) / power[:, None]
        scales *= power
    even, odd = tl.split(tl.reshape(q.to(OPERAND), [BLOCK_M, HALF, 2]))
    return even, odd, scales


@triton.jit
def _add_rescaled(total, alpha, part, lost, COMPENSATED: tl.constexpr):
    """alpha total + part, and, of COMPENSATED sums, what rounding has lost."""
    if COMPENSATED:
        total, lost = add_compensated(total * alpha, part, lost * alpha)
    else:
        total = total * alpha + part
    return total, lost


@triton.jit
def attend_tiles_8bit(q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, next_page, start, end, q_len, window,
                      first_tile, num_tiles, scale, stride_kp, stride_vp, stride_sp,
                      G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, STAGES: tl.constexpr,
                      CAP: tl.constexpr, CHUNKED: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """`attend_tiles` where k_ptr and v_ptr point at words [..., D // 2] and [..., DV // 2], with their strides, and the
    scale pointers at the KV head's scales in page 0.

    Products are in float16, where 8-bit values are exact (float32 for queries of that type). K's scales multiply the
    scores. V's multiply the weights, as shares of the tile's largest, which multiplies the product: by themselves they
    would push weights into float16's subnormals.
    """
    OPERAND: tl.constexpr = tl.float32 if q[0].dtype == tl.float32 else tl.float16
    COMPENSATED: tl.constexpr = q[0].dtype == tl.float32
    HALF: tl.constexpr = q[0].shape[1] // 2
    HALF_V: tl.constexpr = BLOCK_DV // 2
    q_even: tl.tuple = ()
    q_odd: tl.tuple = ()
    for part in tl.static_range(len(q)):
        of_even, of_odd, q_scale = _split_queries(q[part], scale, OPERAND, BLOCK_M, HALF)  # several have one scale
        q_even += (of_even,)
        q_odd += (of_odd,)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    l_lost = l_i
    even = tl.zeros([BLOCK_M, HALF_V], tl.float32)
    odd = even
    even_lost = even
    odd_lost = even
    d = tl.arange(0, HALF)
    dv = tl.arange(0, HALF_V)
    positions = end - q_len + tl.arange(0, BLOCK_M) // G
    lowest = first_seen(start, end, q_len, window, CHUNKED)
    for tile in tl.range(first_tile, first_tile + num_tiles, num_stages=STAGES):
        n = tile * TOKENS + tl.arange(0, TOKENS)
        live = (n >= lowest) & (n < end)
        # Pages are looked up a tile ahead, as in `attend_tiles`.
        page = next_page.to(tl.int64)
        after = n + TOKENS
        next_page = tl.load(table_ptr + after // PAGE, mask=after < end, other=0)
        slot = ((n % PAGE) * (D // 2)).to(tl.int64)
        scale_at = page * stride_sp + n % PAGE
        products: tl.tuple = ()
        for part in tl.static_range(len(q)):
            at = d + part * HALF
            mask = live[:, None] & (at < D // 2)[None, :]
            k_words = tl.load(k_ptr + (page * stride_kp + slot)[:, None] + at[None, :], mask=mask, other=0)
            k_even, k_odd = _unpack(k_words, FP8, OPERAND, NATIVE)
            product = tl.dot(q_even[part], tl.trans(k_even), input_precision="ieee")
            products += (tl.dot(q_odd[part], tl.trans(k_odd), product, input_precision="ieee"),)
        k_scale = tl.load(k_scale_ptr + scale_at, mask=live, other=0.0)
        s = cap_scores(add_scaled(products, q_scale[:, None] * k_scale[None, :]), CAP)
        m_i, p, alpha = softmax_step(m_i, mask_scores(s, n, live, positions, start, window, CHUNKED))
        v_scale = tl.load(v_scale_ptr + scale_at, mask=live, other=0.0)
        largest = tl.max(v_scale, 0)
        shares = v_scale / tl.where(largest > 0.0, largest, 1.0)
        weights = (p * shares[None, :]).to(OPERAND)
        slot = ((n % PAGE) * (DV // 2)).to(tl.int64)
        mask = live[:, None] & (dv < DV // 2)[None, :]
        v_words = tl.load(v_ptr + (page * stride_vp + slot)[:, None] + dv[None, :], mask=mask, other=0)
        v_even, v_odd = _unpack(v_words, FP8, OPERAND, NATIVE)
        even_part = tl.dot(weights, v_even, input_precision="ieee") * largest
        odd_part = tl.dot(weights, v_odd, input_precision="ieee") * largest
        l_i, l_lost = _add_rescaled(l_i, alpha, tl.sum(p, 1), l_lost, COMPENSATED)
        even, even_lost = _add_rescaled(even, alpha[:, None], even_part, even_lost, COMPENSATED)
        odd, odd_lost = _add_rescaled(odd, alpha[:, None], odd_part, odd_lost, COMPENSATED)
    return m_i, l_i, tl.interleave(even, odd)
