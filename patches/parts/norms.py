"""Norms, recognised by what they did with their inputs in a recorded run: never by their names."""

from __future__ import annotations

import functools
import itertools

import torch

from pkv_hf.kernels import reference
from pkv_hf.patches.description import Norm, Ref
from pkv_hf.patches.trace import Call

CLOSE = 1e-4
"""How far results of the same float32 arithmetic in another order may lie apart, by their root mean square."""

EPSILONS = (1e-5, 1e-6)
"""Of norms that have theirs in their code (OLMo)."""

QUIET, LOUD = 1e-2, 1e2
"""What inputs are multiplied by where a part is tried again: an epsilon shows in small ones, a clamp in large ones."""


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
