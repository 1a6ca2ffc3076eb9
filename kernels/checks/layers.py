"""Random cases for the linear and the elementwise kernels, and their errors beside those of torch's own computation."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from pkv_hf.kernels import elementwise, linear, reference
from pkv_hf.kernels.checks.adapters import drawn_adapters, drawn_dtype, drawn_ranks, with_adapters
from pkv_hf.kernels.checks.attention import log_uniform, poisoned_scratch, rms
from pkv_hf.kernels.checks.scaled import HELD, UNITS, drawn_scaled, in_dtype
from pkv_hf.kernels.products import adapters
from pkv_hf.kernels.products.blocks import MOST_PARTS
from pkv_hf.kernels.products.epilogue import Parts
from pkv_hf.kernels.products.scales import OF_BLOCKS, OF_ROWS

MARGIN = 64
"""Elements of NaN before and after every tensor that a kernel reads."""

EPS = (1e-5, 1e-6)
OFFSETS = (0.0, 1.0)
MULTIPLIERS = (1.0, 0.22)
ACTIVATIONS = tuple(reference.ACTIVATIONS)


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

    def __call__(
        self, *shape: int, scale: float | torch.Tensor = 1.0, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.generator.device) * scale
        return self.copy(drawn, dtype or self.dtype)

    def copy(self, drawn: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A copy in such memory; before and after int8 is its largest value."""
        count, poison = drawn.numel(), float("nan") if dtype.is_floating_point else 127
        memory = torch.full((2 * MARGIN + 1 + count,), poison, dtype=dtype, device=drawn.device)
        return memory[self.begin : self.begin + count].view(drawn.shape).copy_(drawn)


def varied(rng: np.random.Generator) -> dict[str, Any]:
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
    """A product of x `[rows, inputs]` with one weight or three, or with gate and up where `gated`."""

    dtype: torch.dtype
    rows: int
    outputs: tuple[int, ...]
    gated: bool
    bias: bool
    norm: bool
    residual: bool
    activation: str | None = None
    offset: float = 0.0
    multiplier: float = 1.0
    lora_dtype: torch.dtype | None = None
    """Of adapters; None for none."""
    ranks: tuple[tuple[int, ...], ...] = ()
    """Of each weight's adapters."""
    held: torch.dtype | None = None
    """Of weights of 8 bits, with scales of rows in a unit or of blocks; None for weights in `dtype`."""
    scales_of: int = OF_ROWS
    unit: float = 1.0
    inputs: int = 0
    scale: float = 1.0
    eps: float = EPS[0]
    aligned: bool = True
    seed: int = 0

    @classmethod
    def random(cls, rng: np.random.Generator, dtype: torch.dtype) -> LinearCase:
        """What is compiled for a case of the supported space; `vary` draws its sizes."""
        one_row, gated = rng.random() < 0.5, rng.random() < 0.3
        weights = 2 if gated else int(rng.choice([1, 2, 3]))
        residual = bool(weights == 1 and rng.random() < 0.5)
        active = gated or (weights == 1 and not residual and rng.random() < 0.6)
        return cls(
            dtype,
            rows=1 if one_row else 2,
            outputs=(0,) * weights,
            gated=gated,
            bias=bool(rng.random() < 0.5),
            norm=bool(one_row and rng.random() < 0.6),
            residual=residual,
            activation=str(rng.choice(ACTIVATIONS)) if active else None,
            offset=float(rng.choice(OFFSETS)),
            multiplier=float(rng.choice(MULTIPLIERS)) if residual else 1.0,
            lora_dtype=drawn_dtype(rng),
            held=HELD[int(rng.integers(len(HELD)))],
            scales_of=int(rng.choice([OF_ROWS, OF_BLOCKS])),
            unit=float(rng.choice(UNITS)),
        )

    def vary(self, rng: np.random.Generator, longest: int) -> LinearCase:
        outputs = tuple(log_uniform(rng, longest) for _ in self.outputs)
        return dataclasses.replace(
            self,
            rows=1 if self.rows == 1 else int(rng.integers(2, linear.MAX_ROWS + 1)),
            inputs=_width(rng, longest),
            outputs=outputs[:1] * 2 if self.gated else outputs,
            ranks=drawn_ranks(rng, len(outputs)) if self.lora_dtype else (),
            **varied(rng),
        )


