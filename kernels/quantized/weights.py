"""A weight of 4 bits as bitsandbytes stores it, and in torch what it stands for."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pkv_hf.kernels.quantized.codes import VALUES

GROUP = 64
"""Inputs of one scale at least: what kernels multiply at a time."""

NESTED = 256
"""Scales of one second scale."""


class Nested(NamedTuple):
    """What 8-bit scales stand for: code[scale] * absmax[i // 256] + offset."""

    code: torch.Tensor
    """Float32 `[256]`."""
    absmax: torch.Tensor
    """Float32, one for 256 scales."""
    offset: torch.Tensor
    """Float32 `[]`."""


class Weight4(NamedTuple):
    """A weight `[outputs, inputs]`: value[4 bits] * scale, a scale for `block` weights of a row after each other."""

    packed: torch.Tensor
    """uint8, two weights a byte, the first in the high four bits; contiguous, rows after each other."""
    absmax: torch.Tensor
    """The scales: float32, or uint8 where they are `nested`."""
    outputs: int
    inputs: int
    block: int
    quant_type: str
    """A name in `codes.VALUES`."""
    nested: Nested | None = None

    def tensors(self, element: torch.dtype = torch.uint16) -> tuple[torch.Tensor, ...]:
        """As kernels take them: weights as elements of 16 or 32 bits, scales, and those's code, absmax and offset."""
        return (self.packed.view(-1).view(element), self.absmax, *(self.nested or (self.absmax,) * 3))

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return self.packed.nbytes + self.absmax.nbytes + (self.nested.absmax.nbytes if self.nested else 0)


def scales(weight: Weight4, dtype: torch.dtype) -> torch.Tensor:
    """The scale of every block of weights, `[outputs * inputs / block]`."""
    if weight.nested is None:
        return weight.absmax.to(dtype)
    code, absmax, offset = (each.to(dtype) for each in weight.nested)
    return code[weight.absmax.long()] * absmax.repeat_interleave(NESTED)[: len(weight.absmax)] + offset


def dequantized(weight: Weight4, dtype: torch.dtype) -> torch.Tensor:
    """The weight `[outputs, inputs]`, computed in a dtype: what kernels are judged by in float64."""
    packed = weight.packed.view(-1, 1).long()
    values = torch.tensor(VALUES[weight.quant_type], device=packed.device, dtype=torch.float32).to(dtype)
    found = values[torch.cat([packed >> 4, packed & 15], dim=1)].view(-1, weight.block)
    return (found * scales(weight, dtype)[:, None]).view(weight.outputs, weight.inputs)
