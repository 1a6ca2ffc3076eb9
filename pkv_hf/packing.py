"""Rows of unequal length side by side, without their padding: a ragged prompt costs what its real tokens cost."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch


class Packing:
    """Where the real tokens of left-padded rows are in one row of all of them.

    `starts` are the rows' first real positions (int64 `[rows]`), `length` is that of every padded row.
    """

    def __init__(self, starts: np.ndarray, length: int) -> None:
        self.starts = starts
        self.length = length

    @property
    def tokens(self) -> int:
        return int((self.length - self.starts).sum())

    def segments(self) -> Iterator[slice]:
        """The packed tokens of every row."""
        begin = 0
        for start in self.starts.tolist():
            end = begin + self.length - start
            yield slice(begin, end)
            begin = end

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """`[rows, length, ...]` as `[1, tokens, ...]`."""
        return torch.cat([row[start:] for row, start in zip(padded, self.starts.tolist())])[None]

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """`[1, tokens, ...]` as `[rows, length, ...]`, zeros for padding."""
        padded = packed.new_zeros((len(self.starts), self.length, *packed.shape[2:]))
        for row, start, segment in zip(padded, self.starts.tolist(), self.segments()):
            row[start:] = packed[0, segment]
        return padded
