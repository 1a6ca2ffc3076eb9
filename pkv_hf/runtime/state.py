"""What a patched model was asked for, what it has done, and what is known of it."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Hashable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch

from pkv_hf import compat
from pkv_hf.policy.choose import Decision
from pkv_hf.replaced import Replacements
from pkv_hf.runtime.captured.graphs import GraphMemories
from pkv_hf.runtime.captured.static import StaticStep
from pkv_hf.runtime.counts import Counts
from pkv_hf.runtime.evidence import Evidence
from pkv_hf.runtime.fusion import Fuses
from pkv_hf.runtime.prefix_cache.kept import Kept

OF_ONE_PROCESS = ("decision", "static_steps", "looked", "graph_memories", "compiled", "counts", "lock")
"""The fields of a `PatchState` that neither a copy nor a pickle takes over: addresses, graphs, streams and locks."""


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
    fusing: Fuses
    cuda_graphs: bool
    settings: dict[str, Any]
    """What `patch` was called with."""
    prefix_cache: Kept | None = None
    """Pages of past prompts; None where `patch` was asked for none."""
    replaced: Replacements = field(default_factory=Replacements)
    """What is set on the model's modules."""
    said: dict[str, str] = field(default_factory=dict)
    """Why calls were left to transformers, each reason once, whatever numbers are in it."""
    counts: Counts = field(default_factory=Counts)
    decision: Decision | None = None
    """On the last step's route."""
    static_steps: weakref.WeakSet[StaticStep] = field(default_factory=weakref.WeakSet)
    """The steps on static buffers of all caches, for `report`."""
    looked: object = None
    """The token of the look at which the last step on static buffers was asked for: steps of others are void."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held to walk over `static_steps` or to add one: a model may be called by several threads."""
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

    def say(self, reason: str) -> None:
        kind = re.sub(r"\d+", "", reason)
        if kind not in self.said:
            self.said[kind] = reason
            compat.logger.warning("pkv_hf: left to transformers' own path: %s", reason)
