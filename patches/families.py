"""The model families whose layers our kernels run whole."""

from __future__ import annotations

from torch import nn

from pkv_hf.patches.llama import LLAMA
from pkv_hf.patches.mistral import MISTRAL
from pkv_hf.patches.qwen import QWEN2, QWEN3
from pkv_hf.runtime.evidence import ServedLayers, served_layers

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3)


def served_by_us(model: nn.Module) -> ServedLayers:
    """What `patch` replaces in a model, of one of these families or not. Raises UnsupportedModelError for none."""
    return served_layers(model, FAMILIES)
