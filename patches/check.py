"""Which layers of a decoder are fused: described, and found to compute what their own code does.

Layers that are alike (modules, settings, shapes) share a description and a check. The check is one of errors: of the
fused layer in the model's dtype, and of the model's own layer in it, both against the model's own layer in float32, on
the same random states. At most one layer is held in float32.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Hashable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache

from pkv_hf.cache.linear import layer_of
from pkv_hf.cache.paged import PagedCache
from pkv_hf.compat import CACHE, LayerKind, logger
from pkv_hf.errors import first_line
from pkv_hf.patches import mixers
from pkv_hf.patches.description import AsIs, Layer, bind
from pkv_hf.patches.final import fused_norms
from pkv_hf.patches.fused import FusedLayer, multiplied, product
from pkv_hf.patches.judged import ERROR, JUDGED, excess
from pkv_hf.patches.mixer_check import agrees
from pkv_hf.patches.probe import TOKENS, Given, decoder_layers, given_to_layers, positions_are_places
from pkv_hf.patches.projections.registry import Kinds
from pkv_hf.patches.reading import as_float32, drawn, read, twin_of
from pkv_hf.patches.sharing import Kept, kept_by, read_by, with_each, with_pairs
from pkv_hf.patches.trace import states_in
from pkv_hf.replaced import on_instance, original
from pkv_hf.routes.base import Bounds, Route
from pkv_hf.routes.registry import ROUTES
from pkv_hf.runtime.captured.watch import NAMED_BY_LAYERS, plain_attributes
from pkv_hf.runtime.fusion import FusedForward, Fusion
from pkv_hf.runtime.step import Step, launching_on, outside_of_steps

OF_THE_PLACE = ("layer_idx", "layer_id", "layer_number")
"""Settings of modules that say which layer they are of."""


class Fusing:
    """What is known of the layers of one patched model. It holds for all layers that are alike."""

    def __init__(self) -> None:
        self._described: dict[Hashable, Layer | str] = {}
        self._checked: dict[Hashable, str] = {}
        self._mixed: dict[Hashable, bool] = {}

    def __reduce__(self) -> Any:
        """A copy or a pickle finds out anew: what is known goes by the functions and classes of one process."""
        return Fusing, ()

    def mixes(self, decoder: Any) -> str:
        """What of a decoder's layers may mix the tokens of a prompt beside attention; empty for nothing."""
        for described in self._all(decoder, None, None):
            if isinstance(described, str):
                return described
            if any(isinstance(branch.body, AsIs) for branch in described.branches):
                return "modules of its layers are not understood"
        return ""

    def positions_are_places(self, decoder: Any) -> bool:
        return positions_are_places(decoder)

    def __call__(self, decoder: Any, kinds: tuple[LayerKind, ...], route: Route) -> Fusion:
        """Describes and checks the layers of a decoder on its device, with steps of a route that appends with RoPE."""
        started = time.perf_counter()
        fusion = self._fusion(decoder, self._all(decoder, kinds, route))
        if fusion.layers:
            with torch.inference_mode(False), torch.no_grad(), outside_of_steps():
                fusion.norms = fused_norms(decoder)
                layers = [fused for fused in fusion.layers.values() if isinstance(fused, FusedLayer)]
                for fused in layers:
                    fused.read()
                fusion.multiplied = partial(multiplied, layers)
        fusion.seconds = time.perf_counter() - started
        return fusion

    def described(self, decoder: Any) -> Fusion:
        """Which layers of a decoder are described, and what of them is not; on any device, and not checked."""
        return self._fusion(decoder, self._all(decoder, None, None))

    def _fusion(self, decoder: Any, described: list[Layer | str]) -> Fusion:
        layers, fusion = decoder_layers(decoder), Fusion(product=partial(product, Kinds()))
        if not layers:
            fusion.reasons[str(described[0])] = decoder.config.num_hidden_layers
        bound = [each if isinstance(each, str) else self._bound(each, layer) for each, layer in zip(described, layers)]
        for layer, this, other in zip(layers, bound, [*bound[1:], ""]):
            if isinstance(this, str):
                fusion.reasons[this] = fusion.reasons.get(this, 0) + 1
            else:
                following = None if isinstance(other, str) else other.branches[0]
                fusion.layers[layer] = FusedLayer(this, following)
                for why in _not_understood(this):
                    fusion.reasons[why] = fusion.reasons.get(why, 0) + 1
        return fusion

    def _all(self, decoder: Any, kinds: tuple[LayerKind, ...] | None, route: Route | None) -> list[Layer | str]:
        """The description of every layer, or why there is none; checked in steps of a route where one is given."""
        layers, calls, settings = decoder_layers(decoder), None, _settings(decoder.config)
        found: list[Layer | str] = []
        kept: dict[Any, Kept] = {}  # by where later layers look for it: the last that was kept there
        with torch.inference_mode(False), torch.no_grad(), outside_of_steps(), _random_numbers_of_its_own(decoder):
            for i, layer in enumerate(layers):
                twin: Any = None  # the one before goes first: one layer in float32 at a time
                key = (
                    settings,
                    _alike(layer),
                    tuple((*each.place, each.kv_heads, each.head_dim) for each in kept.values()),
                )
                if key not in self._described:
                    calls = calls or given_to_layers(decoder)
                    if isinstance(calls, str):
                        return [calls] * len(layers)
                    twin = _twin(layer)
                    self._described[key] = _description(layer, twin, calls[layer], kept.values(), decoder.config)
                this, why = self._described[key], ""
                if kinds and route and not isinstance(this, str):
                    read = read_by(this, kept.values())
                    holders = [each.layer_idx for each in read] or [i]
                    check = (key, *(kinds[k] for k in holders), route.name)
                    if check not in self._checked:
                        calls = calls or given_to_layers(decoder)
                        if isinstance(calls, str):
                            return [calls] * len(layers)
                        only = tuple(kind if k in holders else LayerKind(None) for k, kind in enumerate(kinds))
                        run = Run(layer, calls[layer], only, read, decoder.config)
                        self._checked[check] = _disagrees(run, twin or _twin(layer), self._bound(this, layer), route)
                    why = self._checked[check]
                found.append(why or this)
                kept.update({} if isinstance(this, str) else {each.place: each for each in kept_by(this, i)})
        return found or ["its layers are not one list of modules"]

    def _bound(self, described: Layer, layer: nn.Module) -> Layer:
        """A description with a layer's modules, and mixers for those that have one that agrees with them."""
        branches, bound = [], bind(described, layer)
        for branch in bound.branches:
            module: Any = getattr(branch.body, "module", None)
            if isinstance(branch.body, AsIs) and (mixer := mixers.read(module)) is not None:
                key = mixer, _alike(module)
                if key not in self._mixed:
                    self._mixed[key] = _agrees(mixer, module)
                if self._mixed[key]:
                    branch = replace(branch, body=replace(branch.body, mixer=mixer))
            branches.append(branch)
        return replace(bound, branches=tuple(branches))


