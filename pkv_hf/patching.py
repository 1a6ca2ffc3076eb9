"""`patch`, `unpatch` and `patched`: put one model's generation onto pages, and take it off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from pkv_hf import compat, configurations
from pkv_hf.arguments import flags, memory_size
from pkv_hf.cache.sizes import KV_DTYPES, check_kv_dtype, check_page_size
from pkv_hf.compat import unwrap
from pkv_hf.kernels.launch import capability, has_dtypes
from pkv_hf.patches.around.angles import angle_modules, angles_forward
from pkv_hf.patches.around.final import norm_forward, norms_of
from pkv_hf.patches.check import Fusing
from pkv_hf.patches.experts.beside import mlp_forward, mlps_of
from pkv_hf.patches.experts.routers import router_forward, routers_of
from pkv_hf.patches.experts.served import experts_forward, experts_of
from pkv_hf.patches.probe import decoder_layers, layer_forward
from pkv_hf.replaced import STATE
from pkv_hf.routes.registry import ROUTES
from pkv_hf.runtime.ahead.loop import generate, mode_arguments
from pkv_hf.runtime.evidence import Evidence, served_layers
from pkv_hf.runtime.forward import decoder_forward
from pkv_hf.runtime.generation import prefill, prepare_cache, prepare_inputs
from pkv_hf.runtime.prefix_cache.kept import Kept
from pkv_hf.runtime.state import PatchState

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
    prefix_cache: int | str | None = None,
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
        fuse: run decode steps by fused kernels, layer by layer, where a layer is understood and computes the same;
            False runs transformers' own layers, attention apart.
        prefix_cache: bytes, or a string such as "2GiB": how much memory may keep pages of past prompts, so that those
            to come compute only what is new; None keeps none.

    Raises:
        ValueError: an unknown route, page size or kv_dtype, "fp8" on an older GPU, a flag that is no bool, a
            prefix_cache that is no size.
        UnsupportedModelError: (a ValueError) no layer of the model can be served; says why. It is as it was then, also
            where it was patched before.
        UnsupportedVersionError: (an ImportError) the installed transformers is too old, or names caches as no release
            did that is known here.
    """
    if not isinstance(route, str) or route not in ("auto", *ROUTES):
        raise ValueError(f"route={route!r} is not one of {['auto', *ROUTES]}")
    check_page_size(page_size)
    flags(cuda_graphs=cuda_graphs, run_ahead=run_ahead, fuse=fuse)
    check_kv_dtype(kv_dtype)
    if prefix_cache is not None:
        prefix_cache = memory_size("prefix_cache", prefix_cache, "2GiB")
    inner = unwrap(model)
    settings = {
        "route": route,
        "page_size": page_size,
        "kv_dtype": kv_dtype,
        "cuda_graphs": cuda_graphs,
        "run_ahead": run_ahead,
        "fuse": fuse,
        "prefix_cache": prefix_cache,
    }
    before = _states(inner)
    _remove(before)
    try:
        _patch(inner, settings)
    except BaseException:
        for state in before:
            state.replaced.restore()
        raise
    return model


def _patch(model: Any, settings: dict[str, Any]) -> None:
    """Patches a transformers model that is not patched. Where it raises, it has changed nothing."""
    decoder, attentions = served_layers(model)
    compat.warn_of_untested()
    _check_fp8(settings["kv_dtype"], attentions[0])
    known = Evidence(
        kinds=tuple(compat.layer_kinds(decoder.config)),
        model=model,
        decoder=decoder,
        attentions=attentions,
    )
    state = PatchState(
        route=settings["route"],
        page_size=settings["page_size"],
        kv_dtype=settings["kv_dtype"],
        family=decoder.config.model_type,
        known=known,
        fusing=Fusing(),
        cuda_graphs=settings["cuda_graphs"],
        settings=settings,
        prefix_cache=Kept(settings["prefix_cache"], settings["page_size"]) if settings["prefix_cache"] else None,
    )
    try:
        _replace(state, decoder, model, attentions)
    except BaseException:
        state.replaced.remove()
        raise


def _replace(state: PatchState, decoder: Any, model: Any, attentions: list[Any]) -> None:
    """Puts ours in the place of what the modules have."""
    config = configurations.serving_configuration(decoder.config)
    inner = [m for m in decoder.modules() if isinstance(m, PreTrainedModel) and m.config is decoder.config]
    for module in [*inner, *attentions]:  # the decoder is the first of them: any may make the masks
        state.replaced.set(module, "config", config)
    layers, norms, angles = decoder_layers(decoder), norms_of(decoder), angle_modules(decoder)
    experts, routers = ([module for module, _ in found(decoder)] for found in (experts_of, routers_of))
    mlps = [*mlps_of(decoder)]
    patched = [model, decoder, *layers, *norms, *angles, *experts, *routers, *mlps, *attentions]
    for module in {id(module): module for module in patched}.values():
        state.replaced.set(module, STATE, state)
    methods: list[tuple[Any, str, Callable[..., Any]]] = [(decoder, "forward", decoder_forward)]
    methods += [(layer, "forward", layer_forward) for layer in layers]
    methods += [(norm, "forward", norm_forward) for norm in norms]
    methods += [(module, "forward", angles_forward) for module in angles]
    methods += [(module, "forward", experts_forward) for module in experts]
    methods += [(module, "forward", router_forward) for module in routers]
    methods += [(module, "forward", mlp_forward) for module in mlps]
    if decoder is not model:
        methods += [
            (model, "_prepare_cache_for_generation", prepare_cache),
            (model, "prepare_inputs_for_generation", prepare_inputs),
            (model, "_prefill", prefill),
        ]
        if state.settings["run_ahead"] or state.prefix_cache is not None:
            methods += [(model, "generate", generate), (model, "_extract_generation_mode_kwargs", mode_arguments)]
    for module, name, function in methods:
        state.replaced.method(module, name, function, state)


def unpatch(model: Model) -> Model:
    """Takes a patched model back to what it was, with all that is patched in it. Returns the same model.

    A model that is not patched stays as it is. Neither this nor `patch` may come while a call of the model runs.
    """
    _remove(_states(unwrap(model)))
    return model


def _states(model: nn.Module) -> list[PatchState]:
    """What a model and its parts are patched with: several, where they were patched one by one."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    held = [vars(module)[STATE] for module in modules if STATE in vars(module)]
    return list({id(state): state for state in held}.values())


def _remove(states: list[PatchState]) -> None:
    for state in states:
        state.replaced.remove()
        with state.lock:
            for step in state.static_steps:
                step.drop()
        if state.prefix_cache is not None:
            state.prefix_cache.clear()


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


def _check_fp8(kv_dtype: torch.dtype | str | None, attention: nn.Module) -> None:
    """Raises ValueError for fp8 pages on a GPU that does not convert them."""
    if kv_dtype is None or KV_DTYPES[kv_dtype] != torch.float8_e4m3fn:
        return
    device = next(chain(attention.parameters(), attention.buffers())).device  # GPTQ's layers have buffers alone
    if not has_dtypes(device, torch.float8_e4m3fn):
        major, minor = capability(device)
        raise ValueError(f"kv_dtype={kv_dtype!r} needs sm_89 or newer, {device} is sm_{major}{minor}: use 'int8'")
