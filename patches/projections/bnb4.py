"""`Linear4bit` of bitsandbytes, NF4 and FP4: our products read the bytes that it stores."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

from pkv_hf.patches.projections.base import Foreign, named
from pkv_hf.patches.projections.bits4 import Bits4, odd_blocks

if TYPE_CHECKING:
    from pkv_hf.kernels.quantized.weights import AnyWeight4


def is_linear4(module: Any) -> bool:
    """Whether a module's forward is that of bitsandbytes' 4-bit layers, where that is loaded."""
    library: Any = sys.modules.get("bitsandbytes.nn.modules")
    own = getattr(getattr(library, "Linear4bit", None), "forward", None)
    return own is not None and type(module).forward is own and "forward" not in vars(module)


def compute_in_float32(module: Any) -> None:
    """Has such a layer multiply float32 inputs by its weights as float32; others stay as they are."""
    if is_linear4(module):
        module.compute_dtype, module.compute_type_is_set = torch.float32, True


class Linear4(Bits4):
    """4-bit layers of bitsandbytes, NF4 or FP4."""

    @property
    def stored(self) -> str:
        return self.weights[0].quant_type.upper()

    def why_not(self, x: torch.Tensor) -> str:
        if why := super().why_not(x):
            return why
        for module in self.modules:
            if module.compute_dtype not in (None, x.dtype):
                return f"a {named(module)} computes in {module.compute_dtype}, hidden states are {x.dtype}"
        return ""

    @classmethod
    def weight_of(cls, module: Any) -> AnyWeight4 | str:
        from pkv_hf.kernels.quantized.weights import NESTED, Nested, Weight4

        name = named(module)
        if not is_linear4(module):
            return Foreign(f"a {name} is no 4-bit layer of bitsandbytes")
        packed: Any = module.weight
        state: Any = getattr(packed, "quant_state", None) or module.quant_state
        if state is None:
            return f"a {name} has a weight that is not quantised"
        if type(packed) is not sys.modules["bitsandbytes.nn.modules"].Params4bit:
            return f"a {name} keeps its weight as a {named(packed)}"
        if getattr(state, "packing_format_for_cpu", False) or packed.dtype != torch.uint8:
            return f"a {name} stores its weight as {packed.dtype}, in another order or not in bytes"
        outputs, inputs = state.shape
        if (outputs, inputs) != (module.out_features, module.in_features):
            return f"a {name} has a weight of {list(state.shape)}, not of [{module.out_features}, {module.in_features}]"
        if why := odd_blocks(module, inputs, state.blocksize):
            return why
        nested = None
        if state.nested:
            if state.state2.blocksize != NESTED:
                return f"a {name} has scales in blocks of {state.state2.blocksize}, not of {NESTED}"
            nested = Nested(state.state2.code, state.state2.absmax, state.offset)
        tensors = [state.absmax, *(nested or ())]
        if any(type(tensor) is not torch.Tensor or tensor.device != packed.device for tensor in tensors):
            return f"a {name} has scales elsewhere than its weight, which is on {packed.device}"
        if not all(tensor.is_contiguous() for tensor in (packed, *tensors)):
            return f"a {name} has a weight or scales that are not contiguous"
        if packed.data_ptr() % 4:
            return f"a {name} has a weight that begins inside a word"
        return Weight4(packed.data, state.absmax, outputs, inputs, state.blocksize, state.quant_type, nested)
