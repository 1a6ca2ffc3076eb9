"""A patched model's state, and the names under which its modules hold it."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable, Hashable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from torch import nn

from pkv_hf.policy.choose import Decision
from pkv_hf.runtime.counts import Counts
from pkv_hf.runtime.evidence import ORIGINAL, Evidence
from pkv_hf.runtime.graphs import GraphMemories
from pkv_hf.runtime.static import Forward, StaticStep
from pkv_hf.runtime.watch import FORWARD

logger = logging.getLogger("pkv_hf")

NAME = "pkv_hf"
"""The name of our attention and mask functions in transformers' registries."""

OF_ONE_PROCESS = ("decision", "static_steps", "graph_memories", "compiled", "counts")
"""The fields of a `PatchState` that neither a copy nor a pickle takes over: addresses, graphs, streams and locks."""

STATE = "_pkv_hf_state"
"""The attribute of a patched model, and of its decoder, that holds the `PatchState`."""


@dataclass
class PatchState:
    """What one patched model was asked for and what it has done. What steps need is on their caches, not here."""

    route: str
    page_size: int
    kv_dtype: torch.dtype | str | None
    family: str
    """The model_type."""
    known: Evidence
    """What the gate and what follows it ask of the model."""
    original: dict[str, Any]
    """What was set on the decoder's own configuration when it was last looked at."""
    implementation: str
    """The attention implementation that the model had."""
    model: nn.Module
    """The causal LM itself, out of any wrapper."""
    fused_forward: Forward | None
    """The family's decode forward, None where transformers' own layers were asked for."""
    cuda_graphs: bool
    settings: dict[str, Any]
    """What `patch` was called with."""
    undo: list[Callable[[], None]] = field(default_factory=list)
    said: dict[str, str] = field(default_factory=dict)
    """Why calls were left to transformers, each reason once, whatever numbers are in it."""
    counts: Counts = field(default_factory=Counts)
    decision: Decision | None = None
    """On the last step's route."""
    static_steps: weakref.WeakSet[StaticStep] = field(default_factory=weakref.WeakSet)
    """The steps on static buffers of all caches, for `report`."""
    graph_memories: GraphMemories = field(default_factory=GraphMemories)
    compiled: set[Hashable] = field(default_factory=set)
    """Shapes of steps that ran before, so that a capture compiles and loads nothing."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in OF_ONE_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for own in fields(self):
            if own.name in OF_ONE_PROCESS:
                setattr(self, own.name, own.default if own.default_factory is MISSING else own.default_factory())

    def follow(self, config: Any) -> None:
        """Takes over into a patched decoder's configuration what has been set since on the one it was made from."""
        original = vars(getattr(config, ORIGINAL))
        changed = {key: value for key, value in original.items() if self.original.get(key, self) is not value}
        if changed:
            self.original |= changed
            changed.pop("_attn_implementation_internal", None)
            vars(config).update(changed)

    def say(self, reason: str) -> None:
        kind = re.sub(r"\d+", "", reason)
        if kind not in self.said:
            self.said[kind] = reason
            logger.warning("pkv_hf: left to transformers' own path: %s", reason)


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward that a module had before it was patched."""
    return getattr(module, FORWARD) or type(module).forward.__get__(module)


def original_implementation(config: Any) -> str:
    """The attention implementation that a patched decoder's model has, as its user set it."""
    return getattr(config, ORIGINAL)._attn_implementation
