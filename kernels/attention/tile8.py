"""`attend_tiles` over pages of 8 bits: two neighbouring elements are one 16-bit word, unpacked into float16 operands.

Tensor cores want V by columns. Shared memory gives words of 16 bits so, but bytes one by one. A word's two elements
become two operands of half the width, an even and an odd one, for each of which there is a product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pkv_hf.kernels.attention.tile import add_compensated


@triton.jit
def _unpack(words, FP8: tl.constexpr, WIDE: tl.constexpr, NATIVE: tl.constexpr):
    """The lower and the upper bytes of words, each as WIDE; NATIVE by the conversions that a GPU has for float16."""
    if NATIVE and tl.float16 == WIDE:
        if FP8:
            low, high = tl.inline_asm_elementwise(
                "{ .reg .b16 a, b; .reg .b32 x, y; mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 x, a; "
                "cvt.rn.f16x2.e4m3x2 y, b; prmt.b32 $0, x, y, 0x5410; prmt.b32 $1, x, y, 0x7632; }",
                "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
        else:  # with its sign bit turned, a byte in the mantissa of 1024 is 1024 + 128 + its value
            low, high = tl.inline_asm_elementwise(
                "{ .reg .b32 x, y, bias; mov.b32 bias, 0x64806480; and.b32 x, $2, 0x00FF00FF; xor.b32 x, x, bias; "
                "sub.f16x2 $0, x, bias; shr.u32 y, $2, 8; and.b32 y, y, 0x00FF00FF; xor.b32 y, y, bias; "
                "sub.f16x2 $1, y, bias; }",
                "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
    elif FP8:
        low = (words & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(WIDE)
        high = ((words >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(WIDE)
    else:
        low = (words << 8 >> 8).to(WIDE)
        high = (words >> 8).to(WIDE)
    return low, high


@triton.jit
def attend_tiles_8bit(q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, start, end, q_len, window, first_tile,
                      num_tiles, scale_log2, stride_kp, stride_vp, stride_sp,
                      G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
                      FP8: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """`attend_tiles` where k_ptr and v_ptr point at words [..., D // 2], with their strides, and scales at the KV
    head's in page 0.

    Products are in float16 (float32 for queries of that type): 8-bit values are exact there, and queries of bfloat16
    are brought into its range by a power of two. K's scales multiply the scores. V's multiply the weights, as shares of
    the tile's largest, which multiplies the product: by themselves they would push weights into float16's subnormals.
    """
    WIDE: tl.constexpr = tl.float32 if q.dtype == tl.float32 else tl.float16
    COMPENSATED: tl.constexpr = q.dtype == tl.float32
    HALF: tl.constexpr = BLOCK_D // 2
    row_scale = tl.full([BLOCK_M], 1.0, tl.float32) * scale_log2
    if q.dtype == tl.bfloat16:
        peak = tl.max(tl.abs(q.to(tl.float32)), 1)
        power = tl.exp2(tl.floor(tl.log2(tl.where(peak > 0.0, peak, 1.0))))
        q = q.to(tl.float32) / power[:, None]
        row_scale *= power
    q_low, q_high = tl.split(tl.reshape(q.to(WIDE), [BLOCK_M, HALF, 2]))
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc_low = tl.zeros([BLOCK_M, HALF], tl.float32)
    acc_high = acc_low
    if COMPENSATED:
        l_lost = l_i
        lost_low = acc_low
        lost_high = acc_low
    d = tl.arange(0, HALF)
    positions = end - q_len + tl.arange(0, BLOCK_M) // G
    lowest = start
    if window > 0:
        lowest = tl.maximum(start, end - q_len - window + 1)
    n = first_tile * TOKENS + tl.arange(0, TOKENS)
    next_page = tl.load(table_ptr + n // PAGE, mask=(n >= lowest) & (n < end), other=0)
    for tile in tl.range(first_tile, first_tile + num_tiles, num_stages=STAGES):
        n = tile * TOKENS + tl.arange(0, TOKENS)
        live = (n >= lowest) & (n < end)
        page = next_page.to(tl.int64)
        after = n + TOKENS
        next_page = tl.load(table_ptr + after // PAGE, mask=after < end, other=0)
        slot = ((n % PAGE) * (D // 2)).to(tl.int64)
        scale_at = page * stride_sp + n % PAGE
        mask = live[:, None] & (d < D // 2)[None, :]
        words = tl.load(k_ptr + (page * stride_kp + slot)[:, None] + d[None, :], mask=mask, other=0)
        low, high = _unpack(words, FP8, WIDE, NATIVE)
        s = tl.dot(q_low, tl.trans(low), input_precision="ieee")
        s = tl.dot(q_high, tl.trans(high), s, input_precision="ieee")
        k_scale = tl.load(k_scale_ptr + scale_at, mask=live, other=0.0)
        s *= row_scale[:, None] * k_scale[None, :]
        seen = live[None, :] & (n[None, :] <= positions[:, None])
        if window > 0:
            seen = seen & (n[None, :] > positions[:, None] - window)
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # no token seen so far: exp2(-inf - 0) = 0, not NaN
        p = tl.exp2(s - m_safe[:, None])
        alpha = tl.exp2(m_i - m_safe)
        v_scale = tl.load(v_scale_ptr + scale_at, mask=live, other=0.0)
        largest = tl.max(v_scale, 0)
        weights = (p * (v_scale / tl.where(largest > 0.0, largest, 1.0))[None, :]).to(WIDE)
        words = tl.load(v_ptr + (page * stride_vp + slot)[:, None] + d[None, :], mask=mask, other=0)
        low, high = _unpack(words, FP8, WIDE, NATIVE)
        part_low = tl.dot(weights, low, input_precision="ieee") * largest
        part_high = tl.dot(weights, high, input_precision="ieee") * largest
        l_i = l_i * alpha
        acc_low = acc_low * alpha[:, None]
        acc_high = acc_high * alpha[:, None]
        if COMPENSATED:
            l_i, l_lost = add_compensated(l_i, tl.sum(p, 1), l_lost * alpha)
            acc_low, lost_low = add_compensated(acc_low, part_low, lost_low * alpha[:, None])
            acc_high, lost_high = add_compensated(acc_high, part_high, lost_high * alpha[:, None])
        else:
            l_i += tl.sum(p, 1)
            acc_low += part_low
            acc_high += part_high
        m_i = m_new
    return m_i, l_i, tl.interleave(acc_low, acc_high)
