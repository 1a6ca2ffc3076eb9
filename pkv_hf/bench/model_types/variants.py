"""Settings of published checkpoints that a model type's default configuration does not show."""

from __future__ import annotations

from typing import Any, NamedTuple

from pkv_hf.bench.model_types.given import ATTENTION, SLIDING, layers


class Variant(NamedTuple):
    model_type: str
    name: str
    """What is set, and the models that are published with it."""
    fields: dict[str, Any]
    """A part's configuration is given as its fields, or as the model type that it is of."""


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 16,
}
SHARED_KV = {**layers(*[SLIDING, ATTENTION] * 3), "num_kv_shared_layers": 2}
ONE_GLOBAL_HEAD = {
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
}
EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}

VARIANTS = (
    Variant("falcon", "ALiBi (Falcon RW)", {"alibi": True}),
    Variant("falcon", "new decoder (Falcon 40B)", {"new_decoder_architecture": True}),
    Variant(
        "gemma3n_text",
        "shared K and V (all published)",
        {
            **SHARED_KV,
            "intermediate_size": [96] * 6,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0, 0.0, 0.0],
        },
    ),
    Variant("gemma4_text", "shared K and V (E2B, E4B)", SHARED_KV),
    Variant("gemma4_text", "experts, K as V (26B-A4B)", {**ONE_GLOBAL_HEAD, **EXPERTS}),
    Variant("gemma4_text", "K as V (31B)", ONE_GLOBAL_HEAD),
    Variant(
        "gpt2",
        "scaled by the layer's index",
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    ),
    Variant(
        "granitemoehybrid",
        "attention alone (4.0 Micro)",
        {**layers(*[ATTENTION] * 4), "num_local_experts": 0, "num_experts_per_tok": 0},
    ),
    Variant("internvl", "Qwen3 (InternVL 3.5)", {"text_config": "qwen3"}),
    Variant("internvl", "Qwen3-MoE (InternVL 3.5)", {"text_config": "qwen3_moe"}),
    Variant("llama", "RoPE of Llama 3.1", {"rope_parameters": LLAMA3}),
    Variant("llava", "Mistral, Pixtral (Pixtral 12B)", {"text_config": "mistral", "vision_config": "pixtral"}),
    Variant("llava_next", "Mistral (LLaVA 1.6)", {"text_config": "mistral"}),
    Variant(
        "mimo_v2_flash",
        "values of another head size than keys (all published)",
        {"head_dim": 24, "v_head_dim": 16, "swa_head_dim": 24, "swa_v_head_dim": 16},
    ),
    Variant("minimax_m3_vl_text", "full attention alone", layers(*[ATTENTION] * 4)),
    Variant("mistral3", "Ministral 3", {"text_config": "ministral3"}),
    Variant("paligemma", "Gemma 2 (PaliGemma 2)", {"text_config": "gemma2"}),
    Variant(
        "phi3",
        "longrope (Phi-3.5, Phi-4-mini)",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
    ),
    Variant("phi3", "sliding window (Phi-3-mini)", {"sliding_window": 8}),
    Variant(
        "qwen2",
        "sliding layers",
        {
            "use_sliding_window": True,
            "max_window_layers": 2,
            "sliding_window": 8,
            **layers(ATTENTION, ATTENTION, SLIDING, SLIDING),
        },
    ),
    Variant("qwen3", "YaRN", {"rope_parameters": YARN}),
)
