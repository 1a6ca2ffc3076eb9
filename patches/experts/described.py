"""What a module of stacked experts computes: read from its parameters, its numbers and a run of a few of its experts.

Where weights lie is known by transformers' names of parameters. Everything else (orientation, how gates and ups lie,
activation, clamps) is what gives the same numbers as the module's own code, of inputs of two magnitudes, in float32.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pkv_hf.kernels import reference as activations
from pkv_hf.kernels.experts import reference
from pkv_hf.kernels.experts.reference import Form, Stacked
from pkv_hf.patches.experts.dense import AsChosen, takes_rows_alone
from pkv_hf.patches.reading import SET_ON, drawn

UPS, DOWN = ("gate_up_proj", "up_proj"), "down_proj"

COPIED = 2
"""Experts that are compared: a float32 copy of all could be larger than the model's layers."""

LIVELY, LOUD = 1.5, 1e2
"""The root mean square of a first product's outputs: activations differ most in the one, clamps show in the other."""

CLOSE = 1e-4
"""How far results of the same float32 arithmetic in another order may lie apart, by their root mean square."""


def holds_experts(module: nn.Module) -> bool:
    """Whether a module keeps second products of experts by itself, however they are stored."""
    names = {*module._parameters, *module._buffers, *getattr(module, "parametrizations", ())}
    return any(name.startswith(DOWN) for name in names)


def stacked(module: Any, form: Form) -> Stacked:
    """A module's weights, which `read` found to be of a form."""
    held = module._parameters
    up = next(name for name in UPS if name in held)
    return Stacked(held[up], held[DOWN], held.get(f"{up}_bias"), held.get(f"{DOWN}_bias"), form)


def not_stacked(module: Any, around: Iterable[nn.Module]) -> str:
    """Why the kernels cannot read a module's weights where they are; empty where they can.

    `around` are the modules that it is wrapped in.
    """
    name, held = type(module).__name__, {key: value for key, value in module._parameters.items() if value is not None}
    if getattr(module, "parametrizations", None):
        return f"a {name} makes its weights anew at each call (quantised weights, adapters)"
    if any(not (wrapper.merged or wrapper.disable_adapters) for wrapper in around):  # type: ignore[operator]
        return f"a {name} has adapters"
    up = next((key for key in UPS if key in held), "")
    known = {up, DOWN}, {up, DOWN, f"{up}_bias", f"{DOWN}_bias"}
    if not up or held.keys() not in known or any(buffer is not None for buffer in module._buffers.values()):
        return f"a {name} keeps its weights in another form: {', '.join(sorted({*held, *module._buffers}))}"
    for key, value in held.items():
        if type(value) is not nn.Parameter:
            return f"a {name} keeps {key} as a {type(value).__name__}"
        if value.dtype != held[DOWN].dtype or not value.dtype.is_floating_point or not value.is_contiguous():
            return f"a {name} has {key} in {value.dtype}, or not contiguous"
    if takes_rows_alone(module) and len(held) > 2:
        return f"a {name} has biases, and all rows for each expert"
    if getattr(module, "_is_expert_parallel", False):
        return f"a {name} has experts on several devices"
    if next((True for child in module.children() for _ in child.parameters()), False):
        return f"a {name} has more modules with weights"
    return ""


def few(module: Any, chosen: torch.Tensor, dtype: torch.dtype) -> Any:
    """A copy of a module with the chosen experts alone, in a dtype, which runs its class's own loop over experts.

    It is called with x, index and weights.
    """
    twin, held = copy.copy(module), {key: value for key, value in vars(module).items() if key not in SET_ON}
    held["_parameters"] = {
        key: None if value is None else nn.Parameter(value.detach()[chosen].to(dtype), requires_grad=False)
        for key, value in module._parameters.items()
    }
    if hasattr(held.get("config"), "_experts_implementation"):
        held["config"] = copy.copy(held["config"])
        held["config"]._experts_implementation = "eager"
    vars(twin).clear()
    vars(twin).update(held)
    return AsChosen(twin, len(chosen)) if takes_rows_alone(module) else twin


def read(module: Any, chosen: torch.Tensor) -> Form | str:
    """The form of a module whose weights are stacked, by a run of the chosen experts; or why that is not known."""
    twin = few(module, chosen, torch.float32)
    shaped = [*_shaped(twin)]
    if not shaped:
        return f"a {type(module).__name__} has weights of other shapes"
    for hidden in dict.fromkeys(stacked(twin, form).hidden for form in shaped):
        of_width = [form for form in shaped if stacked(twin, form).hidden == hidden]
        calls = [drawn_call(stacked(twin, of_width[0]), 3, 1, magnitude) for magnitude in (LIVELY, LOUD)]
        try:
            tried = [(call, twin(*call)) for call in calls]
        except RuntimeError:  # it takes the other width: without gates, the shapes of weights do not say which
            continue
        for ways in _ways(of_width, twin):
            errors = [
                max(_off(reference.experts(*call, stacked(twin, form)), own) for call, own in tried) for form in ways
            ]
            if errors and min(errors) <= CLOSE:
                return ways[errors.index(min(errors))]
    return f"a {type(module).__name__} does something else with its weights"


def drawn_call(of: Stacked, rows: int, choices: int, magnitude: float) -> tuple[torch.Tensor, ...]:
    """Random x, index and weights for experts, whose first products are of a root mean square."""
    x = drawn(rows, of.hidden, like=of.down)
    first = of.up[0].T if of.form.transposed else of.up[0]
    x *= magnitude / functional.linear(x, first).float().square().mean().sqrt()
    index = drawn(rows, choices, like=of.down).signbit().long() % len(of.up)
    return x, index, drawn(rows, choices, like=of.down).abs() + 0.1


def _off(ours: torch.Tensor, own: torch.Tensor) -> float:
    return float((ours - own).square().mean().sqrt() / own.square().mean().sqrt())


def _shaped(module: Any) -> Iterator[Form]:
    """Forms that the shapes of a module's weights may be of, of any activation: both where they are square."""
    layouts = ("halves", "interleaved") if UPS[0] in module._parameters else ("plain",)
    for transposed, layout in itertools.product((False, True), layouts):
        of = stacked(module, Form(transposed, layout, "silu"))
        if of.up.shape[1:] == ((of.hidden, of.outputs) if transposed else (of.outputs, of.hidden)):
            yield of.form


def _ways(shaped: list[Form], module: Any) -> Iterator[list[Form]]:
    """Forms that a module may be of: plain activations first, then those with numbers that the module keeps."""
    yield [form._replace(activation=name) for form in shaped for name in activations.ACTIVATIONS]
    numbers = sorted({value for value in vars(module).values() if type(value) is float and value > 0})
    settings = [*itertools.product((0.0, *numbers), (1.0, *numbers), (0.0, 1.0))]
    yield [Form(*form[:2], "silu", *each) for form in shaped if form.layout != "plain" for each in settings]
