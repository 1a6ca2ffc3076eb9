"""Reads the description of a decoder layer from one run of a copy of it, in float32 and with norms and biases drawn.

What is read is what was computed: an input is the very tensor that another module gave, a sum or a product equals what
was found. Whatever is not understood is called as it is, or the layer is not described at all.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from pkv_hf.patches.description import Branch, Held, Layer, Norm
from pkv_hf.patches.parts.attention import attention_of
from pkv_hf.patches.parts.called import as_is
from pkv_hf.patches.parts.mlps import mlp_of, spread_mlps
from pkv_hf.patches.parts.norms import close, norm_of
from pkv_hf.patches.projections.registry import in_float32
from pkv_hf.patches.sharing import with_each
from pkv_hf.patches.trace import Call, Trace, same, traced
from pkv_hf.replaced import REPLACED, REPLICATE, STATE, on_instance
from pkv_hf.runtime.captured.watch import NAMED_BY_LAYERS, plain_attributes

SET_ON = ("forward", REPLACED, REPLICATE)
"""What a patch sets on layers, beside its state."""

OF_THE_PLACE = ("layer_idx", "layer_id", "layer_number")
"""Settings of modules that say which layer they are of."""

DRAWN = 0.3
"""By how much norms, biases and single numbers of the copy are moved: those of a new model are all alike, and those of
layers that share a description are not."""


def twin_of(layer: nn.Module) -> nn.Module:
    """A copy of a layer that computes in float32, without what is set on its modules.

    Its configuration and state are shared.
    """
    # What is set on them knows all modules of the model: none of it may be copied.
    kept = ("config", STATE, *SET_ON)
    memo = {id(value): value for inner in layer.modules() for name, value in vars(inner).items() if name in kept}
    twin = copy.deepcopy(layer, memo)
    for inner in twin.modules():
        for name in SET_ON:
            vars(inner).pop(name, None)
    in_float32(twin)
    return twin.float()


def alike(layer: nn.Module) -> Hashable:
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


def as_float32(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a layer is given, with floating tensors in float32."""
    floating = lambda value: isinstance(value, torch.Tensor) and value.is_floating_point()  # noqa: E731
    return with_each(kwargs, lambda value: value.float() if floating(value) else value)


_generator = torch.Generator()  # of our own: the caller's random numbers are left where they were


def drawn(*shape: int, like: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers in a tensor's dtype, on its device."""
    return torch.randn(shape, generator=_generator, device="cpu").to(like)


@contextmanager
def drawn_vectors(twin: nn.Module) -> Iterator[None]:
    """Has norms and biases of a module drawn inside, and as they were afterwards."""
    held = [*twin.parameters(), *twin.buffers()]
    vectors = [tensor for tensor in held if tensor.ndim <= 1 and tensor.is_floating_point()]
    before = [parameter.clone() for parameter in vectors]
    try:
        for parameter in vectors:
            parameter.add_(DRAWN * drawn(*parameter.shape, like=parameter))
        yield
    finally:
        for vector, value in zip(vectors, before):
            vector.copy_(value)


def read(twin: nn.Module, hidden: torch.Tensor, given: dict[str, Any], config: Any) -> Layer | str:
    """The description of a layer by a run of its twin on hidden states `[1, tokens, width]`; or why there is none.

    `given` are the layer's other arguments, in float32, without a cache; `config` is its decoder's. The twin is as it
    was, afterwards.
    """
    try:
        with drawn_vectors(twin):
            trace = traced(twin, hidden, given, config)
            return "its layers return more than hidden states" if trace is None else _described(trace, given)
    except Exception as error:  # of a layer that computes with more than it is given here, or with other shapes
        return f"a {type(twin).__name__} is not understood: {type(error).__name__}: {error}"


def _described(trace: Trace, given: dict[str, Any]) -> Layer | str:
    calls = [call for call in trace.children("") if not same(call.input, call.output)]
    if any(call.changed for call in calls):
        return "what its modules give is written into"
    norms = [(call, norm) for call in calls if (norm := norm_of(call))]
    bodies = [call for call in calls if all(call is not other for other, _ in norms)]
    spread = spread_mlps(bodies, given)
    among = [call for each in spread for call in each.calls]
    found: list[tuple[Branch, torch.Tensor, torch.Tensor]] = []
    for call in bodies:
        first, body = call, None
        if any(call is other for other in among):
            own = next((each for each in spread if each.calls[-1] is call), None)
            if own is None:
                continue
            first, body = own.calls[0], own.mlp
        before = _norm(norms, first.input, "output")
        after = _norm(norms, call.output, "input")
        body = body or attention_of(trace, call) or mlp_of(trace, call) or as_is(call, given)
        if body is None:
            return f"a {type(call.module).__name__} is given what its layer computes"
        source = before[0].input if before else first.input
        result = after[0].output if after else call.output
        branch = Branch(body, before and before[1], after and after[1], 1.0, False)
        found.append((branch, source, result))
    used = sum(branch.before is not None for branch, *_ in found) + sum(
        branch.after is not None for branch, *_ in found
    )
    shared = sum(a[0].before is not None and a[0].before == b[0].before for a, b in pairwise(found))
    if not found or used - shared != len(norms):
        return "its norms stand where no description has them"
    return _added_up(trace, found)


def _norm(norms: list[tuple[Call, Norm]], tensor: torch.Tensor, end: str) -> tuple[Call, Norm] | None:
    return next((each for each in norms if same(getattr(each[0], end), tensor)), None)


def _added_up(trace: Trace, found: list[tuple[Branch, torch.Tensor, torch.Tensor]]) -> Layer | str:
    """Branches with the scales that they are added with: those of one input side by side, the others in order."""
    x, branches, gain = trace.input, [], None
    if any(result.numel() != x.numel() for _, _, result in found):
        return "what its modules give is not added to the residual stream alone"
    found = [(branch, source, result.reshape(x.shape)) for branch, source, result in found]
    while found:
        source = found[0][1]
        if source.numel() != x.numel() or not close(source.reshape(x.shape), x):
            return "what its modules give is not added to the residual stream alone"
        abreast = [each for each in found if same(each[1], source)]
        found = found[len(abreast) :]
        after = found[0][1] if found else trace.output
        total = torch.stack([result for _, _, result in abreast]).sum(0)
        scale = _scale(after - x, total, trace)
        if scale is None and not found:
            gain, scale = next(
                ((Held(name), by) for name, tensor in trace.singles.items()
                 if (by := _scale(after / tensor - x, total, trace)) is not None), (None, None)
            )  # fmt: skip
        if scale is None:
            return "what its modules give is not added to the residual stream alone"
        for i, (branch, *_) in enumerate(abreast):
            branches.append(Branch(branch.body, branch.before, branch.after, scale, i > 0))
        x = after
    given = frozenset(name for name, value in trace.given.items() if value is not None)
    return Layer(tuple(branches), trace.returns, given, gain)


def _scale(difference: torch.Tensor, result: torch.Tensor, trace: Trace) -> float | None:
    """The factor between results and what came to the stream: 1, or one that the layer has as a setting."""
    estimate = float((difference * result).sum() / result.square().sum())
    settings = [1.0, *trace.settings]
    nearest = min(settings, key=lambda setting: abs(setting - estimate))
    return nearest if close(difference, nearest * result) else None
