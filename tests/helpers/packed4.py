"""Weights of 4 bits as libraries pack them, written after what their packing code does."""

from __future__ import annotations

import torch


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
