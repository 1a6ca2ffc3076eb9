"""Tiny models of families whose own layers run on pages, one for each thing that such layers ask of attention."""

from __future__ import annotations

import transformers

from tiny import COMMON, randomized

WINDOW = 24
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
SERVED: dict[str, tuple[str, str, dict]] = {
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {"head_dim": 32, "sliding_window": WINDOW, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 24},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"head_dim": 16, "sliding_window": WINDOW, "layer_types": ["sliding_attention", *["full_attention"] * 2]},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"sliding_window": WINDOW}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {"attention_multiplier": 0.3, "logits_scaling": 4.0}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"no_rope_layer_interval": 2}),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {"head_dim": 16}),
    "qwen2-moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {**EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3-moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**EXPERTS, "head_dim": 16}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4, "sliding_window": WINDOW}),
    "opt": ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt-oss": ("GptOssConfig", "GptOssForCausalLM", {**ROPE, "head_dim": 16, **SLIDING, "num_local_experts": 4}),
    "mimo": (
        "MiMoV2FlashConfig",
        "MiMoV2FlashForCausalLM",
        {**EXPERTS, **SLIDING, "head_dim": 32, "v_head_dim": 16, "n_routed_experts": 4, "moe_layer_freq": [0, 1, 1]},
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {"head_dim": 16, "attention_chunk_size": WINDOW, "no_rope_layers": [1, 0, 1], "num_local_experts": 4},
    ),
}


def build(config: str, model: str, settings: dict) -> transformers.PreTrainedModel:
    settings = {**COMMON, "tie_word_embeddings": False, **settings}
    built = randomized(getattr(transformers, model), getattr(transformers, config)(**settings))
    if "attn_logit_softcapping" in settings:
        built.set_attn_implementation("eager")  # caps scores, in all releases
    return built


def generate(model, inputs, new_tokens=40, **settings):
    return model.generate(
        **inputs, max_new_tokens=new_tokens, return_dict_in_generate=True, **{"do_sample": False, **settings}
    )
