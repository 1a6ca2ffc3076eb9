"""Weights of 4 bits as libraries pack them, written after what their packing code does, and GPTQ's layer."""

from __future__ import annotations

import torch
from torch import nn


def words_of(values: torch.Tensor) -> torch.Tensor:
    """Eight values of 4 bits in the last dimension as a word of 32, the first in the lowest bits."""
    shifted = values.long() << torch.arange(0, 32, 4)
    return shifted.sum(-1).to(torch.int32)


def gptq(values: torch.Tensor) -> torch.Tensor:
    """`[inputs / 8, outputs]` int32 of values `[outputs, inputs]` from 0 to 15."""
    return words_of(values.T.reshape(values.shape[1] // 8, 8, -1).transpose(1, 2))


def plain(values: torch.Tensor) -> torch.Tensor:
    """`[outputs, inputs / 2]` int8 of values from -8 to 7: torchao's plain tensors."""
    low, high = (values[:, i::2] & 15 for i in (0, 1))
    return (high << 4 | low).to(torch.uint8).view(torch.int8)


def tinygemm(values: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles `[outputs / 8, inputs / 128, 32, 4]` of values from 0 to 15, and pairs of scales `[groups, outputs]`.

    As torch's `_convert_weight_to_int4pack` on CUDA: a thread has an output and, of each 32 inputs, two in each 8.
    """
    outputs, inputs = values.shape
    block = inputs // len(scale)
    rows, width = -(-outputs // 8) * 8, -(-inputs // 1024) * 1024
    padded = torch.zeros(rows, width, dtype=torch.long)
    padded[:outputs, :inputs] = values
    packed = torch.empty(rows // 8, width // 128, 32, 4, dtype=torch.int32)
    for thread in range(32):
        for word in range(4):
            first = 32 * word + 2 * (thread % 4)
            at = torch.tensor([first, first + 8, first + 16, first + 24, first + 1, first + 9, first + 17, first + 25])
            of_thread = padded.view(rows // 8, 8, width // 128, 128)[:, thread // 4]
            packed[:, :, thread, word] = words_of(of_thread[..., at])
    pairs = torch.zeros(width // block, rows, 2, dtype=scale.dtype)
    pairs[: len(scale), :outputs] = torch.stack([scale, shift], 2)
    return packed, pairs


def unpacked_tiles(packed: torch.Tensor) -> torch.Tensor:
    """Values `[outputs, inputs]` from 0 to 15, padded, of the tiles that `tinygemm` makes."""
    tiles, wide = packed.shape[:2]
    values = torch.empty(tiles, 8, wide, 128, dtype=torch.int32)
    for thread in range(32):
        for word in range(4):
            for place, after in enumerate((0, 8, 16, 24, 1, 9, 17, 25)):
                at = 32 * word + 2 * (thread % 4) + after
                values[:, thread // 4, :, at] = packed[:, :, thread, word] >> 4 * place & 15
    return values.view(8 * tiles, 128 * wide)


def quantised(
    weight: torch.Tensor, group: int, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values `[outputs, inputs]` from 0 to 15, and zero points from 1 to 15 and scales `[groups, outputs]`."""
    groups = weight.float().unflatten(1, (-1, group))
    low, high = groups.amin(2), groups.amax(2)
    scale = (torch.maximum(-low, high) / 7 if symmetric else (high - low) / 15).to(weight.dtype).float()
    zero = torch.full_like(scale, 8) if symmetric else (-low / scale).round().clamp(1, 15)
    values = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 15).int().flatten(1)
    return values, zero.int().T.contiguous(), scale.T.contiguous().to(weight.dtype)


class QuantLinear(nn.Module):
    """A layer with GPTQ's tensors, which multiplies in torch as was published; zero points are stored as `less`."""

    def __init__(self, inputs: int, outputs: int, less: int = 1) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.less = inputs, outputs, 4, less

    def forward(self, x):
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        values = (self.qweight[:, None] >> shifts[None, :, None] & 15).flatten(0, 1)
        zeros = (self.qzeros[:, :, None] >> shifts & 15).flatten(1) + self.less
        weight = self.scales[self.g_idx] * (values - zeros[self.g_idx]).to(self.scales.dtype)
        y = torch.matmul(x, weight.to(x.dtype))
        return y if self.bias is None else y + self.bias
