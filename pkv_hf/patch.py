"""`patch`, `unpatch` and `patched`: put one model's generation onto pages, and take it off again."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from pkv_hf import compat
from pkv_hf.cache import KV_DTYPES, PAGE_SIZES, PagedCache, check_kv_dtype
from pkv_hf.errors import UnsupportedModelError
from pkv_hf.kernels.quantize import FP8_CAPABILITY
from pkv_hf.loop import generate
from pkv_hf.patches import FAMILIES, Family, attention_forward, decode_forward
from pkv_hf.policy import ROUTES
from pkv_hf.prefill import prefill
from pkv_hf.serving import attention, decoder_forward, mask
from pkv_hf.state import NAME, ORIGINAL, STATE, PatchState
from pkv_hf.watch import FORWARD

Model = TypeVar("Model", bound=nn.Module)


def patch(
    model: Model,
    *,
    route: str = "auto",
    page_size: int = 16,
    kv_dtype: torch.dtype | str | None = None,
    cuda_graphs: bool = True,
    run_ahead: bool = True,
    fuse: bool = True,
) -> Model:
    """Makes `model.generate()` keep its KV cache in pages and decode from them. Returns the same model.

    Only this instance changes; its class, other instances and its weights do not. Patching again replaces the settings.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 causal LM (a PEFT model around one is unwrapped).
        route: how decode attention runs: "split", "workqueue" (Triton), "flashinfer", "flashinfer_tc",
            "flashinfer_xqa" (where that package is installed), "sdpa" (torch), or "auto" for the one that is predicted
            to be fastest. A route named here raises RouteError at the first step that it cannot serve.
        page_size: tokens a page of the caches that `generate()` makes, a power of two from 16 to 256.
        kv_dtype: what those pages hold: "int8" or "fp8" quantise K and V with a scale for each token and head (half the
            bytes; "fp8" needs sm_89 or newer), a floating dtype converts them, None keeps that of the model.
        cuda_graphs: capture decode steps on a GPU in a CUDA graph and replay it.
        run_ahead: let greedy decoding and sampling on a GPU queue a step before the last one's tokens are read.
        fuse: run decode steps by the family's fused kernels; False runs transformers' layers, attention apart.

    Raises:
        ValueError: an unknown route, page size or kv_dtype, or "fp8" on an older GPU.
        UnsupportedModelError: (a ValueError) no layer of the model can be served; says why.
        UnsupportedVersionError: transformers is too old.
    """
    compat.check_version()
    if route != "auto" and route not in ROUTES:
        raise ValueError(f"route={route!r} is not one of {['auto', *ROUTES]}")
    if page_size not in PAGE_SIZES:
        raise ValueError(f"page_size={page_size!r} is not one of {PAGE_SIZES}")
    check_kv_dtype(kv_dtype)
    unpatch(model)
    inner = unwrap(model)
    decoder, family, attentions = served_layers(inner)
    first = attentions[0]
    _check_fp8(kv_dtype, first)
    compat.register(NAME, attention, mask)
    state = PatchState(
        route=route,
        page_size=page_size,
        kv_dtype=kv_dtype,
        family=family.name,
        layers=len(attentions),
        group=first.num_key_value_groups,
        kv_heads=decoder.config.num_key_value_heads,
        head_dim=first.head_dim,
        implementation=decoder.config._attn_implementation,
        model=inner,
        fused_forward=decode_forward if fuse else None,
        cuda_graphs=cuda_graphs,
        settings={
            "route": route,
            "page_size": page_size,
            "kv_dtype": kv_dtype,
            "cuda_graphs": cuda_graphs,
            "run_ahead": run_ahead,
            "fuse": fuse,
        },
    )
    config = copy.copy(decoder.config)  # models can share a configuration: ours names our attention, theirs does not
    config._attn_implementation_internal = NAME
    setattr(config, ORIGINAL, decoder.config)
    for module, forward in [(decoder, decoder_forward), *((module, attention_forward) for module in attentions)]:
        _replace(state, module, FORWARD, module.__dict__.get("forward"))
        _replace(state, module, "forward", MethodType(forward, module))
        _replace(state, module, "config", config)
        _replace(state, module, STATE, state)
    _replace(state, inner, "_prepare_cache_for_generation", MethodType(_prepare_cache_for_generation, inner))
    _replace(state, inner, "_prefill", MethodType(prefill, inner))
    if run_ahead and "generate" not in inner.__dict__:  # a checkpoint may bring a generate() of its own
        _replace(state, inner, "generate", MethodType(generate, inner))
    _replace(state, inner, STATE, state)
    return model


def unpatch(model: Model) -> Model:
    """Takes a patched model back to what it was; a model that is not patched stays as it is. Returns the same model."""
    state: PatchState | None = getattr(unwrap(model), STATE, None)
    if state is not None:
        while state.undo:
            state.undo.pop()()
        for step in state.decode_steps:
            step.drop()
    return model


@contextmanager
def patched(model: Model, **settings: Any) -> Iterator[Model]:
    """Patches a model for the length of a `with` block, by `patch`'s settings; then it is what it was before."""
    before: PatchState | None = getattr(unwrap(model), STATE, None)
    patch(model, **settings)
    try:
        yield model
    finally:
        if before is None:
            unpatch(model)
        else:
            patch(model, **before.settings)


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT's wrapper, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def served_layers(model: nn.Module) -> tuple[Any, Family, list[Any]]:
    """The decoder, its family and its attention modules. Raises UnsupportedModelError with the reason for none."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"patch() got a {type(model).__name__}, not a transformers model")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder-decoder: pages serve decoder-only models")
    decoder: Any = model.base_model
    model_type = decoder.config.model_type
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedModelError(
            f"no layer of {type(model).__name__} was patched: model_type {model_type!r} is not one of "
            f"{sorted(FAMILIES)}"
        )
    attentions = [module for module in decoder.modules() if type(module).__name__ == family.attention_class]
    if not attentions:
        raise UnsupportedModelError(
            f"no layer of {type(model).__name__} was patched: it has no {family.attention_class} modules"
        )
    try:
        compat.layer_windows(decoder.config)
    except ValueError as error:
        raise UnsupportedModelError(f"no layer of {type(model).__name__} was patched: {error}") from error
    return decoder, family, attentions


def _check_fp8(kv_dtype: torch.dtype | str | None, attention: nn.Module) -> None:
    """Raises ValueError for fp8 pages on a GPU that does not convert them."""
    device = next(attention.parameters()).device
    if kv_dtype is None or KV_DTYPES[kv_dtype] != torch.float8_e4m3fn or device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < FP8_CAPABILITY:
        raise ValueError(f"kv_dtype={kv_dtype!r} needs sm_89 or newer, {device} is sm_{major}{minor}: use 'int8'")


def _replace(state: PatchState, module: nn.Module, name: str, value: Any) -> None:
    """Sets an instance attribute, and notes how to take it back."""
    if name in module.__dict__:
        state.undo.append(functools.partial(setattr, module, name, module.__dict__[name]))
    else:
        state.undo.append(functools.partial(delattr, module, name))
    setattr(module, name, value)


def _prepare_cache_for_generation(
    self: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    """transformers' method of this name, on the instance: a `PagedCache` where it would make a `DynamicCache`."""
    prepare: Callable[..., Any] = type(self)._prepare_cache_for_generation
    state: PatchState = getattr(self, STATE)
    asked = generation_config.cache_implementation
    if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
        if asked in (None, "dynamic"):
            model_kwargs["past_key_values"] = PagedCache(self.config, state.page_size, max_cache_length, state.kv_dtype)
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()
            return None
        state.say(f"cache_implementation={asked!r} was asked for")
    return prepare(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
