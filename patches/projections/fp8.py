"""`FP8Linear` of transformers (fine-grained fp8, as of DeepSeek-V3): float8_e4m3fn with a scale for 128 x 128 weights.

GPUs before sm_89 have no conversion of fp8; there such layers are called as they are.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from pkv_hf.patches.projections.base import Foreign, named
from pkv_hf.patches.projections.scaled import Scaled, Weight8


class FP8(Scaled):
    """Layers of fp8 that quantise their inputs as they come, in blocks of 128 x 128."""

    @classmethod
    def weight_of(cls, module: Any) -> Weight8 | str:
        from pkv_hf.kernels.products.scales import BLOCK

        name, library = named(module), sys.modules.get("transformers.integrations.finegrained_fp8")
        own = getattr(getattr(library, "FP8Linear", None), "forward", None)
        if own is None or type(module).forward is not own or "forward" in vars(module):
            return Foreign(f"a {name} is no layer of transformers' fine-grained fp8")
        values = module.weight.data
        if values.dtype != torch.float8_e4m3fn:
            return f"a {name} has a weight of {values.dtype}"
        if module.activation_scale is not None:
            return f"a {name} quantises its inputs by a scale that is given"
        blocks = module.block_size
        if blocks is None or tuple(blocks) != (BLOCK, BLOCK):
            return f"a {name} has scales of blocks of {blocks}, not of [{BLOCK}, {BLOCK}]"
        scale = module.weight_scale_inv.data
        want = tuple(-(-size // BLOCK) for size in values.shape)
        if scale.dtype != torch.float32 or scale.shape != want:
            return f"a {name} has scales {scale.dtype} {list(scale.shape)}, not float32 {list(want)}"
        return Weight8(values, scale)
