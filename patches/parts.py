"""The parts of a layer, recognised by what they did with their inputs in a recorded run: never by their names."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch.nn import functional

from pkv_hf.compat import CACHE
from pkv_hf.kernels import reference
from pkv_hf.patches.description import MLP, AsIs, Attention, Norm, Ref
from pkv_hf.patches.trace import Call, Trace, asked_behind_others, same, within
from pkv_hf.routes.base import Rotary, Scores
from pkv_hf.runtime.interface import HARMLESS, Asked

CLOSE = 1e-4
"""How far results of the same float32 arithmetic in another order may lie apart, by their root mean square."""

EPSILONS = (1e-5, 1e-6)
"""Of norms that have theirs in their code (OLMo)."""

QUIET, LOUD = 1e-2, 1e2
"""What inputs are multiplied by where a part is tried again: an epsilon shows in small ones, a clamp in large ones."""

ROTATIONS = ((False, False), (True, False), (True, True))
"""Interleaved pairs, paired angles."""


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).square().mean().sqrt() <= CLOSE * b.square().mean().sqrt())


def norm_of(call: Call) -> Norm | None:
    """The normalisation that a call was, None for anything else."""
    module, x = call.module, call.input
    held = dict(module.named_parameters())
    weight, bias = held.pop("weight", None), held.pop("bias", None)
    if held or x.shape != call.output.shape or call.changed:
        return None
    if bias is not None if weight is None else weight.shape != x.shape[-1:]:
        return None
    settings = [value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1] or [*EPSILONS]
    tried = [(x, call.output)]
    for eps, offset, kind in itertools.product(settings, (0.0,) if weight is None else (0.0, 1.0), ("rms", "layer")):
        if kind == "rms" and bias is not None:
            continue
        if kind == "rms":
            norm = functools.partial(reference.rms_norm, weight=weight, eps=eps, offset=offset)
        else:
            norm = functools.partial(reference.layer_norm, weight=weight, bias=bias, eps=eps, offset=offset)
        if close(norm(x), call.output):
            tried = tried if len(tried) > 1 else [*tried, *((by * x, call.again(by)) for by in (QUIET, LOUD))]
            if all(close(norm(given), found) for given, found in tried):
                return Norm(Ref(call.name), kind, eps, offset)
    return None


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


def attention_of(trace: Trace, call: Call) -> Attention | None:
    """The attention that a call was, None for anything else."""
    asked, calls = trace.asked, trace.children(call.name)
    if any(each.changed for each in calls):
        return None
    if len(asked) != 1 or (scores := _scores(asked[0])) is None:
        return None
    query, key, value, _ = asked[0]
    heads, kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
    if value.shape[3] != head_dim:
        return None
    weighted = [each for each in calls if getattr(each.module, "weight", None) is not None]
    norms = {each.name: norm for each in weighted if (norm := norm_of(each))}
    others = [each for each in calls if each.name not in norms and not same(each.input, each.output)]
    outputs = [each for each in others if same(each.output, call.output)]
    inputs = [each for each in others if same(each.input, call.input)]
    if len(outputs) != 1 or len(others) != len(inputs) + 1 or len(norms) not in (0, 2):
        return None
    projected = _projected(inputs, value, (heads, kv_heads, head_dim))
    if projected is None:
        return None
    names, (q, k), gated = projected
    of_q = gate = q
    if gated:
        of_q, gate = q.unflatten(-1, (heads, -1)).chunk(2, dim=-1)
        gate = gate.flatten(-2)
    states, of_heads, taken = [], True, []
    for state, count in ((of_q, heads), (k, kv_heads)):
        call_of_norm = next((each for each in calls if each.name in norms and within(each.input, state)), None)
        heads_of = state.reshape(*state.shape[:2], count, head_dim)
        if call_of_norm is not None:
            norm, weight = norms[call_of_norm.name], call_of_norm.module.weight
            taken.append(norm)
            of_heads = call_of_norm.input.shape[-1] == head_dim
            normed = reference.rms_norm(heads_of if of_heads else state, weight, norm.eps, norm.offset)
            heads_of = normed.view(heads_of.shape)
        states.append(heads_of.transpose(1, 2))
    rotary = _rotary(states, [query, key], call.kwargs.get("position_embeddings"))
    if rotary is None or len(taken) != len(norms) or {norm.kind for norm in taken} - {"rms"}:
        return None
    out = _attended(asked[0], scores)
    if not close(out * torch.sigmoid(gate) if gated else out, outputs[0].input):
        return None
    behind = asked_behind_others(trace, call) if CACHE in call.kwargs else asked
    if len(behind) != 1 or not all(close(a, b) for a, b in zip(behind[0][:3], asked[0][:3])):
        return None  # what it asks depends on what the cache holds
    pair = (taken[0], taken[1]) if taken else None
    if pair and (pair[0].eps, pair[0].offset) != (pair[1].eps, pair[1].offset):
        return None  # the kernel takes one of each
    return Attention(
        module=Ref(call.name), inputs=names, output=Ref(outputs[0].name), heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, scores=scores, rotary=rotary, norms=pair, gated=gated,
    )  # fmt: skip


def _scores(asked: Asked) -> Scores | None:
    """What attention was asked to do with scores, None for what no description has."""
    known = {"scaling", "softcap", "dropout", "sliding_window", "is_causal"} | HARMLESS
    given = {name: value for name, value in asked.arguments.items() if value is not None and name not in HARMLESS}
    if given.keys() - known or given.get("dropout") or given.get("is_causal") is False:
        return None
    scale = given.get("scaling", asked.query.shape[-1] ** -0.5)
    return Scores(float(scale), float(given.get("softcap", 0.0)))


def _projected(
    inputs: list[Call], value: torch.Tensor, sizes: tuple[int, int, int]
) -> tuple[tuple[Ref, ...], list[torch.Tensor], bool] | None:
    """The projections to q, k and v, what q and k came of, and whether q's projection gives gates too."""
    heads, kv_heads, head_dim = sizes
    q_width, kv_width = heads * head_dim, kv_heads * head_dim
    values = [each for each in inputs if within(value, each.output)]
    if len(values) != 1:
        return None
    if len(inputs) == 1:
        packed = inputs[0].output
        if packed.shape[-1] != q_width + 2 * kv_width or value.storage_offset() != q_width + kv_width:
            return None
        return (Ref(inputs[0].name),), list(packed.split([q_width, kv_width, kv_width], dim=-1))[:2], False
    if len(inputs) != 3 or not same(value, values[0].output):
        return None
    q, k = (each for each in inputs if each is not values[0])
    if q.output.shape[-1] == kv_width != k.output.shape[-1]:
        q, k = k, q
    widths = q.output.shape[-1], k.output.shape[-1]
    if widths not in ((q_width, kv_width), (2 * q_width, kv_width)):
        return None
    ordered = (q, k, values[0])
    return tuple(Ref(each.name) for each in ordered), [q.output, k.output], widths[0] == 2 * q_width


