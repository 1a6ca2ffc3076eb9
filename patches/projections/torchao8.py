"""Plain layers whose weights are torchao's int8 tensors, weight-only: int8 with a scale a row."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from pkv_hf.patches.projections.base import Foreign, named
from pkv_hf.patches.projections.scaled import Scaled, Weight8


class TorchAO8(Scaled):
    """Linear layers whose weight is one of torchao's `Int8Tensor`, which does not quantise inputs.

    A product with scales of rows has no use for the tensor's `zero_point`, torchao's own neither.
    """

    @classmethod
    def weight_of(cls, module: Any) -> Weight8 | str:
        name = named(module)
        tensor_class = getattr(sys.modules.get("torchao.quantization"), "Int8Tensor", None)
        if type(module) is not nn.Linear or "forward" in vars(module):
            return Foreign(f"a {name} is no plain layer with a tensor of torchao")
        weight: Any = module.weight
        if tensor_class is None or type(weight) is not tensor_class:
            return Foreign(f"a {name} keeps its weight as a {named(weight)}, no int8 tensor of torchao")
        if weight.act_quant_kwargs is not None or weight.act_pre_scale is not None:
            return f"a {name} quantises or scales its inputs by torchao"
        values, scale, inputs = weight.qdata, weight.scale, weight.shape[-1]
        if list(weight.block_size) != [1, inputs] or scale.shape != (len(values), 1):
            return f"a {name} has scales of blocks of {list(weight.block_size)}, not of rows"
        if values.dtype != torch.int8 or scale.dtype != torch.float32:
            return f"a {name} has a weight of {values.dtype} and scales of {scale.dtype}"
        return Weight8(values, scale.flatten())
