"""One step of a short causal convolution over channels, its state shifted in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.launch import next_power_of_2
from pkv_hf.kernels.launcher import Launcher
from pkv_hf.kernels.pdl import options, overlaps, release, wait
from pkv_hf.kernels.states.common import check, silu

BLOCK = 128
"""Channels of a program."""


@triton.jit(do_not_specialize=["channels", "stride_x"])
def convolution_kernel(x_ptr, weight_ptr, bias_ptr, state_ptr, out_ptr, channels, stride_x,
                       TAPS: tl.constexpr, BLOCK_TAPS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
                       GATED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    wait(PDL)
    release(PDL)
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    x_at = x_ptr + row * stride_x + c
    x = tl.load(x_at, mask=inside, other=0.0)
    if GATED:
        x = x.to(tl.float32) * tl.load(x_at + 2 * channels, mask=inside, other=0.0).to(tl.float32)
    x = x.to(state_ptr.dtype.element_ty)
    tap = tl.arange(0, BLOCK_TAPS)[None, :]
    at = c[:, None] * TAPS + tap
    state_at = state_ptr + row * channels * TAPS + at
    kept = tl.load(state_at + 1, mask=inside[:, None] & (tap < TAPS - 1), other=0.0)
    state = tl.where(tap == TAPS - 1, x[:, None], kept)
    tl.debug_barrier()  # a place may be read by another thread than writes it
    tl.store(state_at, state, mask=inside[:, None] & (tap < TAPS))
    weight = tl.load(weight_ptr + at, mask=inside[:, None] & (tap < TAPS), other=0.0)
    y = tl.sum(state.to(tl.float32) * weight.to(tl.float32), 1)
    if BIAS:
        y += tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        y = silu(y)
    if GATED:
        y *= tl.load(x_at + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * channels + c, y.to(out_ptr.dtype.element_ty), mask=inside)


_convolution = Launcher(convolution_kernel, fp_fusion=True)


def convolution(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    silu: bool = False,
    gated: bool = False,
) -> torch.Tensor:
    """The next output of a causal depthwise convolution of `taps` taps, and its state moved on by one token.

    x `[rows, channels]`, contiguous in a row; state `[rows, channels, taps]`, the last inputs, oldest first; weight
    `[channels, taps]`, bias `[channels]`. Returns `[rows, channels]` in x's dtype: the sum over taps of weight * state,
    + bias, its SiLU where `silu`. With `gated` x is `[rows, 3 * channels]`, b, c and x side by side: b * x goes in,
    c * the sum comes out (Liquid AI's LFM2). Raises ValueError for arguments that the kernel cannot take.
    """
    rows, channels, taps = state.shape
    whole: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]] = {
        "weight": (weight, (channels, taps)), "bias": (bias, (channels,)),
    }  # fmt: skip
    check({"x": (x, channels * (3 if gated else 1))}, whole, (state, (len(x), channels, taps)))
    out = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    constants = (taps, next_power_of_2(taps), bias is not None, silu, gated, BLOCK, overlaps(x.device))
    dtypes = (x.dtype, state.dtype, weight.dtype, None if bias is None else bias.dtype)
    _convolution(
        (*dtypes, x.device, *constants), (-(-channels // BLOCK), rows, 1),
        (x, weight, weight if bias is None else bias, state, out), (channels, x.stride(0)), constants,
        num_warps=4, **options(x.device),
    )  # fmt: skip
    return out
