"""`Linear4bit` of bitsandbytes, NF4 and FP4: our products read the bytes that it stores."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pkv_hf.patches.projections.base import Foreign, Modules, Normed, Projection, named

if TYPE_CHECKING:
    from pkv_hf.kernels.products.epilogue import Parts
    from pkv_hf.kernels.quantized.weights import Weight4


def is_linear4(module: Any) -> bool:
    """Whether a module's forward is that of bitsandbytes' 4-bit layers, where that is loaded."""
    library: Any = sys.modules.get("bitsandbytes.nn.modules")
    own = getattr(getattr(library, "Linear4bit", None), "forward", None)
    return own is not None and type(module).forward is own and "forward" not in vars(module)


def compute_in_float32(module: Any) -> None:
    """Has such a layer multiply float32 inputs by its weights as float32; others stay as they are."""
    if is_linear4(module):
        module.compute_dtype, module.compute_type_is_set = torch.float32, True


class Linear4(Projection):
    """4-bit layers with blocks, types and scales alike, all with a bias or none."""

    fuses = True

    def __init__(self, modules: Modules, weights: list[Weight4]) -> None:
        super().__init__(modules)
        self._weights = weights
        self._outputs = [weight.outputs for weight in weights]

    @classmethod
    def read(cls, modules: Modules) -> Linear4 | str:
        weights = []
        for module in modules:
            weight = _weight_of(module)
            if isinstance(weight, str):
                return weight
            weights.append(weight)
        kinds = {(weight.inputs, weight.block, weight.quant_type, weight.nested is None) for weight in weights}
        if len(kinds) > 1 or len({module.bias is None for module in modules}) > 1:
            return f"a {named(modules[0])} and others beside it differ in how they are quantised, or in biases"
        return cls(modules, weights)

    @property
    def stored(self) -> str:
        return self._weights[0].quant_type.upper()

    def why_not(self, x: torch.Tensor) -> str:
        from pkv_hf.kernels.launch import capability
        from pkv_hf.kernels.linear import DTYPES
        from pkv_hf.kernels.quantized.blocks import most_rows

        if x.dtype not in DTYPES:
            return f"hidden states are {x.dtype}, and products with 4 bits are of fp16 and bf16"
        for module in self.modules:
            if module.compute_dtype not in (None, x.dtype):
                return f"a {named(module)} computes in {module.compute_dtype}, hidden states are {x.dtype}"
            if module.bias is not None and module.bias.dtype != x.dtype:
                return f"a {named(module)} has a bias of {module.bias.dtype}, hidden states are {x.dtype}"
        most = most_rows(capability(x.device))
        return f"{len(x)} rows are more than {most}" if len(x) > most else ""

    def linear(
        self,
        x: Normed,
        *,
        residual: torch.Tensor | None = None,
        scale: float = 1.0,
        activation: str | None = None,
    ) -> torch.Tensor:
        from pkv_hf.kernels.quantized.linear4 import linear4

        biases = [module.bias for module in self.modules]
        settings: dict[str, Any] = {"residual": residual, "scale": scale, "activation": activation}
        settings["adapters"] = self.adapters
        return linear4(x.x, self._weights, biases, **settings, **x.settings)

    def each(self, x: Normed) -> Sequence[torch.Tensor]:
        return self.linear(x).split(self._outputs, dim=1)

    def gated(self, x: Normed, activation: str) -> torch.Tensor:
        from pkv_hf.kernels.elementwise import act_mul
        from pkv_hf.kernels.quantized.linear4 import gated4

        if len(self.modules) == 1:  # scales of the second half may begin inside a block of second scales
            return act_mul(*self.linear(x).chunk(2, dim=-1), activation)
        gate, up = (module.bias for module in self.modules)
        settings = {**x.settings, "adapters": self.adapters}
        return gated4(x.x, *self._weights, activation, bias_gate=gate, bias_up=up, **settings)

    def in_parts(self, x: torch.Tensor) -> Parts | None:
        from pkv_hf.kernels.quantized.linear4 import in_parts4

        (module,) = self.modules
        return in_parts4(x, self._weights[0], module.bias, self.adapters)


def _weight_of(module: Any) -> Weight4 | str:
    """The weight of a 4-bit layer as our kernels take it, or why they do not."""
    from pkv_hf.kernels.quantized.weights import GROUP, NESTED, Nested, Weight4

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
    if state.blocksize % GROUP or inputs % state.blocksize:
        return f"a {name} of {inputs} inputs has blocks of {state.blocksize}, no multiple of {GROUP} that divides them"
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
    return Weight4(packed.data, state.absmax, outputs, inputs, state.blocksize, state.quant_type, nested)
