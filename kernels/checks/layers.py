"""Random cases for the linear and the elementwise kernels, and their errors beside those of torch's own computation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from pkv_hf.kernels import elementwise, linear
from pkv_hf.kernels.checks.attention import log_uniform, poisoned_scratch, rms
from pkv_hf.kernels.reference import rms_norm

MARGIN = 64
"""Elements of NaN before and after every tensor that a kernel reads."""

EPS = (1e-5, 1e-6)


@dataclass(frozen=True)
class Result:
    """How far an output is from float64, and how far torch's computation in the same dtype is.

    Where an output has to be what torch's is, the latter is 0, and `error` counts the elements that differ.
    """

    error: float
    torch_error: float
    largest: float
    """The largest error of an element. `error` is the RMS, which hides one wrong element among many of a half type.

    Not taken in float32, where the RMS shows it, and the largest is how a device rounds exponentials and quotients.
    """
    torch_largest: float
    written: bool
    """All elements are finite: none kept the NaN that it held before."""

    @property
    def ratio(self) -> float:
        return max(_over(self.error, self.torch_error), _over(self.largest, self.torch_largest))


def _over(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else (math.inf if ours else 0.0)


def beside(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> Result:
    """The result of an output beside torch's, both judged by float64."""
    if not ours.numel():
        return Result(0.0, 0.0, 0.0, 0.0, True)
    errors = [(output - exact).abs() for output in (ours, theirs)]
    error, torch_error = map(rms, errors)
    largest, torch_largest = (0.0 if theirs.dtype == torch.float32 else float(each.max()) for each in errors)
    return Result(error, torch_error, largest, torch_largest, bool(torch.isfinite(ours).all()))


def same(ours: torch.Tensor, expected: torch.Tensor) -> Result:
    """The result of an output of which every element has to have the expected value."""
    return Result(float((ours != expected).sum()), 0.0, 0.0, 0.0, bool(torch.isfinite(ours).all()))


def pooled(results: Sequence[Result]) -> Result:
    """The result of an output over several draws of its case."""
    error, torch_error = (
        float(np.sqrt(np.mean(np.square(errors))))
        for errors in ([result.error for result in results], [result.torch_error for result in results])
    )
    return Result(
        error,
        torch_error,
        largest=max(result.largest for result in results),
        torch_largest=max(result.torch_largest for result in results),
        written=all(result.written for result in results),
    )


class Draw:
    """Draws the tensors of a case, each with NaN before and after it, off multiples of 16 bytes unless `aligned`."""

    def __init__(self, seed: int, dtype: torch.dtype, aligned: bool, device: torch.device | str) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.dtype, self.begin = dtype, MARGIN + (not aligned)

    def __call__(self, *shape: int, scale: float | torch.Tensor = 1.0) -> torch.Tensor:
        device, count = self.generator.device, math.prod(shape)
        memory = torch.full((2 * MARGIN + 1 + count,), float("nan"), dtype=self.dtype, device=device)
        drawn = torch.randn(shape, generator=self.generator, device=device) * scale
        return memory[self.begin : self.begin + count].view(shape).copy_(drawn)


def _varied(rng: np.random.Generator) -> dict[str, Any]:
    """What any case draws anew: the scale of its inputs, an epsilon, whether tensors are aligned, and a seed."""
    return {
        "scale": float(10 ** rng.uniform(-1, 1)),
        "eps": float(rng.choice(EPS)),
        "aligned": bool(rng.random() < 0.7),
        "seed": int(rng.integers(1 << 31)),
    }


