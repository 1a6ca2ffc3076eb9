"""A patched model's state, and the names under which its modules hold it."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable, Hashable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import ModelOutput

from pkv_hf.policy.choose import Decision
from pkv_hf.runtime.counts import Counts
from pkv_hf.runtime.graphs import GraphMemories
from pkv_hf.runtime.static import DecodeStep, Forward
from pkv_hf.runtime.watch import FORWARD, Watch

logger = logging.getLogger("pkv_hf")

NAME = "pkv_hf"
"""The name of our attention and mask functions in transformers' registries."""

ORIGINAL = "pkv_hf_original"
"""The attribute of a patched decoder's own configuration that holds the one it was made from."""

OF_ONE_PROCESS = ("decision", "watch", "decode_steps", "graph_memories", "compiled", "counts")
"""The fields of a `PatchState` that neither a copy nor a pickle takes over: addresses, graphs, streams and locks."""

STATE = "_pkv_hf_state"
"""The attribute of a patched model, and of its decoder, that holds the `PatchState`."""


class LayerShape(NamedTuple):
    """What the kernels of an attention layer depend on."""

    group: int
    """Query heads a KV head."""
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float
    """Scores are `softcap * tanh(scores / softcap)`; 0 for scores as they are."""


@dataclass
class PatchState:
    """What one patched model was asked for and what it has done. What steps need is on their caches, not here."""

    route: str
    page_size: int
    kv_dtype: torch.dtype | str | None
    family: str
    """The model_type."""
    prefix: str
    """What the names of the family's classes begin with; empty for a generic model."""
    windows: tuple[int, ...]
    """The sliding window of each attention layer in tokens, 0 for full attention, as the layers were made with."""
    shapes: set[LayerShape]
    """Of the attention layers; those of a generic model are seen in its first forward."""
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
    refused: str = ""
    """Why no call can be served, as the model's layers turned out; empty where calls can."""
    output_type: type[ModelOutput] | None = None
    """What the decoder returns where it has no more to say than hidden states; None until that is known."""
    said: dict[str, str] = field(default_factory=dict)
    """Why calls were left to transformers, each reason once, whatever numbers are in it."""
    counts: Counts = field(default_factory=Counts)
    decision: Decision | None = None
    """On the last step's route."""
    watch: Watch | None = None
    not_static: str = ""
    """Why decode steps do not run on static buffers, by the modules as `watch` found them; empty where they do."""
    decode_steps: weakref.WeakSet[DecodeStep] = field(default_factory=weakref.WeakSet)
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

    @property
    def generic(self) -> bool:
        """Of no family in `patches`: all that is known of its layers is what they ask of attention."""
        return not self.prefix

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
