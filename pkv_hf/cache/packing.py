"""Rows of unequal length side by side, without their padding: a ragged prompt costs what its real tokens cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from pkv_hf.cache.table import BlockTable


class Places(NamedTuple):
    """Where packed tokens go in the pages, int64 on a device; slots count a pool's tokens, page by page."""

    kept: torch.Tensor
    """The packed tokens that have a page: all of them, but for those that a window has passed."""
    slots: torch.Tensor
    """The slot of each."""
    padding: torch.Tensor
    """Slots before a row's first token, in its first page."""


class Packing:
    """Where the real tokens of left-padded rows are in one row of all of them.

    `starts` are the rows' first real positions (int64 `[rows]`), `length` is that of every padded row.
    """

    def __init__(self, starts: np.ndarray, length: int) -> None:
        self.starts = starts
        self.length = length
        self._places: dict[tuple[BlockTable, torch.device], Places] = {}
        self._bounds: dict[torch.device, torch.Tensor] = {}

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

    def bounds_on(self, device: torch.device) -> torch.Tensor:
        """Where rows begin and, last, all end, int32 `[rows + 1]` on a device; made once for all layers there."""
        if device not in self._bounds:
            bounds = np.cumsum([0, *(self.length - self.starts)], dtype=np.int32)
            self._bounds[device] = torch.from_numpy(bounds).to(device)
        return self._bounds[device]

    def places(self, table: BlockTable, device: torch.device) -> Places:
        """Where the tokens go in a table's pages, which are there; made once for all layers of the table."""
        if (table, device) not in self._places:
            kept, slots, padding = [], [], []
            for row, (segment, held) in enumerate(zip(self.segments(), table.first_held())):
                start = int(self.starts[row])
                first = max(start, held)
                kept.append(np.arange(segment.start + first - start, segment.stop))
                slots.append(table.slots(row, first, self.length))
                padding.append(table.slots(row, min(start, held), start))
            together = (torch.from_numpy(np.concatenate(parts)).to(device) for parts in (kept, slots, padding))
            self._places[table, device] = Places(*together)
        return self._places[table, device]

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """`[rows, length, ...]` as `[1, tokens, ...]`."""
        return torch.cat([row[start:] for row, start in zip(padded, self.starts.tolist())])[None]

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """`[1, tokens, ...]` as `[rows, length, ...]`, zeros for padding."""
        padded = packed.new_zeros((len(self.starts), self.length, *packed.shape[2:]))
        for row, start, segment in zip(padded, self.starts.tolist(), self.segments()):
            row[start:] = packed[0, segment]
        return padded
