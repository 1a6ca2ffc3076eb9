"""Layers with weights of 8 bits and scales: our products read the weights as they are stored.

Libraries differ in where they keep them, so that each has a kind of its own. Ours multiply x as it is, also where a
layer's own forward rounds x to 8 bits before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pkv_hf.patches.projections.base import Modules, named, why_not_from_bits
from pkv_hf.patches.projections.plain import Plain


class Weight8(NamedTuple):
    """A weight as `kernels.linear` reads it."""

    values: torch.Tensor
    """`[outputs, inputs]`, int8 or float8_e4m3fn."""
    scale: torch.Tensor
    """Float32, as `kernels.products.scales.Scales` has it."""
    unit: float = 1.0


class Scaled(Plain):
    """Layers of one library with weights of 8 bits, alike in how they are scaled, all with a bias or none."""

    def __init__(self, modules: Modules, weights: list[Weight8]) -> None:
        from pkv_hf.kernels.products.scales import Scales

        super().__init__(modules)
        self.weights = [weight.values for weight in weights]
        self.scales = Scales(tuple(weight.scale for weight in weights), weights[0].unit)

    @classmethod
    def weight_of(cls, module: Any) -> Weight8 | str:
        """The weight of a layer, or why it is not of this kind."""
        raise NotImplementedError

    @classmethod
    def read(cls, modules: Modules) -> Plain | str:
        weights = []
        for module in modules:
            weight = cls.weight_of(module)
            if isinstance(weight, str):
                return weight
            for tensor in weight[:2]:
                if type(tensor) is not torch.Tensor or not tensor.is_contiguous():
                    return f"a {named(module)} has a weight or scales that are no plain contiguous tensors"
            if weight.scale.device != weight.values.device:
                return f"a {named(module)} has scales elsewhere than its weight, which is on {weight.values.device}"
            weights.append(weight)
        if len({module.bias is None for module in modules}) > 1:
            return f"a {named(modules[0])} has a bias where others beside it have none, or none where they have one"
        return cls(modules, weights)

    @classmethod
    def dense(cls, weight: Weight8) -> torch.Tensor:
        """What a weight stands for, in float32."""
        from pkv_hf.kernels.products.scales import dequantized

        return dequantized(*weight, torch.float32)

    def why_not(self, x: torch.Tensor) -> str:
        from pkv_hf.kernels.launch import has_dtypes

        if not has_dtypes(x.device, self.weights[0].dtype):
            return f"this GPU does not convert weights of {self.weights[0].dtype}"
        return why_not_from_bits(self.modules, x, 8)
