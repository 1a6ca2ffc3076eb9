"""The floor of a decode step: the bytes that it has to read and write, whatever runs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pkv_hf.compat import decoder_of
from pkv_hf.memory.sizes import ModelSizes
from pkv_hf.memory.weights import step_weight_bytes, stored_bytes
from pkv_hf.patches.experts.described import DOWN, holds_experts

CHOICES = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk", "moe_top_k", "num_experts_per_token")
"""What configurations call the experts that a token takes."""


@dataclass(frozen=True)
class Floor:
    """Bytes of a decode step, over all rows."""

    weights: int
    """Of the decoder and the head; of the embedding table only where it is the head too, of experts those that any row
    is expected to choose."""
    kv: int
    """K and V of the tokens that can be attended to."""
    states: int
    """Linear-attention states, read and written."""

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.states

    @classmethod
    def of(cls, model: Any, lengths: Sequence[int], new_tokens: int, beams: int = 1) -> Floor:
        """Of a step of `generate()` on prompts of these lengths, K and V those of its middle step.

        A layer reads the last `window` tokens of each row, all of them where it has no window. Layers that read
        another's K and V count once, with that one. The prompt that the beams of a row share counts once. Rows choose
        their experts evenly and by themselves; where the configuration does not say how many, all count. Raises
        UnsupportedModelError for a model whose sizes are not known.
        """
        sizes = ModelSizes.of(model, None, None)
        kv = sum(
            layer.kv_heads * (layer.key_dim + layer.value_dim) * live_tokens(lengths, new_tokens, beams, layer.window)
            for layer in sizes.layers
        )
        states = 2 * sizes.states * len(lengths) * beams
        weights = step_weight_bytes(model) - unchosen_bytes(model, len(lengths) * beams)
        return cls(weights, kv * sizes.dtype.itemsize, states)


def unchosen_bytes(model: Any, rows: int) -> int:
    """Bytes of the experts that no row of a step is expected to choose."""
    decoder = decoder_of(model)
    choices = next((k for name in CHOICES if (k := getattr(decoder.config, name, None))), None)
    unchosen = 0.0
    for module in decoder.modules():
        if choices and holds_experts(module) and DOWN in module._parameters:
            count = len(module._parameters[DOWN])
            stacks = [stack for stack in module._parameters.values() if stack is not None and len(stack) == count]
            unchosen += sum(map(stored_bytes, stacks)) * (1 - min(choices, count) / count) ** rows
    return round(unchosen)


def live_tokens(lengths: Sequence[int], new_tokens: int, beams: int, window: int) -> int:
    """Tokens that a layer's queries attend to at the middle step, over all rows; `window` 0 is full attention."""
    halves = 2 * (window or sys.maxsize)  # counted in halves of a token, the middle may lie between two
    own = min(halves, new_tokens)
    return sum(min(2 * length, halves - own) + beams * own for length in lengths) // 2
