"""Gated and plain MLPs, recognised by what they did with their inputs in a recorded run: never by their names."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch

from pkv_hf.kernels import reference
from pkv_hf.patches.description import MLP, Ref
from pkv_hf.patches.parts.norms import LOUD, close
from pkv_hf.patches.trace import Call, Trace, same


def mlp_of(trace: Trace, call: Call) -> MLP | None:
    """The gated or plain MLP that a call was, None for anything else."""
    calls = [each for each in trace.children(call.name) if list(each.module.parameters())]
    first = [each for each in calls if same(each.input, call.input)]
    last = [each for each in calls if same(each.output, call.output)]
    if len(last) != 1 or len(first) not in (1, 2) or len(calls) != len(first) + 1:
        return None
    if any(each.changed for each in calls):
        return None
    names, made = [Ref(each.name) for each in first], [each.output for each in first]
    ways: list[tuple[Ref | None, Ref | None, torch.Tensor, torch.Tensor | None]] = []
    if len(first) == 2:
        ways += [(names[0], names[1], made[0], made[1]), (names[1], names[0], made[1], made[0])]
    elif made[0].shape[-1] == 2 * last[0].input.shape[-1]:
        gate, up = made[0].chunk(2, dim=-1)
        ways.append((names[0], None, gate, up))
    else:
        ways.append((None, names[0], made[0], None))
    found = []
    for gate_name, up_name, gate, other in ways:
        for name in reference.ACTIVATIONS:
            acted = reference.activation(gate, name)
            acted = acted if other is None else acted * other
            if close(acted, last[0].input):
                mlp = MLP(gate_name, up_name, Ref(last[0].name), name)
                found.append((float((acted - last[0].input).square().mean()), mlp))
    if not found:
        return None
    mlp = min(found, key=lambda each: each[0])[1]
    modules = {each.name: each.module for each in calls}
    loud = [modules[name](LOUD * call.input) for name in (mlp.gate, mlp.up) if name is not None]
    if mlp.gate is not None and mlp.up is None:
        loud = list(loud[0].chunk(2, dim=-1))
    acted = reference.activation(loud[0], mlp.activation)
    acted = acted if len(loud) == 1 else acted * loud[1]
    return mlp if close(last[0].module(acted), call.again(LOUD)) else None


class Spread(NamedTuple):
    """An MLP whose modules are the layer's own, and the calls that it was, the first and the last at the ends."""

    calls: list[Call]
    mlp: MLP


def spread_mlps(calls: list[Call], given: dict[str, Any]) -> list[Spread]:
    """The MLPs of a layer's own modules: act(x U) D, or act(x U) times an argument that it was `given`, D."""
    found = []
    weighted = [each for each in calls if list(each.module.parameters())]
    for first, last in pairwise(weighted):
        between = calls[calls.index(first) + 1 : calls.index(last)]
        if first.output.shape != last.input.shape:
            continue
        factors = {"": None, **{name: value for name, value in given.items() if _multiplies(value, last.input)}}
        ways = [(name, by, factor) for name in reference.ACTIVATIONS for by, factor in factors.items()]
        errors = [float((_acted(first.output, name, factor) - last.input).square().mean()) for name, _, factor in ways]
        name, by, factor = ways[min(range(len(ways)), key=errors.__getitem__)]
        if not close(_acted(first.output, name, factor), last.input):
            continue
        if all(close(reference.activation(LOUD * each.input, name), each.again(LOUD)) for each in between):
            mlp = MLP(None, Ref(first.name), Ref(last.name), name, by)
            found.append(Spread([first, *between, last], mlp))
    return found


def _multiplies(value: Any, x: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape == x.shape


def _acted(x: torch.Tensor, activation: str, factor: torch.Tensor | None) -> torch.Tensor:
    acted = reference.activation(x, activation)
    return acted if factor is None else acted * factor
