"""Attention, recognised by what it did with its inputs in a recorded run: never by its names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from pkv_hf.compat import CACHE
from pkv_hf.kernels import reference
from pkv_hf.patches.description import Attention, Held, Ref
from pkv_hf.patches.parts.norms import close, norm_of
from pkv_hf.patches.trace import Call, Trace, asked_behind_others, same, within
from pkv_hf.routes.base import Rotary, Scores
from pkv_hf.runtime.interface import HARMLESS, Asked

ROTATIONS = ((False, False), (True, False), (True, True))
"""Interleaved pairs, paired angles."""


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
    shared = _shared(call, key, value)
    of_v = next((each for each in others if same(each.output, value)), None)
    v_norm = None if of_v is None or within(of_v.input, call.input) else norm_of(of_v)
    if of_v is not None and v_norm is not None:
        others, value = [each for each in others if each is not of_v], of_v.input
    outputs = [each for each in others if same(each.output, call.output)]
    inputs = [each for each in others if same(each.input, call.input)]
    reads = shared is not None and not any(within(value, each.output) for each in inputs)
    if len(outputs) != 1 or len(others) != len(inputs) + 1 or len(norms) not in (0, 2 - reads):
        return None
    projected = _projected(inputs, None if reads else value, (heads, kv_heads, head_dim))
    if projected is None:
        return None
    names, (q, *of_k), gated = projected
    of_q = gate = q
    if gated:
        of_q, gate = q.unflatten(-1, (heads, -1)).chunk(2, dim=-1)
        gate = gate.flatten(-2)
    states, of_heads, taken = [], True, []
    for state, count in ((of_q, heads), *((k, kv_heads) for k in of_k)):
        call_of_norm = next((each for each in calls if each.name in norms and within(each.input, state)), None)
        heads_of = state.reshape(*state.shape[:2], count, head_dim)
        if call_of_norm is not None:
            norm, weight = norms[call_of_norm.name], call_of_norm.module.weight
            taken.append(norm)
            of_heads = call_of_norm.input.shape[-1] == head_dim
            normed = reference.rms_norm(heads_of if of_heads else state, weight, norm.eps, norm.offset)
            heads_of = normed.view(heads_of.shape)
        states.append(heads_of.transpose(1, 2))
    factors = [1.0, *(value for value in vars(call.module).values() if isinstance(value, float) and value)]
    ways = ([factor * states[0], *states[1:]] for factor in factors)
    angles = call.kwargs.get("position_embeddings")
    factor, rotary = next(
        ((factor, found) for factor, way in zip(factors, ways) if (found := _rotary(way, [query, key], angles))),
        (1.0, None),
    )
    if rotary is None or len(taken) != len(norms) or {norm.kind for norm in taken} - {"rms"}:
        return None
    sinks = _sinks(asked[0], call)
    if sinks is None:
        return None
    out = _attended(asked[0], scores, getattr(call.module, sinks) if sinks else None)
    if not close(out * torch.sigmoid(gate) if gated else out, outputs[0].input):
        return None
    behind = asked_behind_others(trace, call) if CACHE in call.kwargs else asked
    if len(behind) != 1 or not all(close(a, b) for a, b in zip(behind[0][:3], asked[0][:3])):
        return None  # what it asks depends on what the cache holds
    pair = (taken[0], taken[-1]) if taken else None
    if pair and (pair[0].eps, pair[0].offset) != (pair[1].eps, pair[1].offset):
        return None  # the kernel takes one of each
    return Attention(
        module=Ref(call.name), inputs=names, output=Ref(outputs[0].name), heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, scores=scores._replace(scale=factor * scores.scale), rotary=rotary, norms=pair,
        v_norm=v_norm, gated=gated,
        keeps=None if reads else shared, reads=shared if reads else None,
        sinks=Held(f"{call.name}.{sinks}") if sinks else None,
    )  # fmt: skip


def _shared(call: Call, key: torch.Tensor, value: torch.Tensor) -> tuple[str, Any] | None:
    """The argument of a call that holds keys and values for other layers, and under which key; None where none does."""
    for name, held in call.kwargs.items():
        for at, pair in held.items() if isinstance(held, Mapping) else ():
            tensors = isinstance(pair, tuple) and all(isinstance(each, torch.Tensor) for each in pair)
            if tensors and len(pair) == 2 and same(pair[0], key) and same(pair[1], value):
                return name, at
    return None


def _scores(asked: Asked) -> Scores | None:
    """What attention was asked to do with scores, None for what no description has."""
    known = {"scaling", "softcap", "dropout", "sliding_window", "is_causal", "s_aux"} | HARMLESS
    given = {name: value for name, value in asked.arguments.items() if value is not None and name not in HARMLESS}
    if given.keys() - known or given.get("dropout") or given.get("is_causal") is False:
        return None
    scale = given.get("scaling", asked.query.shape[-1] ** -0.5)
    return Scores(float(scale), float(given.get("softcap", 0.0)))


def _sinks(asked: Asked, call: Call) -> str | None:
    """The name of the module's parameter that it asks attention to take as sinks; empty without, None for others."""
    sinks = asked.arguments.get("s_aux")
    if sinks is None:
        return ""
    named = (name for name, held in call.module.named_parameters(recurse=False) if held is sinks)
    return next(named, None) if sinks.shape == asked.query.shape[1:2] else None