def _random_numbers_of_its_own(decoder: Any) -> AbstractContextManager:
    """Leaves torch's generators as they are: layers that drop out draw from them."""
    devices = {parameter.device for parameter in decoder.parameters() if parameter.is_cuda}
    return torch.random.fork_rng(devices)


def _not_understood(layer: Layer) -> list[str]:
    """What of a layer is called as it is."""
    bodies = [branch.body for branch in layer.branches if isinstance(branch.body, AsIs) and branch.body.mixer is None]
    return [f"their {type(body.module).__name__} is called as it is" for body in bodies]


def _agrees(mixer: mixers.Mixer, module: Any) -> bool:
    try:
        return agrees(mixer, module, module.layer_idx)
    except Exception as error:  # of a module that does not take what others like it do, or for memory
        logger.debug("pkv_hf: a %s cannot be compared with its mixer: %s", type(module).__name__, error)
        return False


def _settings(config: Any) -> Hashable:
    """What a decoder's configuration says by now: layers may read it in their forwards."""
    return repr(sorted(plain_attributes(vars(config)).items()))


def _alike(layer: nn.Module) -> Hashable:
    """What layers that are alike have in common: all of their modules, code, settings and shapes."""
    parts = []
    for name, module in layer.named_modules():
        settings = {
            key: value for key, value in plain_attributes(vars(module)).items() if not _of_the_place(key, value, name)
        }
        tensors = [(key, None if t is None else (t.shape, t.dtype, type(t))) for key, t in module._parameters.items()]
        parts.append((name, type(module), _code(module), repr(sorted(settings.items())), repr(tensors)))
    return tuple(parts)


def _of_the_place(key: str, value: Any, name: str) -> bool:
    """Whether a setting only says where in its model a module is: a number, or its whole name (GPTQModel)."""
    return key in OF_THE_PLACE or (isinstance(value, str) and bool(name) and value.endswith(f".{name}"))


def _code(module: nn.Module) -> tuple[Any, ...]:
    """The functions that a module runs: its own, those beside its classes, those that it holds."""
    own = on_instance(module) or type(module).forward
    files = [vars(sys.modules[base.__module__]) for base in type(module).__mro__ if base.__module__ in sys.modules]
    beside = [file[name] for file in files for name in NAMED_BY_LAYERS if name in file]
    held = [value for value in vars(module).values() if isinstance(value, (FunctionType, BuiltinFunctionType))]
    return (own, *beside, *held)


def _twin(layer: nn.Module) -> nn.Module | str:
    try:
        return twin_of(layer)
    except Exception as error:  # of a weight that cannot be copied, or for memory
        return f"a {type(layer).__name__} cannot be copied: {type(error).__name__}: {first_line(error)}"


