"""Adapters of random cases, and in torch what they add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from pkv_hf.kernels import reference
from pkv_hf.kernels.checks.attention import log_uniform
from pkv_hf.kernels.products import adapters

if TYPE_CHECKING:
    from pkv_hf.kernels.checks.layers import Draw


def drawn_dtype(rng: np.random.Generator) -> torch.dtype | None:
    """Of a case's adapters; None, for none, in most cases."""
    return adapters.DTYPES[rng.integers(len(adapters.DTYPES))] if rng.random() < 0.4 else None


def drawn_ranks(rng: np.random.Generator, weights: int) -> tuple[tuple[int, ...], ...]:
    """Of one to three adapters for each of some weights, at least one."""
    counts = rng.integers(0, 4, weights)
    counts[rng.integers(weights)] += 1
    return tuple(tuple(log_uniform(rng, 80) for _ in range(count)) for count in counts)


def drawn_adapters(
    draw: Draw, inputs: int, outputs: Sequence[int], ranks: Sequence[Sequence[int]], dtype: torch.dtype | None
) -> list[list[adapters.Adapter]]:
    """Adapters of weights, none where there are no `ranks`."""
    return [
        [
            adapters.Adapter(
                draw(rank, inputs, scale=inputs**-0.5, dtype=dtype),
                draw(count, rank, scale=rank**-0.5, dtype=dtype),
                0.7,
            )
            for rank in of_weight
        ]
        for count, of_weight in zip(outputs, ranks or [()] * len(outputs))
    ]


def with_adapters(y: torch.Tensor, x: torch.Tensor, of_weight: Sequence[adapters.Adapter]) -> torch.Tensor:
    """`reference.adapted`, in float64 where y is."""
    exact = y.dtype == torch.float64
    given = [(a.double(), b.double(), scaling) if exact else (a, b, scaling) for a, b, scaling in of_weight]
    return reference.adapted(y, x, given)