def _width(rng: np.random.Generator, longest: int) -> int:
    """A width of up to `longest`; half of them multiples of 256, which blocks divide."""
    if longest >= 256 and rng.random() < 0.5:
        return 256 * log_uniform(rng, longest // 256)
    return log_uniform(rng, longest)


@dataclass(frozen=True)
class LinearCase:
    """A product of x `[rows, inputs]` with one weight or three, or SwiGLU of two where `gated`."""

    dtype: torch.dtype
    rows: int
    outputs: tuple[int, ...]
    gated: bool
    bias: bool
    norm: bool
    residual: bool
    inputs: int = 0
    scale: float = 1.0
    eps: float = EPS[0]
    aligned: bool = True
    seed: int = 0

    @classmethod
    def random(cls, rng: np.random.Generator, dtype: torch.dtype) -> LinearCase:
        """What is compiled for a case of the supported space; `vary` draws its sizes."""
        one_row, gated = rng.random() < 0.5, rng.random() < 0.3
        weights = 2 if gated else int(rng.choice([1, 3]))
        return cls(
            dtype,
            rows=1 if one_row else 2,
            outputs=(0,) * weights,
            gated=gated,
            bias=bool(not gated and rng.random() < 0.5),
            norm=bool(one_row and rng.random() < 0.6),
            residual=bool(weights == 1 and rng.random() < 0.5),
        )

    def vary(self, rng: np.random.Generator, longest: int) -> LinearCase:
        outputs = tuple(log_uniform(rng, longest) for _ in self.outputs)
        return dataclasses.replace(
            self,
            rows=1 if self.rows == 1 else int(rng.integers(2, linear.MAX_ROWS + 1)),
            inputs=_width(rng, longest),
            outputs=outputs[:1] * 2 if self.gated else outputs,
            **_varied(rng),
        )


def check_linear(case: LinearCase, device: torch.device | str) -> dict[str, Result]:
    """The result of `linear.linear`, or of `linear.swiglu` where the case is gated."""
    draw = Draw(case.seed, case.dtype, case.aligned, device)
    x = draw(case.rows, case.inputs, scale=case.scale)
    weights = [draw(count, case.inputs, scale=case.inputs**-0.5) for count in case.outputs]
    biases = [draw(count) if case.bias else None for count in case.outputs]
    norm = draw(case.inputs) if case.norm else None
    residual = draw(case.rows, *case.outputs) if case.residual else None

    def reference(dtype: torch.dtype) -> torch.Tensor:
        wide = x.to(dtype) if norm is None else rms_norm(x.to(dtype), norm.to(dtype), case.eps)
        products = [
            functional.linear(wide, weight.to(dtype), bias if bias is None else bias.to(dtype))
            for weight, bias in zip(weights, biases)
        ]
        if case.gated:
            return functional.silu(products[0]) * products[1]
        y = torch.cat(products, dim=1)
        return y if residual is None else y + residual.to(dtype)

    with poisoned_scratch():
        if case.gated:
            ours = linear.swiglu(x, *weights, norm=norm, eps=case.eps)
        else:
            ours = linear.linear(x, weights, biases, norm=norm, eps=case.eps, residual=residual)
    return {"out": beside(ours, reference(case.dtype), reference(torch.float64))}


@dataclass(frozen=True)
class ElementwiseCase:
    """RMSNorm of x `[rows, width]`, or of x + residual; or SwiGLU of two such where `gated`."""

    dtype: torch.dtype
    gated: bool
    residual: bool
    rows: int = 0
    width: int = 0
    scale: float = 1.0
    eps: float = EPS[0]
    aligned: bool = True
    seed: int = 0

    @classmethod
    def random(cls, rng: np.random.Generator, dtype: torch.dtype) -> ElementwiseCase:
        """What is compiled for a case of the supported space; `vary` draws its sizes."""
        gated = bool(rng.random() < 0.4)
        return cls(dtype, gated, residual=not gated and bool(rng.random() < 0.6))

    def vary(self, rng: np.random.Generator, longest: int) -> ElementwiseCase:
        return dataclasses.replace(self, rows=log_uniform(rng, 64), width=_width(rng, longest), **_varied(rng))


def check_elementwise(case: ElementwiseCase, device: torch.device | str) -> dict[str, Result]:
    """The results of `elementwise.rms_norm`, or of `elementwise.silu_mul` where the case is gated."""
    draw = Draw(case.seed, case.dtype, case.aligned, device)
    x = draw(case.rows, case.width, scale=case.scale)
    if case.gated:
        up = draw(case.rows, case.width, scale=case.scale)
        with poisoned_scratch():
            ours = elementwise.silu_mul(x, up)
        return {"out": beside(ours, functional.silu(x) * up, functional.silu(x.double()) * up.double())}
    weight = draw(case.width)
    residual = draw(case.rows, case.width) if case.residual else None
    with poisoned_scratch():
        ours, total = elementwise.rms_norm(x, weight, case.eps, residual)
    summed = x if residual is None else x + residual
    theirs, exact = (rms_norm(summed.to(dtype), weight.to(dtype), case.eps) for dtype in (case.dtype, torch.float64))
    return {"out": beside(ours, theirs, exact), "sum": same(total, summed)}
