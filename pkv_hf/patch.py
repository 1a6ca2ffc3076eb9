"""`patch`, `unpatch` and `patched`: put one model's generation onto pages, and take it off again."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from pkv_hf import compat
from pkv_hf.arguments import flags
from pkv_hf.cache.paged import KV_DTYPES, PagedCache, check_kv_dtype, check_page_size
from pkv_hf.compat import unwrap
from pkv_hf.kernels.launch import capability, has_dtypes
from pkv_hf.patches.families import served_by_us
from pkv_hf.patches.forward import attention_forward
from pkv_hf.patches.fused import decode_forward
from pkv_hf.routes.registry import ROUTES
from pkv_hf.runtime.admission import last_made
from pkv_hf.runtime.evidence import ORIGINAL, Evidence, LayerShape
from pkv_hf.runtime.forward import decoder_forward
from pkv_hf.runtime.interface import attention, mask
from pkv_hf.runtime.loop import generate
from pkv_hf.runtime.prompts import prefill
from pkv_hf.runtime.state import NAME, STATE, PatchState
from pkv_hf.runtime.watch import FORWARD

compat.register(NAME, attention, mask)  # here, since a patched model that is unpickled is not patched again

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
        model: a decoder-only causal LM whose attention goes through transformers' attention interface (a PEFT model
            around one is unwrapped).
        route: how decode attention runs: "split", "workqueue" (Triton), "flashinfer", "flashinfer_tc",
            "flashinfer_xqa" (where that package is installed), "sdpa" (torch), or "auto" for the one that is predicted
            to be fastest. A route named here raises RouteError at the first step that it cannot serve.
        page_size: tokens a page of the caches that `generate()` makes, a power of two from 16 to 256.
        kv_dtype: what those pages hold: "int8" or "fp8" quantise K and V with a scale for each token and head (half the
            bytes; "fp8" needs sm_89 or newer), a floating dtype converts them, None keeps that of the model.
        cuda_graphs: capture decode steps on a GPU in a CUDA graph and replay it.
        run_ahead: let greedy decoding and sampling on a GPU queue a step before the last one's tokens are read.
        fuse: run decode steps of Llama, Mistral, Qwen2 and Qwen3 by fused kernels; False runs transformers' layers,
            attention apart, as all other models do.

    Raises:
        ValueError: an unknown route, page size or kv_dtype, "fp8" on an older GPU, a flag that is no bool.
        UnsupportedModelError: (a ValueError) no layer of the model can be served; says why.
        UnsupportedVersionError: (an ImportError) the installed transformers is too old.
    """
    if not isinstance(route, str) or route not in ("auto", *ROUTES):
        raise ValueError(f"route={route!r} is not one of {['auto', *ROUTES]}")
    check_page_size(page_size)
    flags(cuda_graphs=cuda_graphs, run_ahead=run_ahead, fuse=fuse)
    check_kv_dtype(kv_dtype)
    unpatch(model)
    inner = unwrap(model)
    decoder, prefix, attentions = served_by_us(inner)
    compat.warn_of_untested()
    _check_fp8(kv_dtype, attentions[0])
    state = PatchState(
        route=route,
        page_size=page_size,
        kv_dtype=kv_dtype,
        family=decoder.config.model_type,
        known=Evidence(
            prefix=prefix,
            windows=tuple(compat.layer_windows(decoder.config)),
            shapes={_shape(decoder.config, module) for module in attentions} if prefix else set(),
            output_type=BaseModelOutputWithPast if prefix else None,
        ),
        original=dict(vars(decoder.config)),
        implementation=decoder.config._attn_implementation,
        model=inner,
        fused_forward=decode_forward if fuse and prefix else None,
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
    config.to_dict = functools.partial(_without_ours, config)  # as it is saved
    for module in [decoder, *attentions]:
        _replace(state, module, "config", config)
        _replace(state, module, STATE, state)
    # partials: pickle would look a bound method up by its name on the module
    fused = [(module, attention_forward) for module in attentions] if prefix else []
    for module, forward in [(decoder, decoder_forward), *fused]:
        _replace(state, module, FORWARD, module.__dict__.get("forward"))
        _replace(state, module, "forward", functools.partial(forward, module))
    _replace(state, inner, "_prepare_cache_for_generation", functools.partial(_prepare_cache_for_generation, inner))
    _replace(state, inner, "_prefill", functools.partial(prefill, inner))
    if run_ahead and state.known.loops_as_known(inner):
        _replace(state, inner, "generate", functools.partial(generate, inner))
    _replace(state, inner, STATE, state)
    return model


def unpatch(model: Model) -> Model:
    """Takes a patched model back to what it was, with all that is patched in it. Returns the same model.

    A model that is not patched stays as it is. Neither this nor `patch` may come while a call of the model runs.
    """
    modules = unwrap(model).modules() if isinstance(model, nn.Module) else ()
    held = [module.__dict__[STATE] for module in modules if STATE in module.__dict__]
    states: dict[int, PatchState] = {id(state): state for state in held}
    for state in states.values():
        while state.undo:
            state.undo.pop()()
        for step in state.static_steps:
            step.drop()
    return model


@contextmanager
def patched(model: Model, **settings: Any) -> Iterator[Model]:
    """Patches a model for the length of a `with` block, by `patch`'s settings; then it has those of before, if any."""
    before: PatchState | None = getattr(unwrap(model), STATE, None)
    patch(model, **settings)
    try:
        yield model
    finally:
        if before is None:
            unpatch(model)
        else:
            patch(model, **before.settings)


def _without_ours(config: Any) -> dict[str, Any]:
    """A patched decoder's configuration as a dictionary that tells nothing of the patch."""
    return {name: value for name, value in type(config).to_dict(config).items() if name not in (ORIGINAL, "to_dict")}


def _shape(config: Any, attention: Any) -> LayerShape:
    """The shape of a known family's attention layer."""
    return LayerShape(
        attention.num_key_value_groups, config.num_key_value_heads, attention.head_dim, attention.scaling, 0
    )


def _check_fp8(kv_dtype: torch.dtype | str | None, attention: nn.Module) -> None:
    """Raises ValueError for fp8 pages on a GPU that does not convert them."""
    device = next(attention.parameters()).device
    if kv_dtype is None or KV_DTYPES[kv_dtype] != torch.float8_e4m3fn:
        return
    if not has_dtypes(device, torch.float8_e4m3fn):
        major, minor = capability(device)
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
    served = not state.known.refused and model_kwargs.get("encoder_outputs") is None
    if served and model_kwargs.get(compat.CACHE) is None and generation_config.use_cache is not False:
        if asked in (None, "dynamic"):
            cache = PagedCache(self.config, state.page_size, max(max_cache_length, 1), state.kv_dtype)
            model_kwargs[compat.CACHE] = cache
            last_made.set(ref(cache))
            if generation_config.is_assistant:
                cache.activate_past_recording()
                depth = getattr(self.base_model.config, "num_hidden_layers", len(cache.layers))
                del cache.layers[depth:]  # a draft that exits early never comes to the rest
            return None
        state.say(f"cache_implementation={asked!r} was asked for")
    return prepare(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
