"""The one module that knows about transformers' versions and its less public names."""

from __future__ import annotations

import dis
import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from types import CodeType
from typing import Any, NamedTuple, NoReturn

import torch
import transformers
from packaging.version import Version
from torch import nn

from pkv_hf.errors import UnsupportedVersionError
from pkv_hf.origins import chain, code_of, is_own, of_a_library

logger = logging.getLogger("pkv_hf")
logger.parent = logging.getLogger("transformers")  # its verbosity and its handlers are ours as well

OLDEST_TRANSFORMERS = "5.17.0"
NEWEST_TRANSFORMERS = "5.24.0"
"""The newest release that all tests have passed with."""

CAPTURING = os.path.join("utils", "output_capturing.py")
CAPTURED_BY = "install_output_capuring_hook.<locals>"
"""Where transformers makes the hooks by which it keeps hidden states."""

CACHE_NAMES = ("cache", "past_key_values")
"""What releases have called the cache of a call, the newest name first. A release takes older ones and warns."""

CACHE = ""
"""The installed release's name for it: a forward's argument, a field of what it returns, and what generate() hands on.

Empty where the release is too old, or calls it something that no release did that is known here.
"""

if Version(transformers.__version__) >= Version(OLDEST_TRANSFORMERS):  # or the names below may not be there
    from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig, cache_utils
    from transformers.cache_utils import (
        DynamicLayer,
        DynamicSlidingWindowLayer,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionAndSlidingWindowAttentionLayer,
        LinearAttentionLayer,
    )
    from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module
    from transformers.masking_utils import chunked_overlay
    from transformers.modeling_outputs import BaseModelOutputWithPast

    _fields = {field.name for field in fields(BaseModelOutputWithPast)}
    CACHE = next((name for name in CACHE_NAMES if name in _fields), "")
    _CHUNKS = next(code for code in chunked_overlay.__code__.co_consts if isinstance(code, CodeType))

SUPPORTED = bool(CACHE)

NAME = "pkv_hf"
"""The name of our attention and mask functions in transformers' registries."""


def refuse(*_: object, **__: object) -> NoReturn:
    """In the place of all that needs another transformers than is installed. Raises UnsupportedVersionError."""
    version = transformers.__version__
    if Version(version) < Version(OLDEST_TRANSFORMERS):
        raise UnsupportedVersionError(
            f"transformers {version} is older than {OLDEST_TRANSFORMERS}, the oldest release that pkv_hf works with: "
            f"pip install 'transformers>={OLDEST_TRANSFORMERS}'"
        )
    raise UnsupportedVersionError(
        f"transformers {version} calls the cache of a forward by none of the names {CACHE_NAMES}, and pkv_hf would be "
        f"off without a word. It is tested with {OLDEST_TRANSFORMERS} to {NEWEST_TRANSFORMERS}: "
        f"pip install 'transformers<={NEWEST_TRANSFORMERS}'"
    )


@functools.cache
def warn_of_untested() -> None:
    """Says, once a process, that the installed transformers is newer than any that the tests have run with."""
    if Version(transformers.__version__) > Version(NEWEST_TRANSFORMERS):
        logger.warning(
            "pkv_hf: transformers %s is newer than the releases that pkv_hf is tested with, %s to %s: compare the "
            "first results with an unpatched model's, and look at report(model).calls",
            transformers.__version__,
            OLDEST_TRANSFORMERS,
            NEWEST_TRANSFORMERS,
        )


