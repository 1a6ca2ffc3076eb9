"""The sizes of a model that pages can serve, by its configuration or by the model itself."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from pkv_hf import compat
from pkv_hf.compat import unwrap
from pkv_hf.errors import UnsupportedModelError
from pkv_hf.memory.weights import weight_bytes
from pkv_hf.patches.families import served_by_us

QUANTISED_BITS = {4: 4.5, 8: 8.0}
"""bitsandbytes' bits a weight: NF4 has one float32 scale for 64 weights, LLM.int8() one a row, which is left out."""


@dataclass(frozen=True)
class ModelSizes:
    """What sums of memory need to know of a model; counts of elements, but for the weights."""

    weights: int
    """Bytes."""
    dtype: torch.dtype
    windows: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, source: Any, dtype: torch.dtype | None, weight_bits: int | None) -> ModelSizes:
        """Of a model as it is, or of a configuration's with weights of `dtype`, or linear layers of `weight_bits`.

        Raises ValueError for a model with either, and UnsupportedModelError for what `patch` would refuse.
        """
        if isinstance(source, PreTrainedConfig):
            model: Any = _empty(source)
            model.tie_weights()
            own = source.dtype or torch.float32
            dtype = dtype or (getattr(torch, own) if isinstance(own, str) else own)
            weights = _weight_bytes(model, dtype, weight_bits)
        elif isinstance(source, nn.Module) and isinstance(model := unwrap(source), PreTrainedModel):
            if weight_bits is not None or dtype is not None:
                raise ValueError("dtype and weight_bits are for a configuration: a model's weights count as they are")
            weights = weight_bytes(source)
            dtype = next(parameter.dtype for parameter in source.parameters() if parameter.is_floating_point())
        else:
            raise UnsupportedModelError(f"plan() got a {type(source).__name__}, not a transformers model or config")
        decoder, prefix, attentions = served_by_us(model)
        config = decoder.config
        if prefix:
            kv_heads, head_dim, widest = config.num_key_value_heads, attentions[0].head_dim, config.intermediate_size
        else:
            kv_heads, head_dim, widest = _found(model)
        return cls(
            weights=weights,
            dtype=dtype,
            windows=tuple(compat.layer_windows(config)),
            heads=config.num_attention_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            hidden=config.hidden_size,
            intermediate=widest,
            vocabulary=config.vocab_size,
        )


def _empty(config: PreTrainedConfig) -> Any:
    """A causal LM without storage. Raises UnsupportedModelError where transformers has none of the configuration."""
    try:
        with init_empty_weights(include_buffers=True):
            return AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # needs no other package
    except ValueError as error:
        raise UnsupportedModelError(f"{type(config).__name__} is of no causal LM of transformers: {error}") from None


def _found(model: Any) -> tuple[int, int, int]:
    """KV heads, head_dim and the widest linear layer of a model of no known family: by one token without storage.

    Raises UnsupportedModelError where its layers do not run so, and its configuration does not name them.
    """
    unpadded = copy.deepcopy(model.config)
    # Or transformers looks for padding, among tokens and in a mask that are not there.
    unpadded.pad_token_id, unpadded._attn_implementation = None, "eager"
    with init_empty_weights(include_buffers=True):
        decoder = compat.decoder_of(type(model)(unpadded))
    layers = (p for m in decoder.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(recurse=False))
    widest = max(max(weight.shape, default=1) for weight in layers)
    cache, token = DynamicCache(config=unpadded), torch.zeros(1, 1, dtype=torch.long, device="meta")
    config = decoder.config
    try:
        decoder(token, use_cache=True, **{compat.CACHE: cache})
        keys: Any = cache.layers[0].keys  # type: ignore[union-attr]
        return keys.shape[1], keys.shape[3], widest
    except RuntimeError as error:  # of an operator that does not run without storage
        try:
            return config.num_key_value_heads, config.hidden_size // config.num_attention_heads, widest
        except AttributeError:
            raise UnsupportedModelError(f"{type(config).__name__} names no num_key_value_heads: {error}") from error


def _weight_bytes(model: nn.Module, dtype: torch.dtype, weight_bits: int | None) -> int:
    """Of a model without storage; the head stays as it is where linear layers are quantised, as bitsandbytes has it."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    quantised: set[int] = set()
    if weight_bits is not None:
        linears = (module for module in model.modules() if isinstance(module, nn.Linear) and module is not head)
        quantised = {id(module.weight) for module in linears}
    bits = sum(
        parameter.numel()
        * (QUANTISED_BITS[weight_bits] if weight_bits and id(parameter) in quantised else 8 * dtype.itemsize)
        for parameter in model.parameters()
    )
    return int(bits) // 8
