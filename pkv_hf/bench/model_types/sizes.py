"""How large a tiny model is: sizes by the names of configurations' fields, which say one thing in many ways."""

from __future__ import annotations

VOCABULARY = 256
LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth",
    "num_decoder_layers", "num_encoder_layers", "num_blocks", "num_recurrent_layers",
)  # fmt: skip
"""Names of the number of layers; where a configuration has several, the first is the decoder's."""

_GROUPS: dict[int, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size text_vocab_size "
    "unpadded_vocab_size",
    512: "max_position_embeddings n_positions max_target_positions n_ctx seq_length max_seq_len max_sequence_length "
    "max_seq_length",
    128: "mamba_d_ssm",
    96: "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim dim_ff ffn_hidden_size block_ff_dim "
    "intermediate_size_mlp shared_intermediate_size mlp_hidden_size dense_intermediate_size dff "
    "expert_ffn_hidden_size d_ff",
    64: "hidden_size n_embd d_model dim embed_dim embedding_size out_hidden_size projection_dim word_embed_proj_dim "
    "dim_model output_hidden_size text_hidden_size cross_attention_hidden_size encoder_hidden_size embedding_dim "
    "adapter_in_dim adapter_out_dim adapter_input_size attention_hidden_size lru_width max_position_embeddings_vision "
    "max_source_positions encoder_hash_byte_group_vocab",
    32: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size moe_latent_size "
    "moe_shared_intermediate_size q_lora_rank kv_lora_rank",
    16: "head_dim global_head_dim v_head_dim swa_head_dim kv_channels attention_head_dim swa_v_head_dim attn_head_dim "
    "qk_nope_head_dim o_lora_rank index_head_dim linear_key_head_dim linear_value_head_dim mamba_head_dim mamba_d_head "
    "mamba_d_state ssm_state_size state_size mamba_chunk_size chunk_size mamba_headdim hidden_size_per_layer_input "
    "num_mel_bins",
    8: "qk_rope_head_dim rotary_dim sliding_window sliding_window_size local_attention attention_chunk_size "
    "window_size attention_window_size swa_window_size sliding_window_length index_topk mamba_num_heads mamba_n_heads "
    "mamba_dt_rank time_step_rank lora_rank laurel_rank",
    4: "num_attention_heads n_head num_heads decoder_attention_heads encoder_attention_heads n_heads "
    "swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts n_experts "
    "linear_num_value_heads num_global_attention_heads perceiver_num_latents num_latents resampler_n_latents",
    2: "num_key_value_heads num_kv_heads n_head_kv num_global_key_value_heads swa_num_key_value_heads "
    "attention_head_kv num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts moe_top_k "
    "num_selected_experts index_n_heads linear_num_key_heads mamba_expand expand altup_num_inputs",
    1: "n_group topk_group num_expert_group num_limited_groups n_shared_experts num_shared_experts "
    "moe_num_shared_experts first_k_dense_replace num_dense_layers moe_layer_start_index num_dense_first_layers "
    "mamba_ngroups mamba_n_groups n_groups n_mamba_heads num_hash_functions",
    0: "num_kv_shared_layers encoder_no_repeat_ngram_size",
}  # fmt: skip
SIZES = {name: size for size, names in _GROUPS.items() for name in names.split()}
"""Windows are shorter than the prompts, so that they slide; heads are grouped; experts are more than a token takes."""
