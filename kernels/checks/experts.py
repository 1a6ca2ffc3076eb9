"""Random cases for the experts of a mixture, and their errors beside those of torch's own computation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from pkv_hf.kernels.checks.attention import log_uniform, poisoned_scratch
from pkv_hf.kernels.checks.layers import ACTIVATIONS, Draw, Result, beside
from pkv_hf.kernels.experts import experts, reference
from pkv_hf.kernels.experts.blocks import MAX_ROWS

MOST_EXPERTS, MOST_CHOICES = 128, 8

MOST_ELEMENTS = 1 << 25
"""Of a weight of all experts."""


@dataclass(frozen=True)
class ExpertsCase:
    """The choices of rows among experts: of any of them, or of one alone where `crowded`."""

    dtype: torch.dtype
    one_row: bool
    choices: int
    form: reference.Form
    bias: bool
    weights_dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype = torch.int64
    rows: int = 1
    count: int = 1
    hidden: int = 1
    width: int = 1
    crowded: bool = False
    scale: float = 1.0
    aligned: bool = True
    seed: int = 0

    @classmethod
    def random(cls, rng: np.random.Generator, dtype: torch.dtype) -> ExpertsCase:
        """What is compiled for a case of the supported space; `vary` draws its sizes."""
        transposed, clamped = bool(rng.random() < 0.5), bool(rng.random() < 0.4)
        if clamped:
            settings = [float(rng.choice(ways)) for ways in ((0.0, 2.0), (1.0, 1.702), (0.0, 1.0))]
            form = reference.Form(transposed, str(rng.choice(["halves", "interleaved"])), "silu", *settings)
        else:
            form = reference.Form(transposed, str(rng.choice(reference.LAYOUTS)), str(rng.choice(ACTIVATIONS)))
        return cls(
            dtype,
            one_row=bool(rng.random() < 0.4),
            choices=int(rng.integers(1, MOST_CHOICES + 1)),
            form=form,
            bias=bool(rng.random() < 0.5),
            weights_dtype=dtype if rng.random() < 0.5 else torch.float32,
            index_dtype=torch.int64 if rng.random() < 0.7 else torch.int32,
        )

    def vary(self, rng: np.random.Generator, longest: int) -> ExpertsCase:
        longest = max(2, longest // 4)  # of several experts, each as wide
        hidden = 7 + log_uniform(rng, longest)  # of few elements, the ratio of two errors is chance
        width = log_uniform(rng, longest)
        return dataclasses.replace(
            self,
            rows=1 if self.one_row else int(rng.integers(2, MAX_ROWS + 1)),
            count=log_uniform(rng, max(1, min(MOST_EXPERTS, MOST_ELEMENTS // (hidden * width)))),
            hidden=hidden,
            width=width,
            crowded=bool(rng.random() < 0.2),
            scale=float(10 ** rng.uniform(-1, 0.5)),
            aligned=bool(rng.random() < 0.7),
            seed=int(rng.integers(1 << 31)),
        )

    def stacked(self, draw: Draw) -> reference.Stacked:
        """The weights, drawn: results are about as large as inputs."""
        outputs = self.width * (1 if self.form.layout == "plain" else 2)

        def weight(outputs: int, inputs: int) -> torch.Tensor:
            shape = (inputs, outputs) if self.form.transposed else (outputs, inputs)
            return draw(self.count, *shape, scale=inputs**-0.5)

        return reference.Stacked(
            weight(outputs, self.hidden), weight(self.hidden, self.width),
            draw(self.count, outputs) if self.bias else None, draw(self.count, self.hidden) if self.bias else None,
            self.form,
        )  # fmt: skip

    def chosen(self, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        """Index and weights. Where there are enough experts a row's are different; else equal ones, and one number that
        is no expert's."""
        generator, device = draw.generator, draw.generator.device
        shape = self.rows, self.choices
        if self.crowded:
            index = torch.randint(self.count, (1, 1), generator=generator, device=device).expand(shape).clone()
        elif self.count >= self.choices:
            index = torch.rand(self.rows, self.count, generator=generator, device=device).argsort(1)[:, : self.choices]
        else:
            index = torch.randint(self.count + 1, shape, generator=generator, device=device)
        weights = torch.rand(shape, generator=generator, device=device) + 0.1
        return index.to(self.index_dtype).contiguous(), weights.to(self.weights_dtype)


def check_experts(case: ExpertsCase, device: torch.device | str) -> dict[str, Result]:
    """The result of `experts.experts`: `out`."""
    draw = Draw(case.seed, case.dtype, case.aligned, device)
    of = case.stacked(draw)
    x, (index, weights) = draw(case.rows, case.hidden, scale=case.scale), case.chosen(draw)
    chosen = torch.zeros(case.count, dtype=torch.bool, device=device)
    chosen[index[index < case.count].long()] = True
    for tensor in of.tensors:
        if tensor is not None:
            tensor[~chosen] = float("nan")  # experts that nobody chose are not read
    with poisoned_scratch():
        ours = experts.experts(x, index, weights, of)
    theirs, exact = (reference.experts(x.to(dtype), index, weights, of) for dtype in (case.dtype, torch.float64))
    return {"out": beside(ours, theirs, exact)}
