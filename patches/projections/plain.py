"""`nn.Linear` in fp16 or bf16: our products read the weights as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pkv_hf.patches.projections.base import Foreign, Modules, Normed, Projection, named

if TYPE_CHECKING:
    from pkv_hf.kernels.products.epilogue import Parts
    from pkv_hf.kernels.products.scales import Scales


class Plain(Projection):
    """Plain linear layers, all with a bias or none, and what adapters of theirs add."""

    fuses = True

    def __init__(self, modules: Modules) -> None:
        super().__init__(modules)
        self.scales: Scales | None = None
        """Of weights of 8 bits."""
        self.weights: Sequence[torch.Tensor] = [module.weight for module in modules]
        self._outputs = [len(weight) for weight in self.weights]

    @classmethod
    def read(cls, modules: Modules) -> Plain | str:
        """A quantised or sharded weight can be a subclass of tensor in a plain layer, and give its dtype as the plain
        one's."""
        from pkv_hf.kernels.linear import DTYPES

        for module in modules:
            if type(module) is not nn.Linear:
                return Foreign(f"a {named(module)} is no plain linear layer")
            if type(module.weight) is not nn.Parameter:
                return f"a {named(module)} keeps its weight as a {named(module.weight)}"
            if module.weight.dtype not in DTYPES or module.weight.dtype != modules[0].weight.dtype:
                return f"a {named(module)} has a weight of {module.weight.dtype}"
            if not module.weight.is_contiguous():
                return f"a {named(module)} has a weight that is not contiguous"
            if (module.bias is None) != (modules[0].bias is None):
                return f"a {named(module)} has a bias where others beside it have none"
        return cls(modules)

    @property
    def stored(self) -> str:
        return str(self.weights[0].dtype).removeprefix("torch.")

    def why_not(self, x: torch.Tensor) -> str:
        from pkv_hf.kernels.linear import MAX_ROWS, outruns_cublas

        if x.dtype != self.weights[0].dtype:
            return f"hidden states are {x.dtype}, weights {self.weights[0].dtype}"
        if len(x) > MAX_ROWS:
            return f"{len(x)} rows are more than {MAX_ROWS}"
        if not outruns_cublas(x, sum(self._outputs)):
            return f"this GPU's own products of {len(x)} rows and {sum(self._outputs)} outputs are faster"
        return ""

    def linear(
        self,
        x: Normed,
        *,
        residual: torch.Tensor | None = None,
        scale: float = 1.0,
        activation: str | None = None,
    ) -> torch.Tensor:
        from pkv_hf.kernels.linear import linear

        biases = [module.bias for module in self.modules]
        settings: dict[str, Any] = {**x.settings, "adapters": self.adapters, "scales": self.scales}
        return linear(x.x, self.weights, biases, residual=residual, scale=scale, activation=activation, **settings)

    def each(self, x: Normed) -> Sequence[torch.Tensor]:
        return self.linear(x).split(self._outputs, dim=1)

    def gated(self, x: Normed, activation: str) -> torch.Tensor:
        from pkv_hf.kernels.elementwise import act_mul
        from pkv_hf.kernels.linear import gated

        if len(self.modules) == 1 and (self.adapters or self.scales):  # which are not cut in halves
            return act_mul(*self.linear(x).chunk(2, dim=1), activation)
        weights, biases = self.weights, [module.bias for module in self.modules]
        if len(self.modules) == 1:
            weights = weights[0].chunk(2)
            biases = [None, None] if biases[0] is None else list(biases[0].chunk(2))
        settings: dict[str, Any] = {**x.settings, "adapters": self.adapters, "scales": self.scales}
        return gated(x.x, *weights, activation, bias_gate=biases[0], bias_up=biases[1], **settings)

    def in_parts(self, x: torch.Tensor) -> Parts | None:
        from pkv_hf.kernels.linear import in_parts

        (module,) = self.modules
        return in_parts(x, self.weights[0], module.bias, self.adapters, self.scales)