def check_linear(case: LinearCase, device: torch.device | str) -> dict[str, Result]:
    """The result of `linear.linear`, or of `linear.gated` where the case is: `out`."""
    draw = Draw(case.seed, case.dtype, case.aligned, device)
    x = draw(case.rows, case.inputs, scale=case.scale)
    scales = None
    if case.held is None:
        weights = [draw(count, case.inputs, scale=case.inputs**-0.5) for count in case.outputs]
    else:
        weights, scales = drawn_scaled(draw, case.outputs, case.inputs, case.held, case.scales_of, case.unit)
    biases = [draw(count) if case.bias else None for count in case.outputs]
    norm = draw(case.inputs) if case.norm else None
    residual = draw(case.rows, *case.outputs) if case.residual else None
    lora = drawn_adapters(draw, case.inputs, case.outputs, case.ranks, case.lora_dtype)

    def by_torch(dtype: torch.dtype) -> torch.Tensor:
        wide = x.to(dtype)
        if norm is not None:
            wide = reference.rms_norm(wide, norm.to(dtype), case.eps, case.offset)
        products = [
            functional.linear(wide, weight, bias if bias is None else bias.to(dtype))
            for weight, bias in zip(in_dtype(weights, scales, dtype), biases)
        ]
        products = [with_adapters(y, wide, of_weight) for y, of_weight in zip(products, lora)]
        if case.activation is not None:
            products[0] = reference.activation(products[0], case.activation)
        if case.gated:
            return products[0] * products[1]
        y = torch.cat(products, dim=1) * case.multiplier
        return y if residual is None else y + residual.to(dtype)

    settings: dict[str, Any] = {"norm": norm, "eps": case.eps, "offset": case.offset, "scales": scales}
    if case.ranks:
        settings["adapters"] = adapters.Adapters(lora)
    with poisoned_scratch():
        if case.gated:
            bias_gate, bias_up = biases
            assert case.activation is not None
            ours = linear.gated(x, *weights, case.activation, bias_gate=bias_gate, bias_up=bias_up, **settings)
        else:
            settings.update(residual=residual, scale=case.multiplier, activation=case.activation)
            ours = linear.linear(x, weights, biases, **settings)
    return {"out": beside(ours, by_torch(case.dtype), by_torch(torch.float64))}


@dataclass(frozen=True)
class ElementwiseCase:
    """A function of `elementwise` on rows `[rows, width]`, which are columns of wider ones where `strided`."""

    dtype: torch.dtype
    operation: str
    residual: bool = False
    weight: bool = True
    bias: bool = False
    offset: float = 0.0
    after: bool = False
    before: bool = False
    parts: int = 0
    multiplier: float = 1.0
    gain: bool = False
    activation: str = "silu"
    strided: bool = False
    rows: int = 0
    width: int = 0
    scale: float = 1.0
    eps: float = EPS[0]
    aligned: bool = True
    seed: int = 0

    @classmethod
    def random(cls, rng: np.random.Generator, dtype: torch.dtype) -> ElementwiseCase:
        """What is compiled for a case of the supported space; `vary` draws its sizes."""
        operation = str(rng.choice(["rms_norm", "layer_norm", "add_norms", "act", "act_mul"]))
        residual, weight, bias, after, before = (bool(draw < 0.6) for draw in rng.random(5))
        case = cls(dtype, operation, weight=weight)
        if operation.startswith("act"):
            return dataclasses.replace(case, activation=str(rng.choice(ACTIVATIONS)))
        if operation == "layer_norm":
            return dataclasses.replace(case, residual=residual, bias=bias)
        case = dataclasses.replace(case, offset=float(rng.choice(OFFSETS)))
        if operation == "rms_norm":
            return dataclasses.replace(case, residual=residual)
        multiplier, parts = float(rng.choice(MULTIPLIERS)), int(rng.choice([0, 0, 2, 5, MOST_PARTS]))
        return dataclasses.replace(
            case, after=after, before=before, multiplier=multiplier, gain=residual, parts=parts, bias=bias and parts > 0
        )

    def vary(self, rng: np.random.Generator, longest: int) -> ElementwiseCase:
        return dataclasses.replace(
            self,
            rows=log_uniform(rng, 64),
            width=_width(rng, longest),
            strided=self.operation != "add_norms" and bool(rng.random() < 0.5),
            **varied(rng),
        )


