"""Which layers of a decoder run fused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

FusedForward = Callable[[Any, Any, "dict[str, Any]"], Any]
"""step, hidden states `[B, q_len, width]`, the layer's other arguments by name -> hidden states."""


@dataclass
class Fusion:
    """The fused forwards of layers, and why other layers have none."""

    layers: dict[nn.Module, FusedForward] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    """How many layers run as they are, by why."""
    seconds: float = 0.0
    """That it took to find out."""
