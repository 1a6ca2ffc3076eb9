"""The sizes of a model that pages can serve, by its configuration or by the model itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)

from pkv_hf import compat
from pkv_hf.compat import LayerKind, unwrap
from pkv_hf.errors import UnsupportedModelError
from pkv_hf.memory.weights import weight_bytes
from pkv_hf.runtime.evidence import served_layers

QUANTISED_BITS = {4: 4.5, 8: 8.0}
"""bitsandbytes' bits a weight: NF4 has one float32 scale for 64 weights, LLM.int8() one a row, which is left out."""


GENERATE: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
"""transformers' models that generate text; the first that has a configuration counts."""


class LayerSizes(NamedTuple):
    """Of a layer that keeps K and V."""

    window: int
    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class ModelSizes:
    """What sums of memory need to know of a model; counts of elements, but for the weights."""

    weights: int
    """Bytes."""
    dtype: torch.dtype
    layers: tuple[LayerSizes, ...]
    """Those that keep K and V."""
    states: int
    """Bytes a row of linear-attention states, over all layers."""
    heads: int
    hidden: int
    intermediate: int
    vocabulary: int

    @property
    def windows(self) -> tuple[int, ...]:
        """The sliding window of each layer that keeps K and V, 0 for full attention."""
        return tuple(layer.window for layer in self.layers)

    @property
    def kv_heads(self) -> int:
        """The most of a layer."""
        return max(layer.kv_heads for layer in self.layers)

    @property
    def head_dim(self) -> int:
        """The largest of a layer."""
        return max(max(layer.key_dim, layer.value_dim) for layer in self.layers)

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
        decoder = served_layers(model).decoder
        config = decoder.config
        kinds = compat.layer_kinds(config)
        layers, states, widest = _found(model, dtype, kinds)
        return cls(
            weights=weights,
            dtype=dtype,
            layers=tuple(layers),
            states=states,
            heads=config.num_attention_heads,
            hidden=config.hidden_size,
            intermediate=widest,
            vocabulary=config.vocab_size,
        )


def _empty(config: PreTrainedConfig) -> Any:
    """A model without storage that generates text. Raises UnsupportedModelError where transformers has none."""
    auto = next((auto for auto in GENERATE if type(config) in auto._model_mapping), None)
    if auto is None:
        raise UnsupportedModelError(f"{type(config).__name__} is of no model of transformers that generates text")
    with init_empty_weights(include_buffers=True):
        return auto.from_config(config, attn_implementation="eager")  # needs no other package


def _found(model: Any, dtype: torch.dtype, kinds: Sequence[LayerKind]) -> tuple[list[LayerSizes], int, int]:
    """What the layers of a model of no known family keep, and its widest linear layer: by one token without storage.

    Raises UnsupportedModelError where its layers do not run so, and its configuration does not name what they keep.
    """
    unpadded = copy.deepcopy(model.config)
    # Or transformers looks for padding, among tokens and in a mask that are not there.
    unpadded.pad_token_id, unpadded._attn_implementation = None, "eager"
    unpadded._experts_implementation = "batched_mm"  # others ask which experts there are tokens for
    with init_empty_weights(include_buffers=True):
        decoder = compat.decoder_of(type(model)(unpadded)).to(dtype)
    modules = (p for m in decoder.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(recurse=False))
    widest = max(max(weight.shape, default=1) for weight in modules)
    cache, token = DynamicCache(config=unpadded), torch.zeros(1, 1, dtype=torch.long, device="meta")
    config = decoder.config
    try:
        decoder(token, use_cache=True, **{compat.CACHE: cache})
    except RuntimeError as error:  # of an operator that does not run without storage
        named = getattr(config, "num_key_value_heads", None)
        if named is None or any(kind.states for kind in kinds):
            raise UnsupportedModelError(f"what {type(model).__name__} keeps is not known: {error}") from error
        dim = config.hidden_size // config.num_attention_heads
        return [LayerSizes(kind.window, named, dim, dim) for kind in kinds if kind.window is not None], 0, widest
    held: Sequence[Any] = cache.layers
    layers = [
        LayerSizes(kind.window, layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
        for kind, layer in zip(kinds, held)
        if kind.window is not None and layer.keys is not None
    ]
    return layers, sum(map(state_bytes, cache.layers)), widest


def state_bytes(layer: Any) -> int:
    """Of the linear-attention states that a layer of a cache holds."""
    held = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
    return sum(state.nbytes for state in held if state is not None)


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
