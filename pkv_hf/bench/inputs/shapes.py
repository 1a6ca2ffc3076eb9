"""Shapes of published models by name, for models with random weights; each also small enough for a test.

Fields are those of the `config.json` in the hub repository that `source` names, where they differ from the defaults of
transformers' configuration. Special tokens are left out: no token ends a row.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip

SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": 1024, "num_hidden_layers": 4, "sliding_window": 40, "query_pre_attn_scalar": 64,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
"""What a small model has in the place of the fields that its shape has."""

SPREAD, SMALL_SPREAD = 0.1, 0.1
"""Of vectors around what they are, and of a small model's matrices."""


@dataclass(frozen=True)
class Shape:
    """A published model's configuration, and the class that `AutoModelForCausalLM` loads, or the one of the wrapper."""

    source: str
    model_class: str
    text: dict[str, Any]
    """Fields of the decoder's configuration."""
    vision: dict[str, Any] | None = None
    """Fields of the vision tower's, None for a model of text alone."""
    wrapper: dict[str, Any] = field(default_factory=dict)
    """Fields of the configuration around both."""
    small: dict[str, Any] = field(default_factory=dict)
    """The decoder's fields that a small model has beside `SMALL`."""
    small_vision: dict[str, Any] = field(default_factory=dict)
    small_wrapper: dict[str, Any] = field(default_factory=dict)

    def config(self, small: bool = False, **text: Any) -> Any:
        """transformers' configuration, with fields of the decoder's replaced by those that are given."""
        fields = dict(self.text)
        if small:
            fields |= {name: value for name, value in SMALL.items() if name in fields} | self.small
        fields |= {**text, "eos_token_id": None, "pad_token_id": 0}
        config_class = getattr(transformers, self.model_class).config_class
        if self.vision is None:
            return config_class(**fields)
        vision = self.vision | (self.small_vision if small else {})
        wrapper = self.wrapper | (self.small_wrapper if small else {})
        return config_class(text_config=fields, vision_config=vision, **wrapper)

    def build(self, dtype: torch.dtype, device: Any, small: bool = False, **text: Any) -> Any:
        """A model with random weights, in eval mode, made on the device in its dtype: nothing is copied or converted.

        A small model's matrices are larger than published ones, so that attention is sharp and its tokens wander.
        """
        config = self.config(small, **text)
        with torch.device(device):
            model = getattr(transformers, self.model_class)._from_config(config, dtype=dtype).eval()
        model.generation_config.update(eos_token_id=None, pad_token_id=0)
        _vary(model, SMALL_SPREAD if small else None)
        return model

    def drawn(self, dtype: torch.dtype, device: Any, small: bool = False) -> tuple[Any, dict[str, Drawn]]:
        """A model without weights, on the meta device, and its state dict, of tensors that are drawn when asked for."""
        model = self.build(dtype, "meta", small)
        return model, {name: Drawn(model, name, device, SMALL_SPREAD if small else None) for name in model.state_dict()}


class Drawn:
    """A parameter or buffer of a model without weights, by its name; what transformers' loader knows as slices."""

    def __init__(self, model: Any, name: str, device: Any, matrices: float | None) -> None:
        self.name = name
        place, _, self._own_name = name.rpartition(".")
        self._model, self._module = model, model.get_submodule(place)
        self._device, self._matrices = device, matrices

    def __getitem__(self, _: Any) -> torch.Tensor:
        """The tensor on the device: its module alone is made there, as transformers initialises it, and varied."""
        module = copy.copy(self._module)
        module.__dict__.update(_parameters=dict(module._parameters), _buffers=dict(module._buffers))
        module.to_empty(device=self._device, recurse=False)
        self._model._init_weights(module)
        _vary(module, self._matrices)
        return getattr(module, self._own_name).data


