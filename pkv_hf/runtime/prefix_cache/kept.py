"""What `patch(prefix_cache=...)` keeps of one model's prompts: blocks by content, within a budget, for any thread."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from weakref import WeakSet

import numpy as np
import torch

from pkv_hf import compat
from pkv_hf.cache.paged import PagedCache
from pkv_hf.runtime.evidence import Look
from pkv_hf.runtime.prefix_cache.basis import Basis
from pkv_hf.runtime.prefix_cache.blocks import Blocks, Run
from pkv_hf.runtime.prefix_cache.tree import Node, Tree


@dataclass(frozen=True)
class PrefixCacheUse:
    """What a patched model's prefix cache has been good for, since `patch`."""

    prompts: int
    """Rows of prompts that were looked up."""
    hits: int
    """Those that began with tokens whose pages were kept."""
    tokens_saved: int
    """Tokens of prompts that were not computed."""
    nbytes: int
    """Memory of kept pages, room for some more included."""
    budget: int
    """The most that it may be, bytes."""
    not_cached: tuple[str, ...]
    """Why prompts, or parts of them, were neither looked up nor kept, each reason once."""


class Rows:
    """The rows of a prompt: real tokens after padding.

    Args:
        ids: int64 `[rows, length]`.
        pads: how many of each row are padding, int64 `[rows]`; less than `length`.
    """

    def __init__(self, ids: np.ndarray, pads: np.ndarray) -> None:
        self.ids, self.pads = ids, pads

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def real(self) -> int:
        """Tokens that are no padding."""
        return int((self.length - self.pads).sum())

    @property
    def alike(self) -> int:
        """Tokens that all rows begin with."""
        rows = [row[pad:] for row, pad in zip(self.ids, self.pads)]
        shortest = min(map(len, rows))
        differ = np.flatnonzero((np.stack([row[:shortest] for row in rows]) != rows[0][:shortest]).any(axis=0))
        return int(differ[0]) if len(differ) else shortest

    def computed(self, hits: np.ndarray) -> tuple[int, int]:
        """Where a prompt goes on whose rows begin with `hits` tokens each (int64 `[rows]`), and tokens left to compute.

        All rows go on from one position, so those that have a longer beginning compute some of it again. It is 0 where
        that is no less than all real tokens. The last position is always computed: its logits are asked for.
        """
        begin = min(int((self.pads + hits).min()), self.length - 1)
        left = len(self.ids) * (self.length - begin)
        return (begin, left) if begin > 0 and left < self.real else (0, self.real)

    def keys(self, row: int, size: int, basis: bytes) -> list[bytes]:
        """The whole blocks of a row's real tokens, as `Tree` takes them."""
        ids = np.ascontiguousarray(self.ids[row, self.pads[row] :])
        keys = [ids[i : i + size].tobytes() for i in range(0, len(ids) - size + 1, size)]
        return [basis + key if not i else key for i, key in enumerate(keys)]


