"""Fields of configurations that shrinking by name gets wrong, by model_type: what has to fit something else."""

from __future__ import annotations

from typing import Any

ATTENTION, SLIDING, LINEAR, HYBRID, CONV = "full_attention", "sliding_attention", "linear_attention", "hybrid", "conv"


def layers(*kinds: str) -> dict[str, Any]:
    return {"layer_types": list(kinds), "num_hidden_layers": len(kinds)}


def rope(theta: float, *sections: int) -> dict[str, Any]:
    """RoPE over several axes of positions."""
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections)}


OMNI_TOKENS = {
    "vision_start_token_id": 240,
    "vision_end_token_id": 241,
    "audio_start_token_id": 242,
    "audio_end_token_id": 243,
}
ZAMBA = {"attention_hidden_size": 128, "attention_head_dim": 32, "num_hidden_layers": 4}

GIVEN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "chameleon": {"vocabulary_map": {"<image>": 250}},
    "cohere_compass_text": {
        **layers(SLIDING, SLIDING, SLIDING, ATTENTION),
        "rope_parameters": {ATTENTION: rope(1e4, 3, 3, 2), SLIDING: rope(1e4, 3, 3, 2)},
    },
    "dbrx": {"attn_config": {"rope_theta": 5e5, "clip_qkv": 8}},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4, "n_group": 1},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 250, "<image>": 251}},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": rope(5e5, 3, 3, 2),
        "moe_intermediate_size": [32, 32],
        "moe_num_experts": 4,
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma3": {"mm_tokens_per_image": 4},
    "glm5_next_text": {"num_key_value_heads": 4, "index_kpool": 4, "index_topk": 8, "qk_rope_head_dim": 0},
    "granite4_vision": {"downsample_rate": "2/4", "deepstack_layer_map": [[1, 0]]},
    "granitemoehybrid": layers(LINEAR, ATTENTION, LINEAR, ATTENTION),
    "hunyuan_vl_text": {"rope_parameters": rope(1e4, 2, 2, 2, 2)},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": layers(CONV, CONV, ATTENTION, CONV),
    "lfm2_moe": layers(CONV, CONV, ATTENTION, CONV),
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minimax_m3_vl_text": {
        **layers(ATTENTION, "minimax_m3_sparse", "minimax_m3_sparse", "minimax_m3_sparse"),
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "index_local_blocks": 1,
        "index_n_heads": 2,
    },
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "qwen2_5_omni_thinker": OMNI_TOKENS,
    "qwen3_asr": {"eos_token_id": 254},
    "qwen3_omni_moe_thinker": OMNI_TOKENS,
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
    },
    "reformer": {"axial_pos_embds_dim": [32, 32]},
    "step3p5": {
        **layers(ATTENTION, SLIDING, SLIDING, ATTENTION),
        "sliding_window": 8,
        "num_sliding_attention_heads": 4,
    },
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**ZAMBA, "layers_block_type": [LINEAR, HYBRID, LINEAR, HYBRID]},
    "zamba2": {**ZAMBA, "layers_block_type": [LINEAR, LINEAR, HYBRID, LINEAR], "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
}