def takes_cache(module: nn.Module) -> bool:
    """Whether a module's forward takes the cache by the name that the installed transformers passes it by.

    A forward that names no argument hands all of them on, to that of a base class.
    """
    for base in type(module).__mro__:
        forward = vars(base).get("forward")
        if forward is not None:
            parameters = list(inspect.signature(forward).parameters.values())[1:]
            named = [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
            if named:
                return CACHE in named
    return False


def changes_layers(module: nn.Module) -> bool:
    """Whether a module's forward, or one of its bases', assigns `layers`: to its cache, which gets more of them where
    the decoder's layers run several times.
    """
    forwards = [vars(base)["forward"] for base in type(module).__mro__ if "forward" in vars(base)]
    codes = [code_of(each) for forward in forwards for each in chain(forward)]
    steps = (step for code in codes if code is not None for step in dis.get_instructions(code))
    return any(step.opname == "STORE_ATTR" and step.argval == "layers" for step in steps)


def call_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a module's forward by their names, the cache by the installed release's."""
    if args:
        by_place = inspect.signature(type(module).forward).bind_partial(module, *args).arguments
        del by_place["self"]
        if twice := by_place.keys() & kwargs.keys():
            raise TypeError(f"{type(module).__name__}.forward() got multiple values for argument {min(twice)!r}")
        kwargs = {**by_place, **kwargs}
    for older in CACHE_NAMES[CACHE_NAMES.index(CACHE) + 1 :]:
        if older in kwargs:
            kwargs = dict(kwargs)
            kwargs.setdefault(CACHE, kwargs.pop(older))
    return kwargs


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among arguments by any name that releases have had for it; None for none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


class LayerKind(NamedTuple):
    """What a decoder layer keeps from step to step."""

    window: int | None
    """The sliding window of its keys and values in tokens, 0 for full attention; None where it has none of its own."""
    states: int = 0
    """How many linear-attention states (of convolutions, recurrences) it keeps, in transformers' own layers."""


def layer_kinds(config: PreTrainedConfig) -> list[LayerKind]:
    """What every decoder layer keeps, by the cache that transformers makes for it.

    Raises ValueError where a layer keeps something else (an index, latents), or none keeps keys and values.
    """
    try:
        layers = DynamicCache(config=config).layers
    except AttributeError as error:
        raise ValueError(f"{type(config).__name__} names no decoder layers: {error}") from error
    kinds = [_kind(layer) for layer in layers]
    for layer_idx, kind in enumerate(kinds):
        if kind is None:
            raise ValueError(
                f"layer {layer_idx} of {type(config).__name__} keeps a {type(layers[layer_idx]).__name__}: pages hold "
                "full and sliding-window attention only"
            )
    known = [kind for kind in kinds if kind is not None]
    if not known:
        raise ValueError(f"{type(config).__name__} names no decoder layers")
    if all(kind.window is None for kind in known):
        kept = sorted({type(layer).__name__ for layer in layers})
        raise ValueError(
            f"every layer of {type(config).__name__} keeps a {' or '.join(kept)}: pages would hold nothing"
        )
    return known


def _kind(layer: Any) -> LayerKind | None:
    """What a layer of a transformers cache keeps, None where it is of no class that is known."""
    of_class = type(layer)
    if of_class is DynamicLayer:
        return LayerKind(0)
    if of_class is DynamicSlidingWindowLayer:
        return LayerKind(int(layer.sliding_window))
    if of_class is LinearAttentionLayer:
        return LayerKind(None, layer.number_of_states)
    if of_class is LinearAttentionAndFullAttentionLayer:
        return LayerKind(0, layer.number_of_states)
    if of_class is LinearAttentionAndSlidingWindowAttentionLayer:
        return LayerKind(int(layer.sliding_window), layer.number_of_states)
    return LayerKind(None) if of_class is getattr(cache_utils, "DummyLayer", None) else None  # 5.17 has no such class


def layer_without_cache() -> Any:
    """transformers' own layer of a cache that keeps nothing."""
    return getattr(cache_utils, "DummyLayer", DynamicLayer)()  # which keeps nothing while nobody updates it


def mixer_cache(module: nn.Module) -> str:
    """What the forward of a linear-attention module calls its cache: before 5.24 many had a name of their own."""
    names = inspect.signature(type(module).forward).parameters
    return "cache_params" if "cache_params" in names else CACHE


def dynamic_rope(decoder: Any) -> str:
    """Why a decoder's RoPE cannot be captured: its frequencies follow the length. Empty where they do not."""
    kinds: set[str] = set()
    for module in decoder.modules():
        kind = getattr(module, "rope_type", "default")
        kinds.update(kind.values() if isinstance(kind, dict) else [kind])
    moving = sorted(kind for kind in kinds if "dynamic" in kind or kind == "longrope")
    return f"rope_type {moving[0]!r} changes with the length" if moving else ""


def not_captured(decoder: Any) -> str:
    """Why a decoder of no known family is not captured in a CUDA graph. Empty where transformers says that it can be.

    What torch compiles whole waits for nothing on the device; positions have to come from outside. Of layers that keep
    K and V beside states it says no, as its static cache has none such, and nothing about what else they do.
    """
    if "position_ids" not in inspect.signature(type(decoder).forward).parameters:
        return "its forward takes no position_ids"
    in_one = any(kind.window is not None and kind.states for kind in layer_kinds(decoder.config))
    if not getattr(decoder, "_can_compile_fullgraph", False) and not in_one:
        return f"transformers does not compile {type(decoder).__name__} in one graph"
    return ""


def decoder_of(model: Any) -> Any:
    """What a model's get_decoder() returns, or its `model` where that is the model itself: Llama 4 does not find it."""
    decoder = model.get_decoder()
    inner = getattr(model, "model", None)
    return inner if decoder is model and isinstance(inner, nn.Module) else decoder


def attention_modules(decoder: nn.Module) -> list[Any]:
    """The modules that look their attention function up by the decoder's own configuration."""
    config = decoder.config
    return [
        module
        for module in decoder.modules()
        if getattr(module, "config", None) is config and "_attn_implementation" in _names(type(module).forward)
    ]


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside what PEFT and `torch.compile` put around one, or the model itself."""
    model = getattr(model, "_orig_mod", model)
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def _names(function: Callable) -> tuple[str, ...]:
    """The globals and attributes that a function refers to."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return () if code is None else code.co_names


def plainly_causal(mask_arguments: dict[str, Any]) -> bool:
    """Whether a mask function was asked for a causal mask, windowed or not, with nothing added to it or taken away."""
    return mask_arguments.get("allow_is_causal_skip") is True and not mask_arguments.get("use_vmap")


def mask_window(mask_arguments: dict[str, Any]) -> int:
    """The window, in tokens, of the mask that a mask function was asked for; 0 for full attention."""
    return mask_arguments.get("local_size") or 0


def mask_chunked(mask_arguments: dict[str, Any]) -> bool:
    """Whether that window counts the tokens of chunks, each of which attends to itself."""
    cells = getattr(mask_arguments.get("mask_function"), "__closure__", None) or ()
    parts = (part for cell in cells if isinstance(cell.cell_contents, tuple) for part in cell.cell_contents)
    return any(getattr(part, "__code__", None) is _CHUNKS for part in parts)


def is_inert(hook: Callable) -> bool:
    """Whether a forward hook does nothing in a forward that keeps neither gradients nor intermediate results.

    One is what fine-tuning by adapters leaves on the embeddings: transformers' `enable_input_require_grads` puts it
    there; PEFT, TRL and many a notebook bring copies of it. Others are what transformers leaves on all layers once it
    was asked for hidden states, and only looks at while it is asked again.
    """
    name = getattr(hook, "__name__", "")
    if name in ("make_inputs_require_grads", "make_inputs_require_grad"):
        return _names(hook) == ("requires_grad_",)
    return name == "output_capturing_hook" and is_own(hook, CAPTURING, f"{CAPTURED_BY}.{name}")


def is_sharded(model: nn.Module) -> bool:
    """Whether several processes hold parts of a model: tensor parallelism, FSDP or DeepSpeed's ZeRO-3."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    tensor_parallel = (getattr(model, "tp_size", None) or 1) > 1
    return tensor_parallel or is_fsdp_managed_module(model) or is_deepspeed_zero3_enabled()


def register(name: str, attention: Callable, mask: Callable) -> None:
    """Registers an attention function and, without which it would lose the causal mask, its mask function."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def attention_function(name: str, module: nn.Module) -> Any:
    """The attention function that transformers itself would call for an implementation's name; None for none."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return AttentionInterface().get_interface(name, eager)


def adds_sinks(name: str, module: nn.Module, sinks: torch.Tensor) -> bool:
    """Whether an attention implementation is known to add the sinks that a module hands it.

    Eager functions take the module's own. Of flash attention's functions some take them and some drop them.
    """
    if name == "eager":
        return "sinks" in _names(attention_function(name, module)) and getattr(module, "sinks", None) is sinks
    return name == "flex_attention"


def caps_scores(name: str, module: nn.Module) -> bool:
    """Whether an attention implementation caps scores where a module asks for it. sdpa does not."""
    if name == "eager":
        return "softcap" in inspect.signature(attention_function(name, module)).parameters
    return name != "sdpa"


def mask_function(name: str) -> Callable:
    return AttentionMaskInterface()[name]


def implementation_functions(name: str, module: nn.Module) -> dict[str, Callable | None]:
    """What an attention implementation's name stands for now: the functions of attention and mask, None for none."""
    masks = AttentionMaskInterface()
    return {"attention": attention_function(name, module), "mask": masks.get(name)}


def unfamiliar_implementation(name: str, functions: dict[str, Callable | None]) -> str:
    """Why pages cannot stand for an attention implementation: it is not transformers' own. Empty where it is."""
    for kind, function in functions.items():
        if function is not None and not of_a_library(function):
            return f"the {kind} function of attn_implementation={name!r} is not transformers' own"
    return ""
