"""Layers of 4 bits that keep weights as GPTQ checkpoints do (Frantar et al. 2023), in words of 8 inputs.

They are known by their tensors: `qweight`, `qzeros`, `scales` and `g_idx`. Libraries store zero points as they are or
less 1, which shows in what a layer computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pkv_hf.patches.projections.base import Foreign, Modules, named
from pkv_hf.patches.projections.bits4 import Bits4, EvenBits4

if TYPE_CHECKING:
    from pkv_hf.kernels.quantized.weights import Int4

NAMES = ("qweight", "qzeros", "scales")


class GPTQ4(EvenBits4):
    """Layers of 4 bits whose groups are of inputs that follow each other."""

    @classmethod
    def read(cls, modules: Modules) -> Bits4 | str:
        """Zero points that are all in the middle are not read: weights side by side have such, or have others."""
        found = super().read(modules)
        if isinstance(found, GPTQ4) and all(_is_centered(weight) for weight in found.weights):
            found.weights = [weight._replace(zero=None, scaled="groups") for weight in found.weights]
        return found

    @classmethod
    def candidates(cls, module: Any) -> list[Int4] | str:
        from pkv_hf.kernels.quantized.weights import Int4

        name, held = named(module), [getattr(module, tensor, None) for tensor in NAMES]
        tensors = [tensor.detach() for tensor in held if isinstance(tensor, torch.Tensor) and tensor.ndim == 2]
        if len(tensors) < len(NAMES) or "forward" in vars(module):
            return Foreign(f"a {name} has no packed weights of GPTQ")
        packed, zeros, scales = tensors
        groups, outputs = scales.shape
        inputs = getattr(module, "in_features", 8 * len(packed))
        if getattr(module, "bits", 4) != 4:
            return f"a {name} has weights of {module.bits} bits"
        if packed.dtype != torch.int32 or packed.shape != (inputs // 8, outputs) or inputs % groups:
            return f"a {name} packs weights as {packed.dtype} {list(packed.shape)}, not in words of 8 inputs"
        order = getattr(module, "g_idx", None)
        if order is not None and order.numel() and not _in_order(order, inputs, inputs // groups):
            return f"a {name} has groups of inputs that do not follow each other (desc_act)"
        return [
            Int4(packed, scales, zeros, outputs, inputs, inputs // groups, "uint4", "words", scaled)
            for scaled in ("zeros", "zeros from 1")
        ]


def _in_order(order: torch.Tensor, inputs: int, block: int) -> bool:
    return torch.equal(order.cpu().long(), torch.arange(inputs) // block)


def _is_centered(weight: Any) -> bool:
    """Whether 8 is zero everywhere."""
    stored = 0x77777777 if weight.scaled == "zeros from 1" else 0x88888888 - (1 << 32)
    return bool((weight.zero == stored).all())
