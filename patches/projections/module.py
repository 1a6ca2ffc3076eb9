"""Any module: its own forward, between fused norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pkv_hf.patches.projections.base import Modules, Normed, Projection


class Own(Projection):
    """Modules that are called as they are; the kind that takes everything."""

    called = True

    @classmethod
    def read(cls, modules: Modules) -> Own:
        return cls(modules)

    def why_not(self, x: torch.Tensor) -> str:
        return ""

    def linear(
        self,
        x: Normed,
        *,
        residual: torch.Tensor | None = None,
        scale: float = 1.0,
        activation: str | None = None,
    ) -> torch.Tensor:
        from pkv_hf.kernels.elementwise import act

        assert residual is None and scale == 1.0  # noqa: PT018
        products = self.each(x)
        y = products[0] if len(products) == 1 else torch.cat(tuple(products), dim=1)
        return y if activation is None else act(y, activation)

    def each(self, x: Normed) -> Sequence[torch.Tensor]:
        return [module(x.x) for module in self.modules]

    def gated(self, x: Normed, activation: str) -> torch.Tensor:
        from pkv_hf.kernels.elementwise import act_mul

        products = self.each(x)
        gate, up = products if len(products) == 2 else products[0].chunk(2, dim=-1)
        return act_mul(gate, up, activation)
