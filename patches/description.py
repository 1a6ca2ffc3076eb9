"""A decoder layer described: what it computes, by the names of its modules.

A layer is branches, one after the other or side by side, whose results are added to the residual stream. Descriptions
are read from one run of a layer (`reading`), and name modules by their place in it (`Ref`): those of layers that are
alike are equal. `bind` puts a layer's own modules in the place of the names.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from torch import nn

from pkv_hf.routes.base import Rotary, Scores


class Ref(str):
    """A module by its name within its layer; in a description that is bound, the module itself stands in its place."""


class Held(str):
    """A parameter or buffer of a layer, by its place in it; the tensor itself in a description that is bound."""


@dataclass(frozen=True)
class Norm:
    """A normalisation over the last dimension by a module's `weight` and `bias`, where it has them."""

    module: Any
    kind: str
    """"rms" (Zhang & Sennrich 2019) or "layer" (Ba et al. 2016)."""
    eps: float
    offset: float = 0.0
    """What is added to the weight: those of Gemma and Nemotron are kept less 1."""

    @property
    def weight(self) -> Any:
        """That of the module, once bound; None for a norm without (OLMo)."""
        return getattr(self.module, "weight", None)


@dataclass(frozen=True)
class Attention:
    """Projections, norms of q and k, RoPE, attention over the cache, an output gate, the output projection."""

    module: Any
    inputs: tuple[Any, ...]
    """The projections to q, k and v, to q and to what k and v both are, or to all three side by side; to q alone where
    the layer `reads` the keys and values of another."""
    output: Any
    heads: int
    kv_heads: int
    head_dim: int
    scores: Scores
    rotary: Rotary
    norms: tuple[Norm, Norm] | None
    """Of q and of k: of each head alone where weights are of a head's size, else of all heads together. q's twice where
    the layer has no k."""
    v_norm: Norm | None
    """Of each head of v."""
    gated: bool
    """Whether q's projection gives each head a gate too, whose sigmoid multiplies the head's output."""
    keeps: tuple[str, Any] | None = None
    """The layer's argument, a mapping, and its key by which later layers find the keys and values of this one."""
    reads: tuple[str, Any] | None = None
    """Where the layer finds those of an earlier one."""
    sinks: Any = None
    """`Held`, by its place in the layer: of every head one more score, `[H_q]`. They are no part of `scores` here."""


@dataclass(frozen=True)
class MLP:
    """act(x G) * (x U) D, or act(x U) D where `gate` is None; gate and up may be one packed projection.

    Modules may be a module's, or the layer's own.
    """

    gate: Any
    up: Any
    """None where `gate` gives both side by side, the gate first."""
    down: Any
    activation: str
    """One of `kernels.reference.ACTIVATIONS`."""
    by: str = ""
    """The layer's argument that multiplies what is activated, `[B, q_len, intermediate]`; only without a gate."""


@dataclass(frozen=True)
class AsIs:
    """A module that is called as its layer calls it."""

    module: Any
    hidden: str
    """The argument that takes the hidden states; empty for the first by place."""
    handed_on: tuple[tuple[str, str], ...]
    """Arguments that are the layer's own: their names here and there."""
    constants: tuple[tuple[str, Any], ...]
    mixer: Any = None
    """A `mixers.Mixer` that takes steps of one token in the module's place, once bound."""


@dataclass(frozen=True)
class Branch:
    """hidden + scale * after(body(before(x))): x is hidden, or what came into the layer."""

    body: Attention | MLP | AsIs
    before: Norm | None
    after: Norm | None
    scale: float
    of_input: bool


@dataclass(frozen=True)
class Layer:
    branches: tuple[Branch, ...]
    returns: int = 0
    """Elements of the tuple that it returns, hidden states and nothing else; 0 where it returns those alone."""
    given: frozenset[str] = frozenset()
    """The arguments beside hidden states that it was given when it was read."""
    gain: Any = None
    """`Held`: what multiplies all that it returns, one element; None for nothing."""


def bind(described: Any, layer: nn.Module) -> Any:
    """A description, or a part of one, with a layer's modules in the place of their names."""
    if isinstance(described, Ref):
        return layer.get_submodule(described)
    if isinstance(described, Held):
        module, _, name = described.rpartition(".")
        return getattr(layer.get_submodule(module), name)
    if isinstance(described, tuple) and not hasattr(described, "_fields"):
        return tuple(bind(part, layer) for part in described)
    if is_dataclass(described) and not isinstance(described, type):
        return replace(
            described, **{field.name: bind(getattr(described, field.name), layer) for field in fields(described)}
        )
    return described
