"""Gated and plain MLPs, recognised by what they did with their inputs in a recorded run: never by their names."""

from __future__ import annotations

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
