"""Layers with weights of 4 bits: our products read them as they are stored.

Libraries differ in how they store them, so that each has a kind of its own. What the bytes of evenly spaced values
stand for is judged by the layer itself, before anything is believed of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from pkv_hf.errors import first_line
from pkv_hf.patches.projections.base import Modules, Normed, Projection, named, why_not_from_bits

if TYPE_CHECKING:
    from pkv_hf.kernels.products.epilogue import Parts
    from pkv_hf.kernels.quantized.weights import AnyWeight4, Int4

ROWS, OUTPUTS = 2, 256
"""Random inputs that a layer's own forward is compared with, and the first outputs."""
ERROR = 2**-5
"""Of its results, relative: half precision rounds eight times finer, a zero point beside the right one is a fifth."""

_judged: WeakKeyDictionary[Any, tuple[Any, str]] = WeakKeyDictionary()
"""By layers: where their tensors were, and how they differed."""


class Bits4(Projection):
    """4-bit layers of one library with blocks, types and scales alike, all with a bias or none."""

    fuses = True

    def __init__(self, modules: Modules, weights: list[AnyWeight4]) -> None:
        super().__init__(modules)
        self.weights = weights
        self._outputs = [weight.outputs for weight in weights]

    @classmethod
    def weight_of(cls, module: Any) -> AnyWeight4 | str:
        """The weight of a layer as our kernels take it, or why it is not of this kind."""
        raise NotImplementedError

    @classmethod
    def read(cls, modules: Modules) -> Bits4 | str:
        from pkv_hf.kernels.quantized.weights import kind_of

        weights = []
        for module in modules:
            weight = cls.weight_of(module)
            if isinstance(weight, str):
                return weight
            weights.append(weight)
        kinds = {(weight.inputs, *kind_of(weight)) for weight in weights}
        if len(kinds) > 1 or len({module.bias is None for module in modules}) > 1:
            return f"a {named(modules[0])} and others beside it differ in how they are quantised, or in biases"
        return cls(modules, weights)

    @classmethod
    def dense(cls, weight: AnyWeight4) -> torch.Tensor:
        """What a weight stands for, in float32."""
        from pkv_hf.kernels.quantized.weights import dequantized

        return dequantized(weight, torch.float32)

    def why_not(self, x: torch.Tensor) -> str:
        return why_not_from_bits(self.modules, x, 4)

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
        return linear4(x.x, self.weights, biases, **settings, **x.settings)

    def each(self, x: Normed) -> Sequence[torch.Tensor]:
        return self.linear(x).split(self._outputs, dim=1)

    def gated(self, x: Normed, activation: str) -> torch.Tensor:
        from pkv_hf.kernels.elementwise import act_mul
        from pkv_hf.kernels.quantized.linear4 import gated4

        if len(self.modules) == 1:  # scales of the second half may begin inside a block of second scales
            return act_mul(*self.linear(x).chunk(2, dim=-1), activation)
        gate, up = (module.bias for module in self.modules)
        settings = {**x.settings, "adapters": self.adapters}
        return gated4(x.x, *self.weights, activation, bias_gate=gate, bias_up=up, **settings)

    def in_parts(self, x: torch.Tensor) -> Parts | None:
        from pkv_hf.kernels.quantized.linear4 import in_parts4

        (module,) = self.modules
        return in_parts4(x, self.weights[0], module.bias, self.adapters)


class EvenBits4(Bits4):
    """Layers of one library whose values are evenly spaced."""

    @classmethod
    def candidates(cls, module: Any) -> list[Int4] | str:
        """What a layer's weight may be by how it is stored, or why it is not of this kind."""
        raise NotImplementedError

    @classmethod
    def weight_of(cls, module: Any) -> AnyWeight4 | str:
        """The first of the candidates by which the layer's own forward multiplies."""
        found = cls.candidates(module)
        if isinstance(found, str):
            return found
        why = ""
        for weight in found:
            why = _wrong(module, weight) or _differs(module, weight)
            if not why:
                return weight
        return why

    @property
    def stored(self) -> str:
        return "int4"


def odd_blocks(module: Any, inputs: int, block: int) -> str:
    """Which blocks of a layer's kernels do not take; empty for none."""
    from pkv_hf.kernels.quantized.weights import GROUPS

    if block % GROUPS[-1] == 0 and inputs % block == 0:
        return ""
    return f"a {named(module)} of {inputs} inputs has blocks of {block}, no multiple of {GROUPS[-1]} that divides them"


def _wrong(module: Any, weight: Int4) -> str:
    """What of a layer's tensors kernels cannot take; empty for nothing."""
    name, tensors = named(module), [weight.packed, weight.scale, *([] if weight.zero is None else [weight.zero])]
    if any(tensor.device != weight.packed.device for tensor in tensors):
        return f"a {name} has scales elsewhere than its weight, which is on {weight.packed.device}"
    if why := odd_blocks(module, weight.inputs, weight.block):
        return why
    why = weight.wrong()
    return why and f"a {name} has a weight that is stored otherwise: {why.removeprefix('.')}"


def _differs(module: Any, weight: Int4) -> str:
    """How a layer's own forward differs from products with what its weight is taken to be; empty where it does not."""
    key = (*weight[3:], *(tensor.data_ptr() for tensor in weight.tensors))
    held = _judged.get(module)
    if held is None or held[0] != key:
        held = key, _compared(module, weight)
        _judged[module] = held
    return held[1]


@torch.no_grad()
def _compared(module: Any, weight: Int4) -> str:
    from pkv_hf.kernels.quantized.weights import dequantized

    name, scale = named(module), weight.scale
    generator = torch.Generator().manual_seed(0)  # of its own: the caller's random numbers are left where they were
    x = torch.randn(ROWS, weight.inputs, generator=generator, device="cpu").to(scale)
    part = weight.first(OUTPUTS)
    try:
        own = module.forward(x)[:, : part.outputs].float()
    except Exception as error:  # of a library without its kernels
        return f"a {name} does not run by itself: {type(error).__name__}: {first_line(error)}"
    exact = torch.nn.functional.linear(x.float(), dequantized(part, torch.float32))
    if module.bias is not None:
        exact += module.bias[: part.outputs].float()
    off = float((own - exact).square().mean() / exact.square().mean().clamp_min(1e-30)) ** 0.5
    return "" if off <= ERROR else f"a {name} multiplies by something else than its weight is stored as"
