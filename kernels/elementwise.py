"""The small operations of a decoder layer, each in one launch: RMSNorm with the residual, and SwiGLU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.launch import next_power_of_2
from pkv_hf.kernels.launcher import Launcher
from pkv_hf.kernels.pdl import options, overlaps, release, wait


@triton.jit(do_not_specialize=["eps"])
def rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, sum_ptr, out_ptr, width, eps,
                    RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    release(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64) * width
    d = tl.arange(0, BLOCK)
    mask = d < width
    x = tl.load(x_ptr + row + d, mask=mask, other=0.0)
    if RESIDUAL:
        x = (x.to(tl.float32) + tl.load(residual_ptr + row + d, mask=mask, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + row + d, x, mask=mask)
    wide = x.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)).to(x.dtype)
    weight = tl.load(weight_ptr + d, mask=mask)
    tl.store(out_ptr + row + d, (weight.to(tl.float32) * normed.to(tl.float32)).to(x.dtype), mask=mask)


@triton.jit
def silu_mul_kernel(gate_ptr, up_ptr, out_ptr, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    release(PDL)
    wait(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (silu * up).to(gate.dtype), mask=mask)


_rms_norm, _silu_mul = Launcher(rms_norm_kernel, fp_fusion=False), Launcher(silu_mul_kernel, fp_fusion=False)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm (Zhang & Sennrich 2019) of x, or of x + residual, over the last dimension; rounds as transformers does.

    x and residual `[..., width]`, contiguous, in the dtype of weight `[width]`. Returns the norm and what was normed.
    """
    width = x.shape[-1]
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    constants = residual is not None, next_power_of_2(width)
    _rms_norm(
        (x.dtype, x.device, *constants), (x.numel() // width, 1, 1),
        (x, x if residual is None else residual, weight, total, out), (width, eps), (*constants, overlaps(x.device)),
        num_warps=8 if width > 2048 else 4, **options(x.device),
    )  # fmt: skip
    return out, total


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for contiguous tensors of one shape and dtype; rounds as transformers does."""
    out = torch.empty_like(gate)
    count, device = gate.numel(), gate.device
    _silu_mul(
        (gate.dtype, device), (-(-count // 1024), 1, 1), (gate, up, out), (count,), (1024, overlaps(device)),
        num_warps=4, **options(device),
    )  # fmt: skip
    return out
