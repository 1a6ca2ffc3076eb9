"""PEFT's adapters around linear layers: what launches read of them, and layers of any kind with adapters beside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pkv_hf.patches.adapters import unwrapped
from pkv_hf.patches.projections.base import Modules, Normed, Projection
from pkv_hf.patches.projections.module import Own

if TYPE_CHECKING:
    from pkv_hf.kernels.products.adapters import Adapters


def bare(modules: Modules) -> tuple[Modules, Adapters | None] | str:
    """Modules without what PEFT has put around them, and what that adds; or why they are called as they are."""
    bases, of_each = [], []
    for module in modules:
        found = unwrapped(module)
        if isinstance(found, str):
            return found
        bases.append(found.base)
        of_each.append(found.adapters)
    if not any(of_each):
        return tuple(bases), None
    from pkv_hf.kernels.products.adapters import Adapter, Adapters

    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "adapters were not looked at before a CUDA graph was captured"
    try:
        return tuple(bases), Adapters([[Adapter(*each) for each in adapters] for adapters in of_each])
    except ValueError as error:
        return str(error)


class Beside(Own):
    """Layers of a kind that does not take adapters: what those add is a launch a layer, after one for all."""

    def __init__(self, kind: Projection, adapters: Adapters) -> None:
        super().__init__(kind.modules)
        self._kind, self.adapters, self.called = kind, adapters, kind.called

    @property
    def stored(self) -> str:
        return self._kind.stored

    def why_not(self, x: torch.Tensor) -> str:
        from pkv_hf.kernels.linear import DTYPES, MAX_ROWS

        if x.dtype not in DTYPES:
            return f"hidden states are {x.dtype}, with adapters"
        if len(x) > MAX_ROWS:
            return f"{len(x)} rows are more than {MAX_ROWS}, with adapters"
        return self._kind.why_not(x)

    def each(self, x: Normed) -> Sequence[torch.Tensor]:
        from pkv_hf.kernels.products.adapters import expand, shrink

        products = self._kind.each(x)
        shrunk = shrink(x.x, self.adapters, [product.shape[1] for product in products])
        return [
            product if outputs is None else expand(product.contiguous(), shrunk, i)
            for i, (product, outputs) in enumerate(zip(products, self.adapters.outputs))
        ]
