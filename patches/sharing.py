"""Keys and values that layers read of earlier ones (Gemma 4), where such a layer runs by itself: drawn ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, NamedTuple

import torch

from pkv_hf.patches.description import Attention, Layer


class Kept(NamedTuple):
    """What a layer keeps for later ones."""

    place: tuple[str, Any]
    """A layer's argument, a mapping, and its key, where they find it."""
    layer_idx: int
    kv_heads: int
    head_dim: int


def kept_by(layer: Layer, layer_idx: int) -> list[Kept]:
    bodies = [branch.body for branch in layer.branches if isinstance(branch.body, Attention)]
    return [Kept(body.keeps, layer_idx, body.kv_heads, body.head_dim) for body in bodies if body.keeps is not None]


def read_by(layer: Layer, kept: Iterable[Kept]) -> list[Kept]:
    """What of all that is kept a layer reads."""
    places = [branch.body.reads for branch in layer.branches if isinstance(branch.body, Attention)]
    return [each for each in kept if each.place in places]


def with_each(kwargs: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A layer's arguments with values changed, in tuples and in mappings too, which are copied."""

    def changed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(changed(each) for each in value)
        if isinstance(value, MutableMapping):
            held = copy.copy(value)
            held.update({name: changed(each) for name, each in value.items()})
            return held
        return change(value)

    return {name: changed(value) for name, value in kwargs.items()}


def with_pairs(
    kwargs: dict[str, Any], kept: Iterable[Kept], make: Callable[[Kept, Any], tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, Any]:
    """A layer's arguments with `make(kept, what was there)` where it looks for keys and values of others."""
    kwargs = with_each(kwargs, lambda value: value)
    for each in kept:
        name, at = each.place
        if name not in kwargs:
            continue
        kwargs[name][at] = make(each, kwargs[name].get(at))
    return kwargs