def check_elementwise(case: ElementwiseCase, device: torch.device | str) -> dict[str, Result]:
    """The results of a function of `elementwise`: `out`, and what was normed as `sum`."""
    draw = Draw(case.seed, case.dtype, case.aligned, device)
    both = draw(case.rows, 2 * case.width, scale=case.scale)
    x, up = (half if case.strided else half.contiguous() for half in both.chunk(2, dim=-1))
    vectors = [draw(case.width) if case.weight else None for _ in range(2)]
    bias = draw(case.width) if case.bias else None
    gain = draw(1) if case.gain else None
    residual = up.contiguous() if case.residual else None
    parts = draw(case.parts, case.rows, case.width, scale=case.scale, dtype=torch.float32) if case.parts else None
    with poisoned_scratch():
        if case.operation == "act":
            ours = elementwise.act(x, case.activation)
        elif case.operation == "act_mul":
            ours = elementwise.act_mul(x, up, case.activation)
        elif case.operation == "layer_norm":
            ours, total = elementwise.layer_norm(x, vectors[0], bias, case.eps, residual)
        elif case.operation == "rms_norm":
            ours, total = elementwise.rms_norm(x, vectors[0], case.eps, residual, offset=case.offset)
        else:
            norms = _norms(case, vectors, case.dtype)
            y = x if parts is None else Parts(parts, bias)
            total, ours = elementwise.add_norms(y, up, *norms, scale=case.multiplier, gain=gain)

    def by_torch(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        wide, wide_up = x.to(dtype), up.to(dtype)
        if case.operation.startswith("act"):
            y = reference.activation(wide, case.activation)
            return (y if case.operation == "act" else y * wide_up), wide
        if case.operation == "add_norms":
            if parts is not None:
                wide = functools.reduce(torch.add, parts if dtype != torch.float64 else parts.double())
                wide = (wide if bias is None else wide + bias).to(dtype)
            by = gain if gain is None else gain.to(dtype)
            summed, y = reference.add_norms(wide, wide_up, *_norms(case, vectors, dtype), case.multiplier, by)
            return y, summed
        summed = (x + up if case.residual else x).to(dtype)
        weight, offset = (each if each is None else each.to(dtype) for each in (vectors[0], bias))
        if case.operation == "layer_norm":
            return reference.layer_norm(summed, weight, offset, case.eps), summed
        return reference.rms_norm(summed, weight, case.eps, case.offset), summed

    (theirs, their_sum), (exact, exact_sum) = by_torch(case.dtype), by_torch(torch.float64)
    results = {"out": beside(ours, theirs, exact)}
    if not case.operation.startswith("act"):
        results["sum"] = beside(total, their_sum, exact_sum) if case.after else same(total, their_sum)
    return results


def _norms(
    case: ElementwiseCase, vectors: Sequence[torch.Tensor | None], dtype: torch.dtype
) -> list[reference.Norm | None]:
    """The norms after and before of a case of `add_norms`, their weights in a dtype."""
    weights = [weight if weight is None else weight.to(dtype) for weight in vectors]
    return [
        (weight, case.eps, case.offset) if wanted else None
        for weight, wanted in zip(weights, (case.after, case.before))
    ]
