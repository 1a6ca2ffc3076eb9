"""The small operations of a decoder layer, each in one launch: norms with the residual, and activations.

All round as `kernels.reference` does, which is as transformers does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.activations import activated, check_activation
from pkv_hf.kernels.launch import next_power_of_2
from pkv_hf.kernels.launcher import Launcher
from pkv_hf.kernels.pdl import options, overlaps, release, wait
from pkv_hf.kernels.products.epilogue import Parts, added
from pkv_hf.kernels.reference import Norm

BLOCK = 1024
"""Elements of a row that a program of an activation takes."""


@triton.jit
def _normed(x, weight, bias, mask, width, eps,
            CENTERED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, OFFSET: tl.constexpr):  # fmt: skip
    """RMSNorm of a row x [BLOCK], LayerNorm where CENTERED; rounded once, but an RMSNorm's weight without offset."""
    wide = x.to(tl.float32)
    if CENTERED:
        wide = tl.where(mask, wide - tl.sum(wide, 0) / width, 0.0)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    if WEIGHT:
        weight = weight.to(tl.float32)
        if OFFSET != 0:
            weight += OFFSET
        elif not CENTERED:
            wide = wide.to(x.dtype).to(tl.float32)
        wide = weight * wide
    if BIAS:
        wide += bias.to(tl.float32)
    return wide.to(x.dtype)


@triton.jit
def _weight(ptr, d, mask, WANTED: tl.constexpr):
    """Of a norm, or a bias. No kernel writes it, so it is not waited for: it comes from memory while others run."""
    weight = tl.load(ptr + d, mask=mask) if WANTED else 0.0
    return weight


