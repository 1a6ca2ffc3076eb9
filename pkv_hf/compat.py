"""The one module that knows about transformers' versions and its less public names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module

from pkv_hf.errors import UnsupportedVersionError

OLDEST_TRANSFORMERS = "5.17.0"


def check_version() -> None:
    """Raises UnsupportedVersionError where transformers is older than the oldest release tested."""
    if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
        raise UnsupportedVersionError(
            f"transformers {transformers.__version__} is older than {OLDEST_TRANSFORMERS}, the oldest release that "
            f"pkv_hf works with: pip install 'transformers>={OLDEST_TRANSFORMERS}'"
        )


def layer_windows(config: PreTrainedConfig) -> list[int]:
    """The sliding window of every decoder layer in tokens, 0 for full attention.

    Raises ValueError where a layer keeps something else (recurrent states, an index, shared K and V).
    """
    text_config = config.get_text_config(decoder=True)
    if getattr(text_config, "attention_chunk_size", None) or "chunked_attention" in (
        getattr(text_config, "layer_types", None) or ()
    ):
        raise ValueError(
            f"{type(config).__name__} attends in chunks: pages hold full and sliding-window attention only"
        )
    windows = []
    for layer_idx, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) is DynamicSlidingWindowLayer:
            windows.append(int(layer.sliding_window))
        elif type(layer) is DynamicLayer:
            windows.append(0)
        else:
            raise ValueError(
                f"layer {layer_idx} of {type(config).__name__} keeps a {type(layer).__name__}: pages hold full and "
                "sliding-window attention only"
            )
    if not windows:
        raise ValueError(f"{type(config).__name__} names no decoder layers")
    return windows


def dynamic_rope(decoder: Any) -> str:
    """Why a decoder's RoPE cannot be captured: its frequencies follow the length. Empty where they do not."""
    kinds = getattr(decoder.rotary_emb, "rope_type", "default")
    kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
    moving = sorted(kind for kind in kinds if "dynamic" in kind or kind == "longrope")
    return f"rope_type {moving[0]!r} changes with the length" if moving else ""


def is_sharded(model: nn.Module) -> bool:
    """Whether several processes hold parts of a model: tensor parallelism, FSDP or DeepSpeed's ZeRO-3."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    tensor_parallel = (getattr(model, "tp_size", None) or 1) > 1
    return tensor_parallel or is_fsdp_managed_module(model) or is_deepspeed_zero3_enabled()


def register(name: str, attention: Callable, mask: Callable) -> None:
    """Registers an attention function and, without which it would lose the causal mask, its mask function."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def attention_function(name: str, module: nn.Module) -> Callable:
    """The attention function that transformers itself would call for an implementation's name."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return AttentionInterface().get_interface(name, eager)


def mask_function(name: str) -> Callable:
    return AttentionMaskInterface()[name]
