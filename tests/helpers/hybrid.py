"""Tiny random models whose layers keep linear-attention states, beside pages, with K and V, or nothing of their own."""

from __future__ import annotations

import torch
import transformers

from tiny import COMMON, randomized

DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "head_dim": 16,
}  # fmt: skip
MAMBA = {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16}

HYBRIDS: dict[str, tuple[str, str, dict]] = {
    "delta": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {
        **DELTA, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    }),
    "convolution": ("Lfm2Config", "Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention", "conv"]}),
    "both in one": ("FalconH1Config", "FalconH1ForCausalLM", {
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16,
        "head_dim": 16,
    }),
    "shared": ("Gemma4TextConfig", "Gemma4ForCausalLM", {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "sliding_window": 24, "head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128, "num_global_key_value_heads": 2,
    }),
    "nothing": ("NemotronHConfig", "NemotronHForCausalLM", {
        **MAMBA, "layers_block_type": ["mlp", "linear_attention", "full_attention"], "head_dim": 16,
    }),
}  # fmt: skip
"""By what is particular about them: configuration, causal LM, settings."""


def hybrid(name: str, **overrides: object) -> transformers.PreTrainedModel:
    """A model by its name in `HYBRIDS`, fp32, in eval mode."""
    config_class, model_class, settings = HYBRIDS[name]
    config = getattr(transformers, config_class)(**{**COMMON, **settings, **overrides})
    return randomized(getattr(transformers, model_class), config)


def states(cache: object) -> list[torch.Tensor]:
    """The linear-attention states of a cache, layer by layer."""
    held = [getattr(layer, name, {}) for layer in cache.layers for name in ("conv_states", "recurrent_states")]  # type: ignore[attr-defined]
    return [tensor for by_state in held for tensor in by_state.values() if tensor is not None]