def _projected(
    inputs: list[Call], value: torch.Tensor | None, sizes: tuple[int, int, int]
) -> tuple[tuple[Ref, ...], list[torch.Tensor], bool] | None:
    """The projections to q, k and v, what q and k came of, and whether q's projection gives gates too.

    To q alone without a value: k and v are then another layer's.
    """
    heads, kv_heads, head_dim = sizes
    q_width, kv_width = heads * head_dim, kv_heads * head_dim
    if value is None:
        width = inputs[0].output.shape[-1] if len(inputs) == 1 else 0
        return (
            ((Ref(inputs[0].name),), [inputs[0].output], width > q_width) if width in (q_width, 2 * q_width) else None
        )
    values = [each for each in inputs if within(value, each.output)]
    if len(values) != 1:
        return None
    if len(inputs) == 1:
        packed = inputs[0].output
        if packed.shape[-1] != q_width + 2 * kv_width or value.storage_offset() != q_width + kv_width:
            return None
        return (Ref(inputs[0].name),), list(packed.split([q_width, kv_width, kv_width], dim=-1))[:2], False
    if len(inputs) not in (2, 3) or not same(value, values[0].output):
        return None
    q, *other = (each for each in inputs if each is not values[0])
    k = other[0] if other else values[0]
    if other and q.output.shape[-1] == kv_width != k.output.shape[-1]:
        q, k = k, q
    widths = q.output.shape[-1], k.output.shape[-1]
    if widths not in ((q_width, kv_width), (2 * q_width, kv_width)):
        return None
    ordered = (q, k, values[0])[: len(inputs)]
    return tuple(Ref(each.name) for each in ordered), [q.output, k.output], widths[0] == 2 * q_width


def _rotary(states: list[torch.Tensor], rotated: list[torch.Tensor], angles: Any) -> Rotary | None:
    """How q and k were rotated by cos and sin, None for no way that is known."""
    if all(close(state, other) for state, other in zip(states, rotated)):
        return Rotary(0)
    if not isinstance(angles, tuple) or len(angles) != 2 or angles[0].ndim != 3:
        return None
    cos, sin = angles
    ways = [(interleaved, paired, False, angles) for interleaved, paired in ROTATIONS]
    ways.append((False, False, True, (torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1))))
    for interleaved, paired, once, (cos, sin) in ways:
        dim, head_dim = cos.shape[-1], states[0].shape[-1]
        if dim > head_dim:
            continue
        turned = [reference.rotate(state, cos, sin, dim, interleaved, paired) for state in states]
        if all(close(state, other) for state, other in zip(turned, rotated)):
            return Rotary(None if dim == head_dim else dim, interleaved, paired, once)
    return None


def _attended(asked: Asked, scores: Scores, sinks: torch.Tensor | None) -> torch.Tensor:
    """Causal attention of a first few tokens, `[B, tokens, H_q * D]`."""
    query, (key, value) = (
        asked.query,
        (each.repeat_interleave(asked.query.shape[1] // each.shape[1], dim=1) for each in (asked.key, asked.value)),
    )
    if not scores.softcap and sinks is None:
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scores.scale)
    else:
        capped = query @ key.transpose(2, 3) * scores.scale
        if scores.softcap:
            capped = scores.softcap * torch.tanh(capped / scores.softcap)
        hidden = torch.ones_like(capped, dtype=torch.bool).triu(1)
        capped = capped.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            capped = torch.cat([capped, sinks[:, None, None].expand(*capped.shape[:3], 1)], dim=-1)
        out = capped.softmax(-1)[..., : key.shape[2]] @ value
    return out.transpose(1, 2).flatten(2)
