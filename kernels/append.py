"""Writing new K and V into pages, alone or with RoPE on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.launch import (
    Remembered,
    Scales,
    check_angles,
    check_pages,
    check_rope,
    check_scales,
    described,
    next_power_of_2,
)
from pkv_hf.kernels.launcher import Launcher
from pkv_hf.kernels.pdl import options, overlaps, release, wait
from pkv_hf.kernels.quantize import LARGEST

NEAREST = tl.constexpr(12582912.0)
"""1.5 · 2^23: a float32 of at most 2^22 plus this, less this, is rounded to the nearest whole number, ties to even."""

SQUARED_AT_ONCE = 4096
"""Elements of all heads of a token whose squares are summed at a time: 32 registers of a thread."""

RUNTIME = ["q_len", "num_heads", "num_kv_heads", "eps", "stride_tb"]
"""Arguments that Triton must not specialise on: lengths and counts change without a new compilation."""


@triton.jit
def _slot(table_ptr, ends_ptr, first_ptr, row, t, q_len, stride_tb, PAGE: tl.constexpr):
    """Page, slot and whether to write, of a row's new token t."""
    position = tl.load(ends_ptr + row) - q_len + t
    write = position >= tl.load(first_ptr + row)
    page = tl.load(table_ptr + row * stride_tb + position // PAGE, mask=write, other=0).to(tl.int64)
    return page, position % PAGE, write


@triton.jit
def _scale(largest, LARGEST: tl.constexpr):
    """The scale of a vector by its largest magnitude, and what to divide by, as `kernels.quantize` has them."""
    scale = tl.div_rn(largest.to(tl.float32), LARGEST)
    return scale, tl.where(scale > 0, scale, 1.0)


@triton.jit
def _quantized(x, divisor, dtype: tl.constexpr):
    values = tl.div_rn(x.to(tl.float32), divisor)
    if dtype == tl.int8:
        values = (values + NEAREST) - NEAREST
    return values.to(dtype)


@triton.jit
def _store(pages_ptr, scales_ptr, d, x, mask, write, LARGEST: tl.constexpr):
    """A vector x [BLOCK_D] to its slot in a page, quantised where LARGEST is not 0."""
    if LARGEST > 0:
        scale, divisor = _scale(tl.max(tl.abs(x), 0), LARGEST)
        tl.store(scales_ptr, scale, mask=write)
        tl.store(pages_ptr + d, _quantized(x, divisor, pages_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(pages_ptr + d, x, mask=mask)


@triton.jit
def _store_pairs(pages_ptr, scales_ptr, first, second, a, b, mask, write, LARGEST: tl.constexpr):
    """`_store` of a vector in two parts [BLOCK_HALF], whose elements are at the places `first` and `second`."""
    if LARGEST > 0:
        scale, divisor = _scale(tl.maximum(tl.max(tl.abs(a), 0), tl.max(tl.abs(b), 0)), LARGEST)
        tl.store(scales_ptr, scale, mask=write)
        tl.store(pages_ptr + first, _quantized(a, divisor, pages_ptr.dtype.element_ty), mask=mask)
        tl.store(pages_ptr + second, _quantized(b, divisor, pages_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(pages_ptr + first, a, mask=mask)
        tl.store(pages_ptr + second, b, mask=mask)


@triton.jit(do_not_specialize=["q_len", "stride_tb"])
def append_kernel(k_ptr, v_ptr, k_pages_ptr, v_pages_ptr, k_scale_ptr, v_scale_ptr, table_ptr, first_ptr, ends_ptr,
                  q_len, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
                  stride_kpp, stride_kph, stride_vpp, stride_vph, stride_sp, stride_sh, stride_tb,
                  D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                  LARGEST: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    release(PDL)
    wait(PDL)
    t = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    page, slot, write = _slot(table_ptr, ends_ptr, first_ptr, row, t, q_len, stride_tb, PAGE)
    d = tl.arange(0, BLOCK_D)
    mask = (d < D) & write
    t = t.to(tl.int64)
    scale_at = page * stride_sp + kv_head * stride_sh + slot
    k = tl.load(k_ptr + row * stride_kb + kv_head * stride_kh + t * stride_kt + d, mask=mask, other=0.0)
    at = k_pages_ptr + page * stride_kpp + kv_head * stride_kph + slot * D
    _store(at, k_scale_ptr + scale_at, d, k, mask, write, LARGEST)
    d = tl.arange(0, BLOCK_DV)
    mask = (d < DV) & write
    v = tl.load(v_ptr + row * stride_vb + kv_head * stride_vh + t * stride_vt + d, mask=mask, other=0.0)
    at = v_pages_ptr + page * stride_vpp + kv_head * stride_vph + slot * DV
    _store(at, v_scale_ptr + scale_at, d, v, mask, write, LARGEST)


@triton.jit
def _product(x, y):
    """x y in float32, rounded to x's dtype unless y is float32."""
    product = x.to(tl.float32) * y.to(tl.float32)
    if y.dtype != tl.float32:
        product = product.to(x.dtype).to(tl.float32)
    return product


@triton.jit
def _pairs(d, HALF: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where the elements of pair d are in a head; the first ROTARY // 2 pairs are turned, neighbours left over."""
    if INTERLEAVED:
        first, second = 2 * d, 2 * d + 1
    elif ROTARY == 0 or ROTARY == 2 * HALF:
        first, second = d, HALF + d
    else:
        turned = d < ROTARY // 2
        first, second = tl.where(turned, d, 2 * d), tl.where(turned, ROTARY // 2 + d, 2 * d + 1)
    return first, second


@triton.jit
def _scaled(x, scale, weight, OFFSET: tl.constexpr):
    """A head's part x, normed by `scale`, times OFFSET + weight; rounded as `kernels.reference.rms_norm` does."""
    normed = x.to(tl.float32) * scale
    if OFFSET != 0:
        return (normed * (weight.to(tl.float32) + OFFSET)).to(x.dtype)
    else:
        return _product(normed.to(x.dtype), weight).to(x.dtype)


@triton.jit
def _mean_square(x_ptr, heads, stride_h, D: tl.constexpr, BLOCK: tl.constexpr):
    """Of all heads of a token together."""
    d = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for at in tl.range(0, heads * D, BLOCK):
        x = tl.load(x_ptr + (at + d) // D * stride_h + (at + d) % D, mask=at + d < heads * D, other=0.0).to(tl.float32)
        squares += x * x
    return tl.sum(squares, 0) / (heads * D)


@triton.jit
def _rotate(x_ptr, weight, weight2, cos_ptr, sin_ptr, d, first, second, mask, head, heads, stride_h, eps,
            NORM: tl.constexpr, OFFSET: tl.constexpr, HALF: tl.constexpr, ROTARY: tl.constexpr,
            INTERLEAVED: tl.constexpr, PAIRED: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """The elements at `first` and `second` of a head, normed and turned as `kernels.reference` does."""
    low = tl.load(x_ptr + first, mask=mask, other=0.0)
    high = tl.load(x_ptr + second, mask=mask, other=0.0)
    if ROTARY > 0:  # loaded before a norm's sum over threads, which loads do not pass
        if PAIRED:
            at, at2 = 2 * d, 2 * d + 1
        elif INTERLEAVED:
            at, at2 = d, d
        else:
            at, at2 = d, ROTARY // 2 + d
        turned = mask if ROTARY == 2 * HALF else mask & (d < ROTARY // 2)
        cos, cos2 = tl.load(cos_ptr + at, mask=turned), tl.load(cos_ptr + at2, mask=turned)
        sin, sin2 = tl.load(sin_ptr + at, mask=turned), tl.load(sin_ptr + at2, mask=turned)
    if NORM:
        if WHOLE > 0:
            scale = tl.rsqrt(_mean_square(x_ptr - head * stride_h, heads, stride_h, 2 * HALF, WHOLE) + eps)
        else:
            a, b = low.to(tl.float32), high.to(tl.float32)
            scale = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (2 * HALF) + eps)
        low = _scaled(low, scale, weight, OFFSET)
        high = _scaled(high, scale, weight2, OFFSET)
    if ROTARY > 0:
        a = _product(low, cos) - _product(high, sin)
        b = _product(high, cos2) + _product(low, sin2)
        a, b = a.to(low.dtype), b.to(low.dtype)
        low = a if ROTARY == 2 * HALF else tl.where(turned, a, low)
        high = b if ROTARY == 2 * HALF else tl.where(turned, b, high)
    return low, high


@triton.jit(do_not_specialize=RUNTIME)
def rope_append_kernel(q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, q_out_ptr, k_pages_ptr,
                       v_pages_ptr, k_scale_ptr, v_scale_ptr, table_ptr, first_ptr, ends_ptr, q_len, num_heads,
                       num_kv_heads, eps,
                       stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
                       stride_vb, stride_vh, stride_vt, stride_cb, stride_ct,
                       stride_kpp, stride_kph, stride_vpp, stride_vph, stride_sp, stride_sh, stride_tb,
                       D: tl.constexpr, PAGE: tl.constexpr, BLOCK_HALF: tl.constexpr, ROTARY: tl.constexpr,
                       INTERLEAVED: tl.constexpr, PAIRED: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
                       WHOLE: tl.constexpr, LARGEST: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program a row, token and head: query heads first, then KV heads.

    WHOLE: norms are of all heads together, whose squares every program sums so many at a time; 0 for norms of a head.
    """
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, BLOCK_HALF)
    inside = d < HALF
    first, second = _pairs(d, HALF, ROTARY, INTERLEAVED)
    kv_head = head - num_heads
    release(PDL)
    weight, weight2 = 0.0, 0.0
    if NORM:  # no kernel writes weights, so that they need not be waited for
        norm_ptr = q_norm_ptr
        of_head = head
        if head >= num_heads:
            norm_ptr = k_norm_ptr
            of_head = kv_head
        if WHOLE > 0:
            norm_ptr += of_head * D
        weight = tl.load(norm_ptr + first, mask=inside)
        weight2 = tl.load(norm_ptr + second, mask=inside)
    wait(PDL)
    cos = cos_ptr + row * stride_cb + t * stride_ct
    sin = sin_ptr + row * stride_cb + t * stride_ct
    if head < num_heads:
        q = q_ptr + row * stride_qb + head * stride_qh + t * stride_qt
        a, b = _rotate(q, weight, weight2, cos, sin, d, first, second, inside, head, num_heads, stride_qh, eps,
                       NORM, OFFSET, HALF, ROTARY, INTERLEAVED, PAIRED, WHOLE)  # fmt: skip
        out = q_out_ptr + ((row * num_heads + head) * q_len + t) * D
        tl.store(out + first, a, mask=inside)
        tl.store(out + second, b, mask=inside)
    else:
        v = v_ptr + row * stride_vb + kv_head * stride_vh + t * stride_vt
        v_low, v_high = tl.load(v + d, mask=inside, other=0.0), tl.load(v + HALF + d, mask=inside, other=0.0)
        page, slot, write = _slot(table_ptr, ends_ptr, first_ptr, row, t, q_len, stride_tb, PAGE)
        k = k_ptr + row * stride_kb + kv_head * stride_kh + t * stride_kt
        a, b = _rotate(k, weight, weight2, cos, sin, d, first, second, inside, kv_head, num_kv_heads, stride_kh, eps,
                       NORM, OFFSET, HALF, ROTARY, INTERLEAVED, PAIRED, WHOLE)  # fmt: skip
        mask = inside & write
        scale_at = page * stride_sp + kv_head * stride_sh + slot
        at = k_pages_ptr + page * stride_kpp + kv_head * stride_kph + slot * D
        _store_pairs(at, k_scale_ptr + scale_at, first, second, a, b, mask, write, LARGEST)
        at = v_pages_ptr + page * stride_vpp + kv_head * stride_vph + slot * D
        _store_pairs(at, v_scale_ptr + scale_at, d, HALF + d, v_low, v_high, mask, write, LARGEST)


_append, _rope_append = Launcher(append_kernel, fp_fusion=False), Launcher(rope_append_kernel, fp_fusion=False)
_checked: Remembered[None] = Remembered()


def append(
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor,
    first_held: torch.Tensor,
    ends: torch.Tensor,
    scales: Scales | None = None,
) -> None:
    """Writes k and v `[rows, H_kv, q_len, head_dim]` into pages, as each row's last q_len positions before `ends`.

    K and V may differ in head_dim. Positions before `first_held` (int32 `[rows]`) are in the null page and are left
    out. Quantised pages get the values and, in `scales`, the scales that `kernels.quantize` defines.

    Raises ValueError for arguments that the kernel cannot take.
    """
    key = described(k_pages, v_pages, k, v, block_table, first_held, ends, *(scales or ()))
    if key not in _checked:
        rows_tensors = {"block_table": block_table, "first_held": first_held, "ends": ends}
        check_pages(k_pages, v_pages, {"k": k}, {"v": v}, rows_tensors)
        check_scales(k_pages, v_pages, scales)
        if k.shape[:3] != v.shape[:3] or k.shape[1] != k_pages.shape[1]:
            raise ValueError(f"k is {list(k.shape)} and v {list(v.shape)}: want both with {k_pages.shape[1]} heads")
        _checked[key] = None
    rows, num_kv_heads, q_len, head_dim = k.shape
    dims, blocks = (head_dim, v.shape[3]), (next_power_of_2(head_dim), next_power_of_2(v.shape[3]))
    constants = *dims, k_pages.shape[2], *blocks, LARGEST.get(k_pages.dtype, 0.0)
    _append(
        (k.dtype, v.dtype, k_pages.dtype, k.device, *constants), (q_len, num_kv_heads, rows),
        (k, v, k_pages, v_pages, *(scales or (k, k)), block_table, first_held, ends),
        (q_len, *k.stride()[:3], *v.stride()[:3], *k_pages.stride()[:2], *v_pages.stride()[:2],
         *(scales[0].stride()[:2] if scales else (0, 0)), block_table.stride(0)),
        (*constants, overlaps(k.device)), num_warps=1, **options(k.device),
    )  # fmt: skip


def rope_append(
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    block_table: torch.Tensor,
    first_held: torch.Tensor,
    ends: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float, float] | None = None,
    scales: Scales | None = None,
    *,
    rotary: int | None = None,
    interleaved: bool = False,
    paired_angles: bool = False,
) -> torch.Tensor:
    """`append` with rotary embedding (Su et al. 2021, as `kernels.reference.rotate` defines it) of q and k before it.

    q `[rows, H_q, q_len, head_dim]` and k, v `[rows, H_kv, q_len, head_dim]` in any strides with contiguous head_dim.
    Of head_dim the first `rotary` elements are turned, an even number: None for all, 0 for none, where cos and sin may
    be None. cos and sin are `[1 or rows, q_len, rotary]`, both in q's dtype, or float32 where the result is rounded
    once; `interleaved` and `paired_angles` are as the reference has them. `norms` are the weights in q's dtype, the
    epsilon, and what is added to the weights, of an RMSNorm of q and of k before that: of every head, `[head_dim]`, or
    of all heads of each together, `[H_q * head_dim]` and `[H_kv * head_dim]`. Returns the rotated q, contiguous.

    Raises ValueError for arguments that the kernel cannot take.
    """
    rows, num_heads, q_len, head_dim = q.shape
    rotary = head_dim if rotary is None else rotary
    q_norm, k_norm, eps, offset = (q, k, 0.0, 0.0) if norms is None else norms
    held = {"block_table": block_table, "first_held": first_held, "ends": ends}
    key = rotary, *described(k_pages, v_pages, q, k, v, cos, sin, *held.values(), q_norm, k_norm, *(scales or ()))
    if key not in _checked:
        check_rope(k_pages, v_pages, {"q": q, "k": k, "v": v}, held, norms and norms[:2], scales)
        check_angles(q, {"cos": cos, "sin": sin}, rotary)
        _checked[key] = None
    num_kv_heads = k.shape[1]
    out = torch.empty((rows, num_heads, q_len, head_dim), dtype=q.dtype, device=q.device)
    if not rotary or cos is None or sin is None:
        cos = sin = q
        angles, strides = None, (0, 0)
    else:
        angles, strides = cos.dtype, (cos.stride(0) if len(cos) > 1 else 0, cos.stride(1))
    whole = norms is not None and max(q_norm.numel(), k_norm.numel()) > head_dim
    constants = (
        head_dim, k_pages.shape[2], next_power_of_2(head_dim // 2), rotary, interleaved, paired_angles,
        norms is not None, offset, min(next_power_of_2(q_norm.numel()), SQUARED_AT_ONCE) if whole else 0,
        LARGEST.get(k_pages.dtype, 0.0),
    )  # fmt: skip
    _rope_append(
        (q.dtype, k.dtype, v.dtype, angles, k_pages.dtype, q.device, *constants),
        (q_len, num_heads + num_kv_heads, rows),
        (q, k, v, cos, sin, q_norm, k_norm, out, k_pages, v_pages, *(scales or (k, k)), block_table, first_held, ends),
        (q_len, num_heads, num_kv_heads, eps, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides,
         *k_pages.stride()[:2], *v_pages.stride()[:2],
         *(scales[0].stride()[:2] if scales else (0, 0)), block_table.stride(0)),
        (*constants, overlaps(q.device)), num_warps=4 if whole else 1, **options(q.device),
    )  # fmt: skip
    return out
