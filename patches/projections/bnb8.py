"""`Linear8bitLt` of bitsandbytes (LLM.int8(), Dettmers et al. 2022), without outliers: int8 with a scale a row."""

from __future__ import annotations

import sys
from typing import Any

import torch

from pkv_hf.patches.projections.base import Foreign, named
from pkv_hf.patches.projections.scaled import Scaled, Weight8

UNIT = 1 / 127
"""What scales count in: they are the rows' largest values."""


class Linear8(Scaled):
    """8-bit layers whose threshold is 0: others multiply inputs beyond it apart, in the half type."""

    @classmethod
    def weight_of(cls, module: Any) -> Weight8 | str:
        """The first call moves weight and scales from the parameter to `state`; both stay where they are stored."""
        name, library = named(module), sys.modules.get("bitsandbytes.nn.modules")
        own = getattr(getattr(library, "Linear8bitLt", None), "forward", None)
        if own is None or type(module).forward is not own or "forward" in vars(module):
            return Foreign(f"a {name} is no 8-bit layer of bitsandbytes")
        state, weight = module.state, module.weight
        if state.has_fp16_weights:
            return f"a {name} keeps its weight as {weight.dtype}"
        if state.threshold:
            return f"a {name} multiplies inputs beyond a threshold of {state.threshold:g} apart"
        held = weight if getattr(weight, "CB", None) is not None else state
        values, scale, shape = held.CB, held.SCB, (module.out_features, module.in_features)
        if values is None or scale is None:
            return f"a {name} has a weight that is not quantised"
        if values.dtype != torch.int8 or values.shape != shape or scale.shape != shape[:1]:
            return f"a {name} has a weight of {values.dtype} {list(values.shape)} and scales {list(scale.shape)}"
        if scale.dtype != torch.float32:
            return f"a {name} has scales of {scale.dtype}"
        return Weight8(values.data, scale.data, UNIT)
