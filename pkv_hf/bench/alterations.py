"""Llama models altered by hand, each in one thing that neither configurations nor names of modules show.

The altered code passes for transformers' own, as that of another release would: it has the name of its file. What runs
a layer by its description has to find out by what the layer computes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import nn

Alter = Callable[[Any], None]


def _with_forward(module: nn.Module, forward: Callable[[nn.Module, Callable[[Any], Any], Any], Any]) -> None:
    """Gives one module a class of its own, whose `forward` gets what it stands before and the first argument."""
    base = type(module)

    def altered(self: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, lambda y: base.forward(self, y, *args, **kwargs), x)

    altered.__code__ = _as_of(base.forward, altered)
    module.__class__ = type(base.__name__, (base,), {"forward": altered, "__module__": base.__module__})


def _as_of(own: Any, function: Any) -> CodeType:
    """A function's code as if it were in the file of another."""
    return function.__code__.replace(co_filename=inspect.unwrap(own).__code__.co_filename)


def _norm_offset(model: Any) -> None:
    """(w + 1/2) norm(x), where it was w norm(x)."""
    for layer in model.model.layers:
        norm = layer.input_layernorm
        _with_forward(norm, lambda self, own, x: own(x) + own(x) / self.weight / 2)


def _rotary_half(model: Any) -> None:
    """The halves of a head turn the other way."""
    modeling: Any = sys.modules[type(model).__module__]

    def rotate_half(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((second, -first), dim=-1)

    rotate_half.__code__ = _as_of(modeling.rotate_half, rotate_half)
    modeling.rotate_half = rotate_half


def _activation(model: Any) -> None:
    """x sigmoid(3 x / 2), by a class that is called SiLU."""
    for layer in model.model.layers:
        _with_forward(layer.mlp.act_fn, lambda self, own, x: own(1.5 * x) / 1.5)


def _multiplier(model: Any) -> None:
    """What a layer gives is 1.2 times as much."""
    for layer in model.model.layers:
        _with_forward(layer, lambda self, own, x: 1.2 * own(x))


def _bias(model: Any) -> None:
    """Queries have a bias that is no parameter."""
    for layer in model.model.layers:
        _with_forward(layer.self_attn.q_proj, lambda self, own, x: own(x) + 0.5)


def _one_layer(model: Any) -> None:
    """The MLP of the third layer alone, by half."""
    _with_forward(model.model.layers[2].mlp.down_proj, lambda self, own, x: own(x) / 2)


ALTERATIONS: dict[str, Alter] = {
    "norm offset": _norm_offset,
    "rotary half": _rotary_half,
    "activation": _activation,
    "multiplier": _multiplier,
    "bias": _bias,
    "one layer": _one_layer,
}


@contextmanager
def altered(model: Any, name: str) -> Iterator[None]:
    """Alters a model for good. What lies beside its classes is altered inside this context alone."""
    modeling: Any = sys.modules[type(model).__module__]
    before = modeling.rotate_half
    try:
        ALTERATIONS[name](model)
        yield
    finally:
        modeling.rotate_half = before
