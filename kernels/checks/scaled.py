"""Weights of 8 bits with scales, drawn for random cases, and what they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pkv_hf.kernels.products.scales import BLOCK, DTYPES, OF_ROWS, Scales, dequantized

if TYPE_CHECKING:
    from pkv_hf.kernels.checks.layers import Draw

UNITS = (1.0, 1 / 127)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
HELD = (None, *DTYPES)
"""Dtypes of weights beside that of x, None for that."""


def drawn_scaled(
    draw: Draw, outputs: tuple[int, ...], inputs: int, held: torch.dtype, of: int, unit: float
) -> tuple[list[torch.Tensor], Scales]:
    """Weights `[outputs, inputs]` of 8 bits, and scales that make results about as large as inputs."""
    weights, tensors = [], []
    for count in outputs:
        values = draw(count, inputs, scale=LARGEST[held] / 4, dtype=torch.float32).clamp(-LARGEST[held], LARGEST[held])
        weights.append(draw.copy(values.round() if held == torch.int8 else values, held))
        shape = (count,) if of == OF_ROWS else (-(-count // BLOCK), -(-inputs // BLOCK))
        scale = 4 / LARGEST[held] / (unit if of == OF_ROWS else 1.0) * inputs**-0.5
        tensors.append(draw(*shape, dtype=torch.float32).abs_().add_(0.5).mul_(scale))
    return weights, Scales(tuple(tensors), unit)


def in_dtype(weights: list[torch.Tensor], scales: Scales | None, dtype: torch.dtype) -> list[torch.Tensor]:
    """Weights in a dtype as modules compute them: with scales, in float32 at least, and rounded."""
    if scales is None:
        return [weight.to(dtype) for weight in weights]
    wide = torch.promote_types(dtype, torch.float32)
    return [dequantized(*each, scales.unit, wide).to(dtype) for each in zip(weights, scales.tensors)]
