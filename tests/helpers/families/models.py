"""The families: a tiny random model of each, with every kind of layer that the family has."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import Gemma4VisionConfig, PreTrainedModel

from pkv_hf.bench.model_types.building import build
from pkv_hf.bench.model_types.cases import all_cases
from pkv_hf.bench.model_types.shrinking import shrink

QUIET = 0.2
"""The embeddings' share of what they were, or models with tied ones repeat their last token whatever they attend to."""


@dataclass(frozen=True)
class Family:
    class_name: str
    model_type: str
    variant: str = ""
    """A variant of `pkv_hf.bench.model_types`."""
    fields: dict[str, Any] = field(default_factory=dict)
    """What the default sizes do not show."""


HYBRIDS = {
    "qwen3.5": Family("Qwen3_5ForCausalLM", "qwen3_5_text"),
    "qwen3.5-moe": Family("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text"),
    "qwen3-next": Family("Qwen3NextForCausalLM", "qwen3_next", fields={"mlp_only_layers": [1]}),
    "granite-4": Family("GraniteMoeHybridForCausalLM", "granitemoehybrid"),
    "nemotron-h": Family("NemotronHForCausalLM", "nemotron_h"),
    "lfm2": Family("Lfm2ForCausalLM", "lfm2"),
    "lfm2-moe": Family("Lfm2MoeForCausalLM", "lfm2_moe"),
    "lfm3": Family("Lfm3ForCausalLM", "lfm3"),
    "jamba": Family("JambaForCausalLM", "jamba"),
    "bamba": Family("BambaForCausalLM", "bamba"),
    "olmo-hybrid": Family("OlmoHybridForCausalLM", "olmo_hybrid"),
    "recurrent-gemma": Family("RecurrentGemmaForCausalLM", "recurrent_gemma"),
    "falcon-h1": Family("FalconH1ForCausalLM", "falcon_h1"),
    "zaya": Family("ZayaForCausalLM", "zaya"),
    "zamba2": Family("Zamba2ForCausalLM", "zamba2"),
}
"""Layers with states of their own, beside layers that attend or in one layer with them."""

ASKING = {
    "gpt-oss": Family("GptOssForCausalLM", "gpt_oss"),
    "granite-swa": Family("GraniteSWAForCausalLM", "granite_swa"),
    "granite-moe-swa": Family("GraniteMoeSWAForCausalLM", "granitemoe_swa"),
    "mimo-v2": Family(
        "MiMoV2FlashForCausalLM",
        "mimo_v2_flash",
        fields={"head_dim": 48, "v_head_dim": 32, "swa_head_dim": 48, "swa_v_head_dim": 32},  # as 192 to 128
    ),
    "gemma2": Family("Gemma2ForCausalLM", "gemma2"),
    "gemma3n": Family("Gemma3nForCausalLM", "gemma3n_text", "shared K and V (all published)"),
    "gemma4-31b": Family("Gemma4ForCausalLM", "gemma4_text", "K as V (31B)"),
    "gemma4-26b": Family("Gemma4ForCausalLM", "gemma4_text", "experts, K as V (26B-A4B)"),
    "gemma4-e2b": Family("Gemma4ForCausalLM", "gemma4_text", "shared K and V (E2B, E4B)", {"global_head_dim": 32}),
    "llama4": Family("Llama4ForCausalLM", "llama4_text", fields={"interleave_moe_layer_step": 2}),
    "internlm3": Family("LlamaForCausalLM", "internlm3"),
}
"""Sinks, caps, heads of several sizes, values of another size, shared K and V, chunks; and a renamed one."""

TEXT = {**HYBRIDS, **ASKING}

VISION = {"vision_config": {"image_size": 64, "patch_size": 32}}
"""Four patches an image."""

WRAPPERS = {
    "qwen2.5-vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl",
        fields={"vision_config": {"window_size": 56, "fullatt_block_indexes": [1]}},
    ),
    "qwen3-vl": Family("Qwen3VLForConditionalGeneration", "qwen3_vl"),
    "qwen3-vl-moe": Family("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe"),
    "qwen3.5-vl": Family("Qwen3_5ForConditionalGeneration", "qwen3_5"),
    "glm4v": Family("Glm4vForConditionalGeneration", "glm4v"),
    "gemma3": Family("Gemma3ForConditionalGeneration", "gemma3"),
    "gemma4": Family(
        "Gemma4ForConditionalGeneration",
        "gemma4",
        fields={
            "text_config": {"global_head_dim": 32, "use_bidirectional_attention": "vision"},
            "vision_config": shrink(
                Gemma4VisionConfig, {"pooling_kernel_size": 2, "position_embedding_size": 16}, False
            ),
        },
    ),
    "mistral3": Family("Mistral3ForConditionalGeneration", "mistral3"),
    "ministral3": Family("Mistral3ForConditionalGeneration", "mistral3", "Ministral 3"),
    "internvl": Family("InternVLForConditionalGeneration", "internvl", "Qwen3 (InternVL 3.5)"),
    "llava": Family("LlavaForConditionalGeneration", "llava", fields=VISION),
    "llava-onevision": Family(
        "LlavaOnevisionForConditionalGeneration",
        "llava_onevision",
        fields={**VISION, "image_grid_pinpoints": [[64, 64]]},
    ),
    "molmo2": Family("Molmo2ForConditionalGeneration", "molmo2", fields={"image_patch_id": 250}),
    "paligemma": Family("PaliGemmaForConditionalGeneration", "paligemma", "Gemma 2 (PaliGemma 2)", VISION),
    "smolvlm": Family("SmolVLMForConditionalGeneration", "smolvlm"),
    "idefics3": Family("Idefics3ForConditionalGeneration", "idefics3"),
    "qwen2-audio": Family("Qwen2AudioForConditionalGeneration", "qwen2_audio"),
    "voxtral": Family(
        "VoxtralForConditionalGeneration",
        "voxtral",
        fields={"audio_token_id": 255, "audio_config": {"intermediate_size": 256, "max_source_positions": 16}},
    ),
}
"""A decoder of text in a model that takes images or sound."""

FAMILIES = {**TEXT, **WRAPPERS}


def family_model(name: str) -> PreTrainedModel:
    """A model of a family, float32, in eval mode: the same in every process."""
    of = FAMILIES[name]
    wanted = of.class_name, of.model_type, of.variant
    (case,) = (case for case in all_cases() if (case.class_name, case.model_type, case.variant) == wanted)
    model = build(replace(case, fields={**case.fields, **of.fields}))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(QUIET)
    return model
