"""Which kind multiplies: the first that takes the modules and the rows at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pkv_hf.patches.projections.base import Foreign, Modules, Projection
from pkv_hf.patches.projections.bits4 import Bits4
from pkv_hf.patches.projections.bnb4 import Linear4, compute_in_float32
from pkv_hf.patches.projections.bnb8 import Linear8
from pkv_hf.patches.projections.fp8 import FP8
from pkv_hf.patches.projections.gptq4 import GPTQ4
from pkv_hf.patches.projections.lora import Beside, bare
from pkv_hf.patches.projections.module import Own
from pkv_hf.patches.projections.plain import Plain
from pkv_hf.patches.projections.torchao4 import TorchAO4
from pkv_hf.patches.projections.torchao8 import TorchAO8
from pkv_hf.runtime.fusion import Multiplied

EXPANDED = (Linear8, TorchAO8, FP8, TorchAO4, GPTQ4)
"""Kinds whose layers cannot be told to multiply float32 by float32."""
KINDS: tuple[type[Projection], ...] = (Plain, Linear4, *EXPANDED, Own)
"""In the order in which they are asked; the last takes everything."""


def in_float32(root: nn.Module) -> None:
    """Has quantised layers inside a module multiply float32 by what their weights stand for, where a kind reads them.

    Those of bitsandbytes with 4 bits are told to; others, which may round their inputs too, are replaced.
    """
    for name, module in [*root.named_modules()]:
        compute_in_float32(module)
        for kind in EXPANDED if name else ():
            weight: Any = kind.weight_of(module)
            if not isinstance(weight, str):
                root.set_submodule(name, _with(kind.dense(weight), module.bias))
                break


def _with(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A float32 layer of a weight `[outputs, inputs]` and a bias."""
    made = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return made


class Kinds:
    """Chooses kinds. It remembers what it has read of modules, so it may live no longer than they stay as they are."""

    def __init__(self) -> None:
        self._read: dict[Modules, tuple[list[Projection], list[str]]] = {}

    def __call__(self, modules: Modules, x: torch.Tensor) -> Projection:
        """The first kind that takes the modules' products with x `[rows, inputs]`."""
        kinds, _ = self._of(modules)
        for kind in kinds[:-1]:
            if not kind.why_not(x):
                return kind
        return kinds[-1]

    def why_own(self, modules: Modules, x: torch.Tensor) -> list[str]:
        """Why the modules' own forwards run for x, by the kinds that know them; empty where products are ours."""
        if not self(modules, x).called:
            return []
        kinds, reasons = self._of(modules)
        found = [*reasons, *(kind.why_not(x) for kind in kinds if not kind.called)]
        return [reason for reason in found if not isinstance(reason, Foreign)] or found

    def count(self, found: Multiplied, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        """Adds to `found` how the modules that were read multiply that many rows of hidden states."""
        for modules in self._read:
            x = torch.empty(rows, getattr(modules[0], "in_features", 1), dtype=dtype, device=device)
            if why := self.why_own(modules, x):
                found.own[" and ".join(why)] += len(modules)
            else:
                kind = self(modules, x)
                found.ours[kind.stored + " with adapters" * (kind.adapters is not None)] += len(modules)

    def read(self, modules: Modules) -> None:
        """Reads the modules, so that nothing is left to be read while a CUDA graph is captured."""
        self._of(modules)

    def _of(self, modules: Modules) -> tuple[list[Projection], list[str]]:
        """The kinds that take the modules with some x, and why the others do not."""
        if modules not in self._read:
            self._read[modules] = _read(modules)
        return self._read[modules]


def _read(modules: Modules) -> tuple[list[Projection], list[str]]:
    """The kinds that take modules, with adapters where there are such; at last the modules as they are."""
    found = bare(modules)
    if isinstance(found, str):
        return [Own(modules)], [found]
    bases, adapters = found
    kinds: list[Projection] = []
    reasons: list[str] = []
    for kind in KINDS:
        projection = kind.read(bases)
        if isinstance(projection, str):
            reasons.append(projection)
        elif adapters is None:
            kinds.append(projection)
        elif isinstance(projection, (Plain, Bits4)):
            projection.adapters = adapters
            kinds.append(projection)
        else:
            kinds.append(Beside(projection, adapters))
    return (kinds if adapters is None else [*kinds, Own(modules)]), reasons
