"""What generate() gives a patched model: pages for a cache, and each prompt once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import ref

import torch

from pkv_hf import compat, origins
from pkv_hf.cache.paged import PagedCache
from pkv_hf.replaced import STATE, original
from pkv_hf.runtime.admission import last_made
from pkv_hf.runtime.prefix_cache.prompts import through
from pkv_hf.runtime.state import PatchState


def prepare_cache(
    self: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    """transformers' `_prepare_cache_for_generation`: a `PagedCache` where it would make a `DynamicCache`."""
    state: PatchState = getattr(self, STATE)
    plain = model_kwargs.get("encoder_outputs") is None and model_kwargs.get(compat.CACHE) is None
    if plain and generation_config.use_cache is not False and not state.known.refused:
        reason = _no_pages(self, generation_config)
        if not reason:
            cache = PagedCache(self.config, state.page_size, max(max_cache_length, 1), state.kv_dtype)
            model_kwargs[compat.CACHE] = cache
            last_made.set(ref(cache))
            if state.prefix_cache is not None:
                state.prefix_cache.awaited.add(cache)
            if generation_config.is_assistant:
                cache.activate_past_recording()
                depth = getattr(self.base_model.config, "num_hidden_layers", len(cache.layers))
                del cache.layers[depth:]  # a draft that exits early never comes to the rest
            return None
        state.say(reason)
    prepare = original(self, "_prepare_cache_for_generation")
    return prepare(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)


def _no_pages(model: Any, generation_config: Any) -> str:
    """Why a call of generate() gets the cache that transformers makes; empty where it gets pages."""
    asked = generation_config.cache_implementation
    if asked not in (None, "dynamic"):
        return f"cache_implementation={asked!r} was asked for"
    if origins.compiled(model.modules()):
        return "the model, or a part of it, is compiled by torch"
    return ""


def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """transformers' `prepare_inputs_for_generation`: where that drops the cache, to begin anew, pages begin anew.

    Models do so whose RoPE switches at a length: the decoder would make a `DynamicCache` for the whole sequence.
    """
    inputs: dict[str, Any] = original(self, "prepare_inputs_for_generation")(*args, **kwargs)
    cache = kwargs.get(compat.CACHE)
    if isinstance(cache, PagedCache) and compat.cache_of(inputs) is None:
        longest = next(iter(cache.tables.values())).limit
        fresh = inputs[compat.CACHE] = PagedCache(self.config, cache.page_size, longest or None, cache.kv_dtype)
        del fresh.layers[len(cache.layers) :]
        for layer, dropped in zip(fresh.layers, cache.layers):
            if hasattr(dropped, "record_past"):
                layer.record_past = dropped.record_past
    return inputs


def prefill(
    self: Any, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], **settings: Any
) -> Any:
    """transformers' `_prefill`: of rows that generate() has repeated, one each goes through the model.

    What comes back is repeated then, and so are the cache's table rows. A cache that was passed in may hold one row
    for every prompt, or one for every copy, as transformers' own caches have to.
    """
    state: PatchState = getattr(self, STATE)
    run = original(self, "_prefill")
    copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    cache = model_kwargs.get(compat.CACHE)
    if not isinstance(cache, PagedCache):
        return run(input_ids, generation_config, model_kwargs, **settings)
    run = through(state, run)
    embeds = model_kwargs.get("inputs_embeds")
    length = (input_ids if embeds is None else embeds).shape[1]
    if length and not cache.rows:
        cache.expect_prompt(length)
    if copies == 1 or cache.rows not in (0, len(input_ids) // copies):
        return run(input_ids, generation_config, model_kwargs, **settings)
    shares = state.known.look().shares_prompts and not state.known.may_keep_states
    prompts = _prompts({"input_ids": input_ids, **model_kwargs}, copies) if shares else None
    if prompts is None:
        return run(input_ids, generation_config, model_kwargs, **settings)
    cache.expect_copies(copies, length)
    try:
        outputs = run(prompts.pop("input_ids"), generation_config, prompts, **settings)
    finally:
        cache.expect_copies(1)
    cache.batch_repeat_interleave(copies)
    for name, value in outputs.items():
        outputs[name] = _repeated(value, copies)
    return outputs


def _prompts(inputs: dict[str, Any], copies: int) -> dict[str, Any] | None:
    """The first of every `copies` rows of all tensors; None where the others differ from it.

    None also where tensors lie in something else, as encoded images do: which of them is a row's, nobody says.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    if any(_holds_tensors(value) for name, value in inputs.items() if name not in tensors):
        return None
    rows = len(inputs["input_ids"])
    chosen: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        dim = _row_dim(name, value)
        if value.ndim <= dim or value.shape[dim] != rows:
            return None
        grouped = value.unflatten(dim, (-1, copies))
        first = grouped.narrow(dim + 1, 0, 1)
        if not bool((grouped == first).all()):
            return None
        chosen[name] = first.squeeze(dim + 1)
    return {**inputs, **chosen}


def _row_dim(name: str, value: torch.Tensor) -> int:
    """Where a tensor has its rows: positions of several axes (mRoPE) are `[axes, rows, tokens]`."""
    return int(name == "position_ids" and value.ndim == 3)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, torch.Tensor) or (isinstance(value, (list, tuple)) and any(map(_holds_tensors, value)))


def _repeated(value: Any, copies: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value.repeat_interleave(copies, dim=0)
    return tuple(_repeated(item, copies) for item in value) if isinstance(value, tuple) else value
