"""Writing new K and V into pages, alone or with RoPE on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.launch import Remembered, Scales, check_pages, check_scales, described, next_power_of_2
from pkv_hf.kernels.launcher import Launcher
from pkv_hf.kernels.pdl import options, overlaps, release, wait
from pkv_hf.kernels.quantize import LARGEST
from pkv_hf.kernels.rope import load_weights, rope_of, turned_head

NEAREST = tl.constexpr(12582912.0)
"""1.5 · 2^23: a float32 of at most 2^22 plus this, less this, is rounded to the nearest whole number, ties to even."""

RUNTIME = ["q_len", "num_heads", "num_kv_heads", "eps", "stride_tb"]
"""Arguments that Triton must not specialise on: lengths and counts change without a new compilation."""


@triton.jit
def slot_of(table_ptr, position, first_held, PAGE: tl.constexpr):
    """Page, slot and whether to write, of a position of the row that table_ptr is at."""
    write = position >= first_held
    page = tl.load(table_ptr + position // PAGE, mask=write, other=0).to(tl.int64)
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
def store_vector(pages_ptr, scales_ptr, d, x, mask, write, LARGEST: tl.constexpr):
    """The elements d of a vector x, shaped alike, to its slot in a page; quantised where LARGEST is not 0."""
    if LARGEST > 0:
        scale, divisor = _scale(tl.max(tl.abs(x)), LARGEST)
        tl.store(scales_ptr, scale, mask=write)
        x = _quantized(x, divisor, pages_ptr.dtype.element_ty)
    tl.store(pages_ptr + d, x, mask=mask)


@triton.jit(do_not_specialize=["q_len", "stride_tb"])
def append_kernel(k_ptr, v_ptr, k_pages_ptr, v_pages_ptr, k_scale_ptr, v_scale_ptr, table_ptr, first_ptr, ends_ptr,
                  q_len, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
                  stride_kpp, stride_kph, stride_vpp, stride_vph, stride_sp, stride_sh, stride_tb,
                  D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                  LARGEST: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    wait(PDL)
    release(PDL)
    t = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    position = tl.load(ends_ptr + row) - q_len + t
    page, slot, write = slot_of(table_ptr + row * stride_tb, position, tl.load(first_ptr + row), PAGE)
    d = tl.arange(0, BLOCK_D)
    mask = (d < D) & write
    t = t.to(tl.int64)
    scale_at = page * stride_sp + kv_head * stride_sh + slot
    k = tl.load(k_ptr + row * stride_kb + kv_head * stride_kh + t * stride_kt + d, mask=mask, other=0.0)
    at = k_pages_ptr + page * stride_kpp + kv_head * stride_kph + slot * D
    store_vector(at, k_scale_ptr + scale_at, d, k, mask, write, LARGEST)
    d = tl.arange(0, BLOCK_DV)
    mask = (d < DV) & write
    v = tl.load(v_ptr + row * stride_vb + kv_head * stride_vh + t * stride_vt + d, mask=mask, other=0.0)
    at = v_pages_ptr + page * stride_vpp + kv_head * stride_vph + slot * DV
    store_vector(at, v_scale_ptr + scale_at, d, v, mask, write, LARGEST)


@triton.jit(do_not_specialize=RUNTIME)
def rope_append_kernel(q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, q_out_ptr, k_pages_ptr,
                       v_pages_ptr, k_scale_ptr, v_scale_ptr, table_ptr, first_ptr, ends_ptr, q_len, num_heads,
                       num_kv_heads, eps,
                       stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
                       stride_vb, stride_vh, stride_vt, stride_cb, stride_ct,
                       stride_kpp, stride_kph, stride_vpp, stride_vph, stride_sp, stride_sh, stride_tb,
                       D: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr,
                       INTERLEAVED: tl.constexpr, PAIRED: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
                       WHOLE: tl.constexpr, LARGEST: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program a row, token and head: query heads first, then KV heads.

    WHOLE: norms are of all heads together, whose squares every program sums so many at a time; 0 for norms of a head.
    """
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    kv_head = head - num_heads
    norm_ptr = q_norm_ptr
    of_head = tl.zeros([1], tl.int64) + head
    if head >= num_heads:
        norm_ptr = k_norm_ptr
        of_head -= num_heads
    weights = load_weights(norm_ptr, of_head, of_head >= 0, D, BLOCK_D, ROTARY, INTERLEAVED, NORM, WHOLE)
    wait(PDL)
    release(PDL)
    cos = cos_ptr + row * stride_cb + t * stride_ct
    sin = sin_ptr + row * stride_cb + t * stride_ct
    if head < num_heads:
        q = turned_head(q_ptr + row * stride_qb + t * stride_qt, cos, sin, weights, of_head, num_heads, stride_qh, eps,
                        D, BLOCK_D, ROTARY, INTERLEAVED, PAIRED, NORM, OFFSET, WHOLE)  # fmt: skip
        tl.store(q_out_ptr + ((row * num_heads + head) * q_len + t) * D + d[None, :], q, mask=inside[None, :])
    else:
        v = tl.load(v_ptr + row * stride_vb + kv_head * stride_vh + t * stride_vt + d, mask=inside, other=0.0)
        end, first = tl.load(ends_ptr + row), tl.load(first_ptr + row)
        page, slot, write = slot_of(table_ptr + row * stride_tb, end - q_len + t, first, PAGE)
        k = turned_head(k_ptr + row * stride_kb + t * stride_kt, cos, sin, weights, of_head, num_kv_heads, stride_kh,
                        eps, D, BLOCK_D, ROTARY, INTERLEAVED, PAIRED, NORM, OFFSET, WHOLE)  # fmt: skip
        mask = inside & write
        scale_at = page * stride_sp + kv_head * stride_sh + slot
        at = k_pages_ptr + page * stride_kpp + kv_head * stride_kph + slot * D
        store_vector(at, k_scale_ptr + scale_at, d[None, :], k, mask[None, :], write, LARGEST)
        at = v_pages_ptr + page * stride_vpp + kv_head * stride_vph + slot * D
        store_vector(at, v_scale_ptr + scale_at, d, v, mask, write, LARGEST)


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
    states = {"q": q, "k": k, "v": v}
    held = {"block_table": block_table, "first_held": first_held, "ends": ends}
    rope = rope_of(k_pages, v_pages, states, cos, sin, held, norms, scales, rotary, interleaved, paired_angles)
    num_kv_heads = k.shape[1]
    out = torch.empty((rows, num_heads, q_len, head_dim), dtype=q.dtype, device=q.device)
    constants = (
        head_dim, k_pages.shape[2], next_power_of_2(head_dim), *rope.constants, LARGEST.get(k_pages.dtype, 0.0)
    )  # fmt: skip
    _rope_append(
        (*rope.kind, k_pages.dtype, q.device, *constants),
        (q_len, num_heads + num_kv_heads, rows),
        (q, k, v, *rope.tensors, out, k_pages, v_pages, *(scales or (k, k)), block_table, first_held, ends),
        (q_len, num_heads, num_kv_heads, rope.eps, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *rope.strides,
         *k_pages.stride()[:2], *v_pages.stride()[:2],
         *(scales[0].stride()[:2] if scales else (0, 0)), block_table.stride(0)),
        (*constants, overlaps(q.device)), num_warps=4 if rope.whole else 1, **options(q.device),
    )  # fmt: skip
    return out
