"""Plain layers whose weights are torchao's int4 tensors, weight-only.

Read are the plain tensors, whose own forward needs a library of kernels, and the tiles of torch's tinygemm.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pkv_hf.patches.projections.base import Foreign, named
from pkv_hf.patches.projections.bits4 import EvenBits4

if TYPE_CHECKING:
    from pkv_hf.kernels.quantized.weights import Int4


FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class TorchAO4(EvenBits4):
    """Linear layers whose weight is a plain or a tiled int4 tensor of torchao's, which does not quantise inputs."""

    @classmethod
    def candidates(cls, module: Any) -> list[Int4] | str:
        from pkv_hf.kernels.quantized.weights import Int4

        name = named(module)
        if type(module) is not nn.Linear or "forward" in vars(module):
            return Foreign(f"a {name} is no plain layer with a tensor of torchao")
        weight: Any = module.weight
        library = sys.modules.get("torchao.quantization")
        plain, tiled, *others = (
            getattr(library, f"Int4{which}Tensor", None)
            for which in ("", "TilePackedTo4d", "Preshuffled", "PlainInt32")
        )
        if library is None or type(weight) not in (plain, tiled, *others):
            return Foreign(f"a {name} keeps its weight as a {named(weight)}, no int4 tensor of torchao")
        if type(weight) not in (plain, tiled):
            return f"a {name} keeps its weight as a {named(weight)}, in an order that no kernel here reads"
        if weight.act_pre_scale is not None or getattr(weight, "activation_dtype", None) in FLOAT8:
            return f"a {name} quantises or scales its inputs by torchao"
        outputs, inputs = weight.shape
        first, block = weight.block_size
        if first != 1:
            return f"a {name} has scales of blocks of {list(weight.block_size)}, not of groups of inputs"
        shape = outputs, inputs, block
        if type(weight) is tiled:
            return [Int4(weight.qdata, weight.scale_and_zero, None, *shape, "uint4", "tiles", "pairs")]
        return [Int4(weight.qdata, weight.scale, weight.zero_point, *shape, "int4", "rows", "shifted")]
