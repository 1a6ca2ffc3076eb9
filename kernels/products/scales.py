"""What weights of 8 bits are multiplied by, a row's or a block's scale each, and in torch what they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pkv_hf.kernels.launch import has_dtypes

DTYPES = (torch.int8, torch.float8_e4m3fn)
"""Of weights with scales."""

OF_ROWS, OF_BLOCKS = 1, 2
"""What a scale is of."""

BLOCK = 128
"""Outputs and inputs of a block that has one scale; blocks of a launch divide it, or are multiples of it in inputs."""


class Scales(NamedTuple):
    """The scales of one to three weights, a tensor each, all of rows or all of blocks."""

    tensors: tuple[torch.Tensor, ...]
    """Float32, contiguous: `[outputs]`, of rows, or `[outputs / 128, inputs / 128]`, rounded up, of blocks."""
    unit: float = 1.0
    """What scales of rows count in."""

    @property
    def of(self) -> int:
        return OF_ROWS if self.tensors[0].ndim == 1 else OF_BLOCKS


def check_scales(x: torch.Tensor, weights: Sequence[torch.Tensor], scales: Scales) -> None:
    """Raises ValueError, naming the argument, unless these are the scales of weights `[outputs, inputs]` of 8 bits."""
    if len(scales.tensors) != len(weights):
        raise ValueError(f"scales are of {len(scales.tensors)} weights: want {len(weights)}")
    if not has_dtypes(x.device, *(weight.dtype for weight in weights)):
        raise ValueError(f"weights are {weights[0].dtype}, which this GPU does not convert: multiply them in torch")
    for place, (weight, scale) in enumerate(zip(weights, scales.tensors)):
        of_blocks = tuple(-(-size // BLOCK) for size in weight.shape)
        want = weight.shape[:1] if scales.of == OF_ROWS else of_blocks
        if scale.dtype != torch.float32 or scale.shape != want or not scale.is_contiguous():
            raise ValueError(
                f"scales.tensors[{place}] is {scale.dtype} {list(scale.shape)}: want contiguous float32 {list(want)}"
            )


def dequantized(weight: torch.Tensor, scale: torch.Tensor, unit: float, dtype: torch.dtype) -> torch.Tensor:
    """The weight `[outputs, inputs]` that a weight and its scales stand for, computed in a dtype."""
    if scale.ndim == 1:
        return weight.to(dtype) * (scale.to(dtype) * unit)[:, None]
    outputs, inputs = weight.shape
    wide = scale.to(dtype).repeat_interleave(BLOCK, 0)[:outputs].repeat_interleave(BLOCK, 1)[:, :inputs]
    return weight.to(dtype) * wide
