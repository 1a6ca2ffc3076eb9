"""Which layers of a decoder run fused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

FusedForward = Callable[[Any, Any, "dict[str, Any]"], Any]
"""step, hidden states `[B, q_len, width]`, the layer's other arguments by name -> hidden states."""


Product = Callable[[nn.Module, torch.Tensor], torch.Tensor]
"""A linear layer, x -> what the layer makes of x."""


def call(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)


class Fuses(Protocol):
    """Finds out what of a decoder's layers can be fused, and what they mix."""

    def mixes(self, decoder: Any) -> str:
        """What of a decoder's layers may mix the tokens of a prompt beside attention; empty for nothing."""
        ...

    def positions_are_places(self, decoder: Any) -> bool:
        """Whether a decoder that is given no positions takes every token's place in its row."""
        ...

    def __call__(self, decoder: Any, kinds: tuple[Any, ...], route: Any) -> Fusion:
        """Which layers of a decoder, that keep what `kinds` say, are fused in the steps of a route."""
        ...


@dataclass(frozen=True)
class Multiplied:
    """How many linear layers of fused layers multiply by our kernels and by their own forwards."""

    ours: Counter[str] = field(default_factory=Counter)
    """By how their weights are stored."""
    own: Counter[str] = field(default_factory=Counter)
    """By why."""


def nothing(rows: int, dtype: torch.dtype, device: torch.device) -> Multiplied:
    return Multiplied()


def no_reason(rows: int, device: torch.device) -> str:
    return ""


@dataclass(frozen=True)
class Mixtures:
    """The modules of stacked experts in a decoder."""

    forms: dict[nn.Module, Any] = field(default_factory=dict)
    """Those that our kernels run, and what these do: `kernels.experts.reference.Form`."""
    spread: dict[nn.Module, int] = field(default_factory=dict)
    """How many rows those are given for each row of a step, where they are more than one."""
    own: Counter[str] = field(default_factory=Counter)
    """How many run their own forward, by why."""
    routers: dict[nn.Module, Any] = field(default_factory=dict)
    """The modules beside them whose choice of experts our kernels make: `patches.experts.routers.Router`."""
    beside: dict[nn.Module, Any] = field(default_factory=dict)
    """The MLPs beside them that our products run: `patches.experts.beside.Beside`."""
    why_not: Callable[[int, torch.device], str] = no_reason
    """Why all do for so many rows on a device; empty where they do not."""


@dataclass
class Fusion:
    """The fused forwards of layers, and why other layers have none."""

    layers: dict[nn.Module, FusedForward] = field(default_factory=dict)
    norms: dict[nn.Module, Any] = field(default_factory=dict)
    """The decoder's own norms that are taken by our kernel: `patches.description.Norm`."""
    angles: dict[nn.Module, dict[str, Any]] = field(default_factory=dict)
    """Its modules whose angles of RoPE are our kernel's, for each kind of layers: `patches.around.angles.Angles`."""
    mixtures: Mixtures = field(default_factory=Mixtures)
    reasons: dict[str, int] = field(default_factory=dict)
    """How many layers run as they are, by why."""
    seconds: float = 0.0
    """That it took to find out."""
    product: Product = call
    """What a linear layer makes of hidden states, for the head."""
    multiplied: Callable[[int, torch.dtype, torch.device], Multiplied] = nothing
    """How the fused layers' linear layers multiply rows of hidden states of a dtype on a device."""