class Kept:
    """Blocks of `size` tokens of past prompts, in no more than `budget` bytes, the least recently used out first."""

    def __init__(self, budget: int, size: int) -> None:
        self.size = size
        self._tree, self._blocks = Tree(), Blocks(size, budget)
        self._basis = Basis(self.clear)
        self._lock = threading.RLock()
        self._prompts = self._hits = self._saved = 0
        self._said: dict[str, str] = {}
        self.awaited: WeakSet[PagedCache] = WeakSet()
        """Caches that generate() made, whose prompts have not come by."""
        self.emptied = 0
        """How often all was let go: pages that were computed before that are not to be kept after it."""

    def __reduce__(self) -> tuple[type[Kept], tuple[int, int]]:
        """Of a model that is copied or pickled the copy keeps prompts of its own."""
        return Kept, (self._blocks.budget, self.size)

    def say(self, reason: str) -> None:
        """Notes why a prompt was not cached; warns of each reason once, whatever numbers are in it."""
        kind = re.sub(r"\d+", "", reason)
        if kind not in self._said:
            self._said[kind] = reason
            compat.logger.warning("pkv_hf: not in the prefix cache: %s", reason)

    @property
    def use(self) -> PrefixCacheUse:
        blocks, counts = self._blocks, (self._prompts, self._hits, self._saved)
        return PrefixCacheUse(*counts, blocks.nbytes, blocks.budget, tuple(self._said.values()))

    def clear(self) -> None:
        """Lets all pages go, and their memory."""
        with self._lock:
            self._tree = Tree()
            self._blocks.clear()
            self.emptied += 1

    def basis(self, look: Look) -> bytes:
        """What prompts are computed with by now; all pages go where weights have changed since the last call."""
        with self._lock:
            return self._basis.now(look)

    def hits(self, rows: Rows, basis: bytes) -> np.ndarray:
        """How many tokens of each row's beginning are kept, int64 `[rows]`."""
        with self._lock:
            chains = [self._tree.find(rows.keys(row, self.size, basis)) for row in range(len(rows.ids))]
        return np.array([len(chain) * self.size for chain in chains], dtype=np.int64)

    def holds(self, tokens: int) -> bool:
        """Whether the budget has room for so many tokens of a row, as far as is known before the first prompt."""
        return not self._blocks.room or tokens // self.size <= self._blocks.most

    def begin(self, cache: PagedCache, rows: Rows, basis: bytes) -> int:
        """Begins an empty cache by what is kept of its rows; returns the position that it comes to, 0 for nothing."""
        with self._lock:
            chains = [self._tree.find(rows.keys(row, self.size, basis)) for row in range(len(rows.ids))]
            end, _ = rows.computed(np.array([len(chain) * self.size for chain in chains], dtype=np.int64))
            if not end:
                return 0
            blocks = [np.array([node.block for node in chain], dtype=np.int64) for chain in chains]
            runs = [Run(row, int(rows.pads[row]), of_row) for row, of_row in enumerate(blocks)]
            try:
                self._blocks.write_to(cache, runs, rows.pads, end)
            except BaseException:
                cache.reset()
                raise
            return end

    def count(self, rows: Rows, begin: int, computed: int) -> None:
        """Notes a prompt whose rows went on from a position, and how many tokens were computed for it in all."""
        with self._lock:
            self._prompts += len(rows.ids)
            self._hits += int((rows.pads < begin).sum())
            self._saved += rows.real - computed

    def keep(self, cache: PagedCache, rows: Rows, basis: bytes, emptied: int) -> None:
        """Keeps the whole blocks of what a cache holds and that was computed on a basis.

        Nothing where all was let go since then, when `emptied` was as given.
        """
        with self._lock:
            if emptied != self.emptied:
                return
            if not self._blocks.fits(cache):
                self._tree = Tree()
                if not self._blocks.begin(cache):
                    return self.say(f"prefix_cache={self._blocks.budget} bytes are less than one page takes")
            try:
                runs, in_use = [], set[Node]()
                for row in range(len(rows.ids)):
                    runs += self._placed(cache, rows, row, basis, in_use)
                self._blocks.read_from(cache, runs)
            except BaseException as error:  # blocks are named that were not written
                self.clear()
                if not isinstance(error, torch.OutOfMemoryError):
                    raise
                self.say("memory ran out when pages were to be kept")

    def _placed(self, cache: PagedCache, rows: Rows, row: int, basis: bytes, in_use: set[Node]) -> list[Run]:
        """Finds places for the blocks of a row that are not kept yet, none of them those `in_use`."""
        keys = rows.keys(row, self.size, basis)
        chain = self._tree.find(keys)
        in_use.update(chain)
        position = int(rows.pads[row]) + len(chain) * self.size
        if len(chain) == len(keys):
            return []
        for window, table in cache.tables.items():
            if table.first_held()[row] > position:
                self.say(f"a sliding window of {window} tokens has left behind some of {rows.length}")
                return []
        blocks: list[int] = []
        for key in keys[len(chain) :]:
            block = self._blocks.take()
            if block is None:
                block = self._tree.evict(in_use)
            if block is None:
                self.say(f"a prompt of {rows.length} tokens is more than prefix_cache={self._blocks.budget} bytes hold")
                break
            chain.append(self._tree.add(chain[-1] if chain else None, key, block))
            in_use.add(chain[-1])
            blocks.append(block)
        self._tree.use(chain)
        return [Run(row, position, np.array(blocks, dtype=np.int64))] if blocks else []
