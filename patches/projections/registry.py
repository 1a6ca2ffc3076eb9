"""Which kind multiplies: the first that takes the modules and the rows at hand."""

from __future__ import annotations

import torch

from pkv_hf.patches.projections.base import Modules, Projection
from pkv_hf.patches.projections.bnb4 import Linear4
from pkv_hf.patches.projections.module import Own
from pkv_hf.patches.projections.plain import Plain

KINDS: tuple[type[Projection], ...] = (Plain, Linear4, Own)
"""In the order in which they are asked; the last takes everything."""


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
        """Why the modules' own forwards run for x, a reason for each kind before; empty where another kind runs."""
        kinds, reasons = self._of(modules)
        found = [*reasons, *(kind.why_not(x) for kind in kinds[:-1])]
        return found if all(found) else []

    def _of(self, modules: Modules) -> tuple[list[Projection], list[str]]:
        """The kinds that take the modules with some x, and why the others do not."""
        if modules not in self._read:
            found = [kind.read(modules) for kind in KINDS]
            kinds = [each for each in found if not isinstance(each, str)]
            self._read[modules] = kinds, [each for each in found if isinstance(each, str)]
        return self._read[modules]
