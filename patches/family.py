"""What a model family is to this package."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A family whose attention is q, k, v projections, RoPE, attention, output projection.

    `prefix` is what the names of transformers' classes begin with.
    """

    model_type: str
    prefix: str