def _rotary(states: list[torch.Tensor], rotated: list[torch.Tensor], angles: Any) -> Rotary | None:
    """How q and k were rotated by cos and sin, None for no way that is known."""
    if all(close(state, other) for state, other in zip(states, rotated)):
        return Rotary(0)
    if not isinstance(angles, tuple) or len(angles) != 2 or angles[0].ndim != 3:
        return None
    dim = angles[0].shape[-1]
    if dim > states[0].shape[-1]:
        return None
    for interleaved, paired in ROTATIONS:
        turned = [reference.rotate(state, *angles, dim, interleaved, paired) for state in states]
        if all(close(state, other) for state, other in zip(turned, rotated)):
            return Rotary(None if dim == states[0].shape[-1] else dim, interleaved, paired)
    return None


def _attended(asked: Asked, scores: Scores) -> torch.Tensor:
    """Causal attention of a first few tokens, `[B, tokens, H_q * D]`."""
    query, (key, value) = (
        asked.query,
        (each.repeat_interleave(asked.query.shape[1] // each.shape[1], dim=1) for each in (asked.key, asked.value)),
    )
    if not scores.softcap:
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scores.scale)
    else:
        capped = scores.softcap * torch.tanh(query @ key.transpose(2, 3) * (scores.scale / scores.softcap))
        hidden = torch.ones_like(capped, dtype=torch.bool).triu(1)
        out = capped.masked_fill(hidden, float("-inf")).softmax(-1) @ value
    return out.transpose(1, 2).flatten(2)


def as_is(call: Call, given: dict[str, Any]) -> AsIs | None:
    """A call that its layer, which was `given` these arguments, can make again; None where it adds tensors."""
    hidden, handed_on, constants = "", [], []
    if len(call.args) > 1:
        return None
    for name, value in call.kwargs.items():
        if value is call.input:
            hidden = name
        elif name in given and given[name] is value:
            handed_on.append((name, name))
        elif value is None or isinstance(value, (bool, str)):  # a number may be the layer's own, as its index is
            constants.append((name, value))
        else:
            return None
    return AsIs(Ref(call.name), hidden, tuple(handed_on), tuple(constants))