class Run(NamedTuple):
    """A layer to be run by itself."""

    layer: nn.Module
    given: Given
    kinds: tuple[LayerKind, ...]
    """What the layers of its cache keep: those alone that it needs keep anything."""
    read: list[Kept]
    """What it reads of other layers."""
    config: Any

    def drawn(self, rows: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """Random hidden states `[rows, TOKENS, width]`, and the other arguments with random keys and values."""
        like = self.given.hidden
        return drawn(rows, TOKENS, like.shape[-1], like=like), _with_drawn(self.given.kwargs, self.read, rows, like)


def _with_drawn(kwargs: dict[str, Any], kept: Iterable[Kept], rows: int, like: torch.Tensor) -> dict[str, Any]:
    def pair(each: Kept, _: object) -> tuple[torch.Tensor, torch.Tensor]:
        shape = rows, each.kv_heads, TOKENS, each.head_dim
        return drawn(*shape, like=like), drawn(*shape, like=like)

    return with_pairs(kwargs, kept, pair)


def _description(
    layer: nn.Module, twin: nn.Module | str, given: Given, kept: Iterable[Kept], config: Any
) -> Layer | str:  # fmt: skip
    """What a layer computes, or why that is not known."""
    if isinstance(twin, str):
        return twin
    hidden = drawn(*given.hidden.shape, like=given.hidden).float()
    kwargs = _with_drawn(given.kwargs, kept, len(hidden), given.hidden)
    described = read(twin, hidden, as_float32(kwargs), config)
    if not isinstance(described, str) and all(
        isinstance(branch.body, AsIs) and branch.before is None for branch in described.branches
    ):
        return f"nothing of a {type(layer).__name__} is understood"
    return described


def _disagrees(run: Run, twin: nn.Module | str, bound: Layer, route: Route) -> str:
    """How a layer by its description differs from what its own code computes; empty where it does not."""
    name = type(run.layer).__name__
    if isinstance(twin, str):
        return twin
    try:
        fused = FusedLayer(bound, None)
        for rows in (1, 2):
            ratio = _error(run, twin, fused, route, rows)
            if not ratio <= 1:
                return f"a {name} by its description has {ERROR * ratio:.1f} times the error of its own code"
    except Exception as error:  # of a module or a kernel that does not take what it is given
        return f"a {name} by its description fails: {type(error).__name__}: {first_line(error)}"
    return ""


def _error(run: Run, twin: nn.Module, fused: FusedLayer, route: Route, rows: int) -> float:
    """The error of a fused layer over what it may be: twice that of the layer's own code, and rounding."""
    width, squares, errors = run.given.hidden.shape[-1], 0.0, [0.0, 0.0]
    for _ in range(-(-JUDGED // (rows * width))):
        hidden, kwargs = run.drawn(rows)
        exact = _states(twin(hidden.float(), **as_float32(kwargs)), fused.layer)[:, -1:].double()
        squares += float(exact.square().mean())
        # The layer's own attention is torch's: a route that goes wrong is not to be judged by itself.
        own: FusedForward = lambda _, x, kwargs: original(run.layer, "forward")(x, **kwargs)  # noqa: E731
        for i, (forward, by) in enumerate(((own, ROUTES["sdpa"]), (fused, route))):
            found = _states(_stepped(run, forward, hidden, kwargs, by), fused.layer)
            errors[i] += float((found.double() - exact).square().mean())
    own_error, error = (each**0.5 for each in errors)
    return excess(error, own_error, squares**0.5)


def _states(result: Any, described: Layer) -> torch.Tensor:
    """The hidden states that a layer returned. Raises ValueError where that is not as described."""
    states, returns = states_in(result)
    if states is None or returns != described.returns:
        raise ValueError("it returns more in a step than without a cache")
    return states


def _stepped(run: Run, forward: FusedForward, hidden: torch.Tensor, kwargs: dict[str, Any], route: Route) -> Any:
    """The last token's result by `forward`, after a prompt of the others by the layer's own code."""
    windows, begin = [kind.window for kind in run.kinds if kind.window is not None], hidden.shape[1] - 1
    cache: Any = PagedCache.of_kinds(run.kinds) if windows else Cache(layers=[layer_of(kind) for kind in run.kinds])
    starts = np.zeros(len(hidden), dtype=np.int64)
    mask = torch.empty((1, 1 + windows[0], 0, 0), dtype=torch.bool, device="cpu") if windows else None
    prompt, last = (
        {**_cut(kwargs, part), CACHE: cache, "attention_mask": mask} for part in (slice(begin), slice(begin, None))
    )

    def appended(step: Step, kwargs: dict[str, Any]) -> dict[str, Any]:
        return with_pairs(kwargs, run.read, lambda each, pair: step.update(pair[0], pair[1], each.layer_idx))

    with launching_on(hidden.device):
        if not windows:
            original(run.layer, "forward")(hidden[:, :begin], **prompt)
            return forward(None, hidden[:, begin:], last)
        with Step(cache, Bounds(starts, 0, begin), ROUTES["sdpa"], run.config) as step:
            original(run.layer, "forward")(hidden[:, :begin], **appended(step, prompt))
        with Step(cache, Bounds(starts, begin, 1), route, run.config) as step:
            return forward(step, hidden[:, begin:], appended(step, last))


def _cut(kwargs: dict[str, Any], part: slice) -> dict[str, Any]:
    """What a layer is given, for a part of the tokens."""

    def cut(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.ndim >= 3 and value.shape[-2] == TOKENS:  # angles, keys and values
            return value[..., part, :]
        return value[..., part] if value.shape[-1:] == (TOKENS,) else value

    return with_each(kwargs, cut)
