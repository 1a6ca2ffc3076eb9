"""K and V of blocks of tokens in tensors of their own, and the way between these and the pages of a cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from pkv_hf.cache.paged import PagedCache
from pkv_hf.cache.pool import NULL_PAGE
from pkv_hf.cache.table import BlockTable

FIRST = 64
"""Blocks that there is room for at first, where the budget has so many. Room is doubled as it is needed."""


class Run(NamedTuple):
    """Blocks that follow each other in a row of a cache, from a position on."""

    row: int
    position: int
    blocks: np.ndarray
    """int64 `[blocks]`."""


class Slots(NamedTuple):
    """Places of tokens, for some layers alike, int64 `[tokens]`."""

    layers: list[int]
    here: np.ndarray
    """They count the tokens of all blocks, block by block."""
    there: np.ndarray
    """They count the tokens of a pool, page by page."""


class Blocks:
    """Room for blocks of `size` tokens, K and V of all layers, in no more than `budget` bytes.

    While room is made, one layer's old K or V stands beside its new one. On a GPU all is done on a stream of its own,
    which the caller's waits for: calls of several streams meet here.
    """

    def __init__(self, size: int, budget: int) -> None:
        self.size, self.budget = size, budget
        self._layers: dict[int, list[torch.Tensor]] = {}  # K and V `[H_kv, blocks, size, head_dim]`
        self._free: list[int] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.room = 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensors in self._layers.values() for tensor in tensors)

    @property
    def most(self) -> int:
        """Blocks that the budget has room for; 0 before the first cache was seen."""
        of_one = sum(tensor[:, 0].nbytes for tensors in self._layers.values() for tensor in tensors)
        return self.budget // of_one if of_one else 0

    def clear(self) -> None:
        """Gives all memory back."""
        self._layers, self._free, self.room = {}, [], 0

    def fits(self, cache: PagedCache) -> bool:
        """Whether a cache has the layers, heads, dtypes and devices of what is held. Its pages may be of any size."""
        held = {layer: [_kind(tensor) for tensor in tensors] for layer, tensors in self._layers.items()}
        return held == {layer: [_kind(tensor) for tensor in tensors] for layer, tensors in _pages(cache).items()}

    def begin(self, cache: PagedCache) -> bool:
        """Makes first room for blocks of a cache's kind, in the place of all others; whether the budget has one."""
        self.clear()
        pages = _pages(cache)
        of_a_token = sum(tensor[:, 0, 0].nbytes for tensors in pages.values() for tensor in tensors)
        room = min(FIRST, self.budget // (self.size * of_a_token))
        if room:
            for layer, tensors in pages.items():
                with self._apart(tensors[0].device):
                    self._layers[layer] = [_room(tensor, room, self.size) for tensor in tensors]
            self.room, self._free = room, list(range(room))[::-1]
        return room > 0

    def take(self) -> int | None:
        """A free block; None where the budget has room for no more, or memory."""
        if not self._free and self.room < self.most:
            self._grow(min(2 * self.room, self.most))
        return self._free.pop() if self._free else None

    def _grow(self, room: int) -> None:
        """Makes more room; less comes of it where memory runs out."""
        try:
            for tensors in self._layers.values():
                with self._apart(tensors[0].device):
                    for i, old in enumerate(tensors):
                        if old.shape[1] < room:  # an earlier try may have come this far
                            tensors[i] = _room(old, room, self.size)
                            tensors[i][:, : old.shape[1]] = old
        except RuntimeError:  # torch.OutOfMemoryError is one; the CPU's allocator raises a plain one
            return
        self._free = list(range(self.room, room))[::-1]
        self.room = room

    def give_back(self, block: int) -> None:
        self._free.append(block)

    def read_from(self, cache: PagedCache, runs: Sequence[Run]) -> None:
        """Copies tokens of a cache's pages into blocks."""
        for slots in self._slots(cache, runs, cache.get_seq_length()):
            self._copy(cache, slots, into_pages=False)

    def write_to(self, cache: PagedCache, runs: Sequence[Run], pads: np.ndarray, length: int) -> None:
        """Begins the rows of an empty cache, of `pads` positions of padding each, by `length` positions from blocks.

        Raises PoolAllocationError where its pages do not fit.
        """
        cache.start(len(pads), pads)
        for layer in cache.paged_layers:
            like = [tensor.new_empty((1, len(tensor), 0, tensor.shape[3])) for tensor in self._layers[layer.layer_idx]]
            layer.prepare(like[0], like[1], len(pads), length)
        for slots in self._slots(cache, runs, length):
            self._copy(cache, slots, into_pages=True)
        for table in cache.tables.values():
            self._clear_padding(table, length)
        for layer in cache.paged_layers:
            layer.length = length

    @staticmethod
    def _clear_padding(table: BlockTable, length: int) -> None:
        """Makes zeros of the padding in a row's first page: a mask does not keep a NaN out of a softmax."""
        ends = np.minimum(table.pads, length).tolist()
        padding = [table.slots(row, min(held, ends[row]), ends[row]) for row, held in enumerate(table.first_held())]
        slots = np.concatenate(padding)
        if len(slots):
            table.pool.copy_tokens(np.full(len(slots), NULL_PAGE * table.page_size), slots)

    def _slots(self, cache: PagedCache, runs: Sequence[Run], end: int) -> Iterator[Slots]:
        """Of each kind of layer, the slots of the runs' tokens up to position `end`.

        Tokens that a window has left behind have no page and are left out.
        """
        for window, table in cache.tables.items():
            here, there, held = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)], table.first_held()
            for run in runs:
                last = min(run.position + len(run.blocks) * self.size, end)
                first = min(max(run.position, held[run.row]), last)
                tokens = np.arange(first, last) - run.position
                here.append(run.blocks[tokens // self.size] * self.size + tokens % self.size)
                there.append(table.slots(run.row, first, last))
            layers = [layer.layer_idx for layer in cache.paged_layers if layer.window == window]
            yield Slots(layers, np.concatenate(here), np.concatenate(there))

    def _copy(self, cache: PagedCache, slots: Slots, into_pages: bool) -> None:
        """Copies tokens between slots here and slots of a cache's pages."""
        both, on_device = torch.from_numpy(np.stack([slots.here, slots.there])), {}
        pages = _pages(cache)
        for layer in slots.layers:
            device = self._layers[layer][0].device
            with self._apart(device):
                if device not in on_device:
                    host = both.pin_memory() if device.type == "cuda" else both
                    on_device[device] = host.to(device, non_blocking=True)
                here, there = on_device[device]
                for block, page in zip(self._layers[layer], pages[layer]):
                    block, page = (tensor.view(len(tensor), -1, tensor.shape[3]) for tensor in (block, page))
                    if into_pages:
                        page.index_copy_(1, there, block.index_select(1, here))
                    else:
                        block.index_copy_(1, here, page.index_select(1, there))

    @contextlib.contextmanager
    def _apart(self, device: torch.device) -> Iterator[None]:
        """Puts what is done inside on the stream of its own; before and after, the caller's stream and it wait."""
        if device.type != "cuda":
            yield
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        own, callers = self._streams[device], torch.cuda.current_stream(device)
        own.wait_stream(callers)
        with torch.cuda.stream(own):
            yield
        callers.wait_stream(own)


def _pages(cache: PagedCache) -> dict[int, list[torch.Tensor]]:
    """K and V of each layer that keeps them, as they lie in the pages, `[H_kv, pages, page_size, head_dim]`."""
    pools = {layer.layer_idx: cache.tables[layer.window].pool for layer in cache.paged_layers}
    return {layer: list(pool.storage[layer][:2]) for layer, pool in pools.items()}


def _kind(tensor: torch.Tensor) -> tuple[int, int, torch.dtype, torch.device]:
    return len(tensor), tensor.shape[3], tensor.dtype, tensor.device


def _room(like: torch.Tensor, blocks: int, size: int) -> torch.Tensor:
    """`[H_kv, blocks, size, head_dim]`."""
    with torch.inference_mode(False):  # what is made in that mode cannot be written outside of it
        return torch.empty((len(like), blocks, size, like.shape[3]), dtype=like.dtype, device=like.device)