@torch.no_grad()
def _vary(model: torch.nn.Module, matrices: float | None) -> None:
    """Draws vectors (norms, biases, decays) around what they are: all ones and zeros would hide what reads them.

    Matrices get this spread if there is one; embeddings keep their own, or a tied head would repeat the last token.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.add_(torch.randn_like(parameter), alpha=SPREAD)
        elif matrices is not None and id(parameter) not in embeddings:
            parameter.normal_(0, matrices)


QWEN2_5_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6,
}  # fmt: skip

SHAPES: dict[str, Shape] = {
    "llama-3.1-8b": Shape(
        "meta-llama/Llama-3.1-8B",
        "LlamaForCausalLM",
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
            "rope_parameters": {**LLAMA3_ROPE, "factor": 8.0},
        },
    ),
    "llama-3.2-1b": Shape(
        "meta-llama/Llama-3.2-1B",
        "LlamaForCausalLM",
        {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072,
            "tie_word_embeddings": True, "rope_parameters": {**LLAMA3_ROPE, "factor": 32.0},
        },
    ),
    "gemma-3-4b": Shape(
        "google/gemma-3-4b-it",  # AutoModelForCausalLM loads it with its vision tower
        "Gemma3ForConditionalGeneration",
        {
            "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208, "max_position_embeddings": 131072,
            "sliding_window": 1024, "query_pre_attn_scalar": 256,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
        vision={
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "image_size": 896,
            "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
        },
        small={"num_hidden_layers": 6},
        small_vision={
            "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1,
            "image_size": 56,
        },
        small_wrapper={
            "mm_tokens_per_image": 4, "boi_token_index": 1021, "eoi_token_index": 1022, "image_token_index": 1023,
        },
    ),
    "glm-4-9b": Shape(
        "zai-org/GLM-4-9B-0414",
        "Glm4ForCausalLM",
        {
            "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 32,
            "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151552, "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5, "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "phi-4-14b": Shape(
        "microsoft/phi-4",
        "Phi3ForCausalLM",
        {
            "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40, "num_attention_heads": 40,
            "num_key_value_heads": 10, "vocab_size": 100352, "max_position_embeddings": 16384,
            "original_max_position_embeddings": 16384, "bos_token_id": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 250_000.0},
        },
    ),
    "olmo-2-7b": Shape(
        "allenai/OLMo-2-1124-7B",
        "Olmo2ForCausalLM",
        {
            "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 100352, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        },
        small={"num_key_value_heads": 4},
    ),
    "smollm3-3b": Shape(
        "HuggingFaceTB/SmolLM3-3B",
        "SmolLM3ForCausalLM",
        {
            "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 4, "vocab_size": 128256, "max_position_embeddings": 65536,
            "tie_word_embeddings": True, "bos_token_id": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0},
        },
    ),
    "qwen2.5-7b": Shape(
        "Qwen/Qwen2.5-7B",
        "Qwen2ForCausalLM",
        {
            **QWEN2_5_7B, "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
    ),
    "qwen3-4b": Shape(
        "Qwen/Qwen3-4B",
        "Qwen3ForCausalLM",
        {
            "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
            "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
    ),
    "qwen2.5-vl-7b": Shape(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "Qwen2_5_VLForConditionalGeneration",
        {
            **QWEN2_5_7B, "max_position_embeddings": 128000, "bos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
        },
        vision={"hidden_size": 1280},
        small={"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [8, 12, 12]}},
        small_vision={
            "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "depth": 1, "out_hidden_size": 256,
            "fullatt_block_indexes": [0],
        },
        small_wrapper={
            "image_token_id": 1023, "video_token_id": 1022, "vision_start_token_id": 1021, "vision_end_token_id": 1020,
        },
    ),
    "mistral-small-24b": Shape(
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        "Mistral3ForConditionalGeneration",
        {
            "model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072,
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000_000.0},
        },
        vision={
            "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "head_dim": 64, "patch_size": 14, "image_size": 1540, "hidden_act": "silu",
        },
        wrapper={"tie_word_embeddings": False},  # its checkpoint holds a head
        small={"sliding_window": None},
        small_vision={
            "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "head_dim": 32, "image_size": 56,
        },
    ),
    "qwen3.5-4b": Shape(
        "Qwen/Qwen3.5-4B",  # AutoModelForCausalLM loads it without its vision tower
        "Qwen3_5ForCausalLM",
        {
            "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32, "num_attention_heads": 16,
            "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 248320, "max_position_embeddings": 262144,
            "tie_word_embeddings": True, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
            "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25,
                "mrope_section": [11, 11, 10], "mrope_interleaved": True,
            },
        },
        small={
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25,
                "mrope_section": [3, 3, 2], "mrope_interleaved": True,
            },
        },
    ),
    "qwen3-30b-a3b": Shape(
        "Qwen/Qwen3-30B-A3B",
        "Qwen3MoeForCausalLM",
        {
            "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
            "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936, "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
        small={"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    ),
    "gpt-oss-20b": Shape(
        "openai/gpt-oss-20b",
        "GptOssForCausalLM",
        {
            "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
            "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
            "vocab_size": 201088, "max_position_embeddings": 131072, "sliding_window": 128,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 150_000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "truncate": False, "original_max_position_embeddings": 4096,
            },
        },
        small={"num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "mixtral-8x7b": Shape(
        "mistralai/Mixtral-8x7B-v0.1",
        "MixtralForCausalLM",
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
            "max_position_embeddings": 32768, "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },  # every second of its 32 layers: all are alike, and one GPU holds these
        small={"num_local_experts": 4},
    ),
}  # fmt: skip
"""Vision towers of wrappers are there as published; no decode step reads them."""
