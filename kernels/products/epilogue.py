"""What becomes of a product's float32 sums: activation, multiplier, residual or gate, and the sum of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.activations import activated, check_activation
from pkv_hf.kernels.launcher import Launcher
from pkv_hf.kernels.pdl import options, overlaps, release, wait

BLOCK = 512
"""Elements of a row that a program adds up."""


class Parts(NamedTuple):
    """A product with one weight whose inputs are cut: what its parts add up to is not rounded yet."""

    sums: torch.Tensor
    """Float32 `[parts, rows, outputs]`, without the bias."""
    bias: torch.Tensor | None
    """`[outputs]`, in the dtype that the product is rounded to."""


@triton.jit
def _round(y, out_ptr):
    """y rounded as the output's dtype has it, in float32."""
    return y.to(out_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def elements(first, COUNT: tl.constexpr, rows, n, outputs, column, width):
    """Where COUNT rows' outputs n of a weight are in out, from row `first`, and which of them there are."""
    m = first + tl.arange(0, COUNT)
    return m.to(tl.int64)[:, None] * width + (column + n)[None, :], (m < rows)[:, None] & (n < outputs)[None, :]


@triton.jit
def finish(y, residual, at, mask, out_ptr, scale,
           RESIDUAL: tl.constexpr, SCALED: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """Stores residual + scale * act(y) at the elements `at`."""
    if ACTIVATION is not None:
        y = activated(_round(y, out_ptr), ACTIVATION)
    if SCALED:
        y = _round(y, out_ptr) * scale
    if RESIDUAL:
        y = _round(y, out_ptr) + residual.to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish_gated(gate, up, at, mask, out_ptr, ACTIVATION: tl.constexpr):
    """Stores act(gate) * up at the elements `at`."""
    y = _round(activated(_round(gate, out_ptr), ACTIVATION), out_ptr) * _round(up, out_ptr)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_gated(gate, up, at, mask, rows, outputs, out_ptr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr):
    """Stores both sums of a part, in planes of their own, or else what `finish_gated` does."""
    if PARTS:
        tl.store(out_ptr + at, gate, mask=mask)
        tl.store(out_ptr + at + rows.to(tl.int64) * outputs, up, mask=mask)
    else:
        finish_gated(gate, up, at, mask, out_ptr, ACTIVATION)


@triton.jit
def added(parts_ptr, at, stride, mask, PARTS: tl.constexpr):
    """The parts' sum, in their order. ptxas leaves about five loads a thread in flight: more need more warps."""
    y = tl.load(parts_ptr + at, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        y += tl.load(parts_ptr + at + part * stride, mask=mask, other=0.0)
    return y


@triton.jit(do_not_specialize=["rows", "outputs_a", "outputs_b", "scale"])
def add_parts_kernel(parts_ptr, bias_a_ptr, bias_b_ptr, bias_c_ptr, residual_ptr, out_ptr,
                     rows, outputs_a, outputs_b, width, scale,
                     WEIGHTS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
                     ACTIVATION: tl.constexpr, GATED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
                     PDL: tl.constexpr):  # fmt: skip
    """The epilogue of parts `[PARTS, rows, width]`, `[PARTS, 2, rows, width]` where GATED; biases as the product has.

    WEIGHTS biases, one each; where GATED those of gate and up.
    """
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    mask = n < width
    bias = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        bias = tl.load(bias_a_ptr + n, mask=n < outputs_a, other=0.0).to(tl.float32)
        if WEIGHTS == 3:
            b = n - outputs_a
            bias += tl.load(bias_b_ptr + b, mask=(b >= 0) & (b < outputs_b), other=0.0).to(tl.float32)
            c = b - outputs_b
            bias += tl.load(bias_c_ptr + c, mask=(c >= 0) & mask, other=0.0).to(tl.float32)
    wait(PDL)
    release(PDL)
    at = row * width + n
    plane = rows.to(tl.int64) * width
    if GATED:
        gate = added(parts_ptr, at, 2 * plane, mask, PARTS) + bias
        up = added(parts_ptr, at + plane, 2 * plane, mask, PARTS)
        if BIAS:
            up += tl.load(bias_b_ptr + n, mask=mask, other=0.0).to(tl.float32)
        finish_gated(gate, up, at, mask, out_ptr, ACTIVATION)
    else:
        y = added(parts_ptr, at, plane, mask, PARTS) + bias
        residual = y
        if RESIDUAL:
            residual = tl.load(residual_ptr + at, mask=mask, other=0.0)
        finish(y, residual, at, mask, out_ptr, scale, RESIDUAL, SCALED, ACTIVATION)


def check_epilogue(weights: int, residual: torch.Tensor | None, activation: str | None) -> None:
    """Raises ValueError, naming the argument, where products of so many weights do not end with these."""
    if not 1 <= weights <= 3 or (weights > 1 and (residual is not None or activation is not None)):
        raise ValueError(f"{weights} weights: want one, or two or three without a residual or an activation")
    if activation is not None:
        check_activation(activation)
        if residual is not None:
            raise ValueError(f"activation={activation!r} with a residual: add it to the activation's result")


_add_parts = Launcher(add_parts_kernel, fp_fusion=True)


def add_parts(
    parts: torch.Tensor,
    out: torch.Tensor,
    biases: Sequence[torch.Tensor | None],
    outputs: Sequence[int],
    residual: torch.Tensor | None,
    scale: float,
    activation: str | None,
    gated: bool = False,
) -> None:
    """Writes out `[rows, width]`: the epilogue of parts `[parts, rows, width]`, `[parts, 2, rows, width]` where gated.

    A bias and a count of `outputs` a weight, biases all or none; the rest as in `linear.linear`.
    """
    rows, width = out.shape
    a, b, c = ((parts if bias is None else bias) for bias in (tuple(biases) * 3)[:3])
    weights = 3 if len(outputs) == 2 and not gated else len(outputs)  # of two the third has no outputs
    constants = (
        weights, biases[0] is not None, residual is not None, scale != 1.0, activation, gated, len(parts), BLOCK,
        overlaps(out.device),
    )  # fmt: skip
    _add_parts(
        (out.dtype, out.device, constants), (-(-width // BLOCK), rows, 1),
        (parts, a, b, c, out if residual is None else residual, out),
        (rows, outputs[0], outputs[min(1, len(outputs) - 1)], width, scale), constants,
        num_warps=4, **options(out.device),
    )  # fmt: skip
