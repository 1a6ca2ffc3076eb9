"""What a model family is to this package."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A family whose attention is q, k, v projections, RoPE, attention, output projection.

    `attention_class` is the name of transformers' attention module.
    """

    model_type: str
    attention_class: str