@triton.jit(do_not_specialize=["eps"])
def norm_kernel(x_ptr, residual_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr, width, stride_x, eps,
                RESIDUAL: tl.constexpr, CENTERED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
                OFFSET: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = row * width
    d = tl.arange(0, BLOCK)
    mask = d < width
    weight, bias = _weight(weight_ptr, d, mask, WEIGHT), _weight(bias_ptr, d, mask, BIAS)
    wait(PDL)
    release(PDL)
    x = tl.load(x_ptr + row * stride_x + d, mask=mask, other=0.0)
    if RESIDUAL:
        x = (x.to(tl.float32) + tl.load(residual_ptr + at + d, mask=mask, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + at + d, x, mask=mask)
    normed = _normed(x, weight, bias, mask, width, eps, CENTERED, WEIGHT, BIAS, OFFSET)
    tl.store(out_ptr + at + d, normed, mask=mask)


@triton.jit(do_not_specialize=["after_eps", "before_eps", "scale"])
def add_norms_kernel(y_ptr, bias_ptr, residual_ptr, after_ptr, before_ptr, gain_ptr, sum_ptr, out_ptr,
                     width, after_eps, before_eps, scale,
                     PARTS: tl.constexpr, BIAS: tl.constexpr,
                     AFTER: tl.constexpr, AFTER_WEIGHT: tl.constexpr, AFTER_OFFSET: tl.constexpr,
                     BEFORE: tl.constexpr, BEFORE_WEIGHT: tl.constexpr, BEFORE_OFFSET: tl.constexpr,
                     SCALED: tl.constexpr, GAIN: tl.constexpr,
                     BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y is float32 `[PARTS, rows, width]`, or rows as the residual's where PARTS is 0."""
    at = tl.program_id(0).to(tl.int64) * width
    d = tl.arange(0, BLOCK)
    mask = d < width
    after, before = _weight(after_ptr, d, mask, AFTER_WEIGHT), _weight(before_ptr, d, mask, BEFORE_WEIGHT)
    bias = _weight(bias_ptr, d, mask, BIAS)
    gain = _weight(gain_ptr, 0, None, GAIN)
    wait(PDL)
    release(PDL)
    residual = tl.load(residual_ptr + at + d, mask=mask, other=0.0)  # loads do not pass a sum over threads
    if PARTS > 0:
        y = added(y_ptr, at + d, tl.num_programs(0).to(tl.int64) * width, mask, PARTS)
        if BIAS:
            y += bias.to(tl.float32)
        y = y.to(residual.dtype)
    else:
        y = tl.load(y_ptr + at + d, mask=mask, other=0.0)
    if AFTER:
        y = _normed(y, after, after, mask, width, after_eps, False, AFTER_WEIGHT, False, AFTER_OFFSET)
    if SCALED:
        y = (y.to(tl.float32) * scale).to(y.dtype)
    y = (y.to(tl.float32) + residual.to(tl.float32)).to(y.dtype)
    if GAIN:
        y = (y.to(tl.float32) * gain.to(tl.float32)).to(y.dtype)
    tl.store(sum_ptr + at + d, y, mask=mask)
    if BEFORE:
        y = _normed(y, before, before, mask, width, before_eps, False, BEFORE_WEIGHT, False, BEFORE_OFFSET)
        tl.store(out_ptr + at + d, y, mask=mask)


@triton.jit
def act_kernel(x_ptr, up_ptr, out_ptr, width, stride_x, stride_up,
               ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    wait(PDL)
    release(PDL)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    mask = d < width
    x = tl.load(x_ptr + row * stride_x + d, mask=mask, other=0.0)
    y = activated(x.to(tl.float32), ACTIVATION).to(x.dtype)
    if GATED:
        up = tl.load(up_ptr + row * stride_up + d, mask=mask, other=0.0).to(tl.float32)
        y = (y.to(tl.float32) * up).to(x.dtype)
    tl.store(out_ptr + row * width + d, y, mask=mask)


_norm = Launcher(norm_kernel, fp_fusion=False)
_add_norms = Launcher(add_norms_kernel, fp_fusion=False)
_act = Launcher(act_kernel, fp_fusion=False)


def row_stride(name: str, x: torch.Tensor) -> int:
    """Elements from a row of x `[..., width]` to the next; raises ValueError where they are not one number."""
    if x.is_contiguous():
        return x.shape[-1]
    shape, strides = x.shape, x.stride()
    if strides[-1] == 1 and all(strides[i] == strides[i + 1] * shape[i + 1] for i in range(x.ndim - 2)):
        return strides[-2]
    raise ValueError(f"{name} is {list(shape)} with strides {strides}: want contiguous rows, all as far apart")


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm (Zhang & Sennrich 2019) of x, or of x + residual, over the last dimension, times `offset + weight`.

    x and residual are `[..., width]` in the dtype of weight `[width]`; residual is contiguous, x may be columns of a
    wider tensor. Returns the norm, contiguous, and what was normed. Raises ValueError for x of any other strides.
    """
    return _normalised(x, weight, None, eps, residual, centered=False, offset=offset)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm (Ba et al. 2016), with weight and bias `[width]` where there are such; else as `rms_norm`."""
    return _normalised(x, weight, bias, eps, residual, centered=True, offset=offset)


def _normalised(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float,
    residual: torch.Tensor | None, *, centered: bool, offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    constants = (
        residual is not None, centered, weight is not None, bias is not None, offset, next_power_of_2(width),
    )  # fmt: skip
    _norm(
        (x.dtype, x.device, *constants), (x.numel() // width, 1, 1),
        tuple(x if each is None else each for each in (x, residual, weight, bias, total, out)),
        (width, row_stride("x", x), eps), (*constants, overlaps(x.device)),
        num_warps=8 if width > 2048 else 4, **options(x.device),
    )  # fmt: skip
    return out, total


NO_NORM = (None, 0.0, 0.0)


def add_norms(
    y: torch.Tensor | Parts,
    residual: torch.Tensor,
    after: Norm | None,
    before: Norm | None,
    *,
    scale: float = 1.0,
    gain: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """total = gain * (residual + scale * after(y)), and before(total); where a norm is None, what it would be of.

    y and residual `[..., width]`, contiguous, in one dtype. Or y is a product in parts, residual `[rows, width]`: the
    parts are summed in their order, in float32, then the bias, and rounded to residual's dtype. A norm is an RMSNorm:
    its weight `[width]` in that dtype or None, its epsilon, and what is added to its weight. gain is `[1]`,
    in that dtype. Returns both.
    """
    width = residual.shape[-1]
    total = torch.empty_like(residual)
    out = total if before is None else torch.empty_like(residual)
    y, bias, parts = (y.sums, y.bias, len(y.sums)) if isinstance(y, Parts) else (y, None, 0)
    (after_weight, after_eps, after_offset), (before_weight, before_eps, before_offset) = (
        norm or NO_NORM for norm in (after, before)
    )
    constants = (
        parts, bias is not None, after is not None, after_weight is not None, after_offset, before is not None,
        before_weight is not None, before_offset, scale != 1.0, gain is not None, next_power_of_2(width),
    )  # fmt: skip
    vectors = bias, residual, after_weight, before_weight, gain
    _add_norms(
        (residual.dtype, residual.device, *constants), (residual.numel() // width, 1, 1),
        (y, *(residual if each is None else each for each in vectors), total, out),
        (width, after_eps, before_eps, scale), (*constants, overlaps(residual.device)),
        num_warps=8 if parts or width > 2048 else 4, **options(residual.device),
    )  # fmt: skip
    return total, out


def act(x: torch.Tensor, activation: str) -> torch.Tensor:
    """An activation by name (`kernels.reference.ACTIVATIONS`) of x `[..., width]`, which may be columns of a wider one.

    Returns it contiguous. Raises ValueError for an activation or strides that the kernel does not take.
    """
    return _activate(x, None, activation)


def act_mul(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up, of one shape and dtype; else as `act`. Both may be halves of one `[rows, 2 * width]`."""
    return _activate(gate, up, activation)


def _activate(x: torch.Tensor, up: torch.Tensor | None, activation: str) -> torch.Tensor:
    check_activation(activation)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    device, width, up_ = x.device, x.shape[-1], x if up is None else up
    stride_x, stride_up = row_stride("x", x), row_stride("up", up_)
    if stride_x == stride_up == width:  # one row of all
        width = stride_x = stride_up = x.numel()
    constants = activation, up is not None, BLOCK
    _act(
        (x.dtype, device, *constants), (-(-width // BLOCK), x.numel() // width, 1), (x, up_, out),
        (width, stride_x, stride_up), (*constants, overlaps(device)), num_warps=4, **options(device),
    )  # fmt: skip
    return out
