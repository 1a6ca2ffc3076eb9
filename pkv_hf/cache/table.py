"""One cache's view of a pool: which page holds which tokens of which row, for all layers of one kind."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pkv_hf.cache.pool import GROWTH, NULL_PAGE, PagePool


@dataclass
class Mirror:
    """A device's copy of a table, as of `version`."""

    pages: torch.Tensor
    first_held: torch.Tensor
    version: int = -1


class BlockTable:
    """Pages of each row, by position: position `p` of row `b` is in page `pages[b, p // page_size]`.

    Rows are as long as each other, as transformers' caches have them; a row's left padding and what lies behind a
    sliding window are entries that name the null page. The host copy is the truth; `on(device)` mirrors it.
    `window` is the sliding window in tokens, 0 for full attention; rows that `start` get pages for `reserve` positions.
    """

    def __init__(self, pool: PagePool, window: int = 0, reserve: int = 0) -> None:
        self.pool = pool
        self.window = window
        self.reserve = reserve
        self.pages = np.zeros((0, 0), dtype=np.int32)  # [rows, max_pages]
        self.pads = np.zeros(0, dtype=np.int64)  # [rows] leading positions of a row that hold no token
        self.prepared = 0  # positions [0, prepared) can be written without asking again
        self.reserved = 0  # positions [0, reserved) keep their pages when the cache is cropped
        self.live_from = 0  # positions before it have left the window and are not held any more
        self.keep_past = False  # keep pages behind the window, so that `crop` can go back to them
        self.copies = 1  # rows that each row is to become, once its first `shared` positions are written
        self.shared = 0
        self._offsets: list[int | None] | None = None
        self._first_held: list[int] | None = None
        self._version = 0  # counts changes of the host copy
        self._mirrors: dict[torch.device, Mirror] = {}
        self.held_by_routes: dict[Hashable, Any] = {}
        """What routes keep from step to step, such as workspace."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_mirrors": {}, "held_by_routes": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, over a copy of the pool: forks that are not copied along leave no page held there."""
        vars(self).update(state)
        self.pool.allocator.retain(self.pages)

    @property
    def rows(self) -> int:
        return len(self.pages)

    @property
    def page_size(self) -> int:
        return self.pool.page_size

    def start(self, rows: int, pads: np.ndarray | None = None) -> None:
        """Begins `rows` empty rows with `pads` leading positions of padding. Pages come with the first tokens."""
        self.release()
        self.pages = np.zeros((rows, 0), dtype=np.int32)
        self.pads = np.zeros(rows, dtype=np.int64) if pads is None else np.asarray(pads, dtype=np.int64)

    def _reserve(self) -> None:
        self.reserved = 0 if self.window else self.reserve
        pages, first = self._pages_to(self.reserve), self.pads // self.page_size
        if self.window:  # what a step of one token holds: a window of tokens, which may begin inside a page
            wanted = self.copies * self.rows * min(pages, self._pages_to(self.window) + 1)
        else:
            shared = min(self.shared // self.page_size, pages)
            own = np.maximum(pages - np.maximum(first, shared), 0)
            wanted = int(np.maximum(shared - first, 0).sum() + self.copies * own.sum())
        self.pool.require(wanted, exact=True)
        if self.reserved and self.copies == 1:
            self._fill(self.pads, self.reserved)

    def _changed(self) -> None:
        self._offsets = self._first_held = None
        self._version += 1

    def _pages_to(self, position: int) -> int:
        return -(-position // self.page_size)

    def prepare(self, begin: int, end: int) -> None:
        """Makes positions [begin, end) of every row writable: each in a page that this row alone holds.

        Of a first step that is longer than the window, only what the next token attends to is kept.
        """
        if end <= self.prepared:
            return
        if not begin and self.reserve:
            self._reserve()
        if self.window and not self.keep_past:
            self._drop_before(max((begin or end) - self.window + 1, 0))
        self._fill(np.maximum(self.pads, max(begin, self.live_from)), end)
        self._unshare(begin // self.page_size, self._pages_to(end))
        self.prepared = end

    def _fill(self, first: np.ndarray, end: int, exact: bool = False) -> None:
        """Gives every row pages for positions [first[row], end) where it has none yet."""
        width = self._pages_to(end)
        if width > self.pages.shape[1]:
            wider = np.zeros((self.rows, width), dtype=np.int32)
            wider[:, : self.pages.shape[1]] = self.pages
            self.pages = wider
            self._changed()
        index = np.arange(width)
        missing = (self.pages[:, :width] == NULL_PAGE) & (index >= (first // self.page_size)[:, None])
        missing &= (first < end)[:, None]
        if not missing.any():
            return
        self.pool.require(int(missing.sum()), exact)
        padded = []  # pages that begin with padding, which reads as zeros there too
        for row in np.flatnonzero(missing.any(axis=1)):
            holes = np.flatnonzero(missing[row])
            before = self.pages[row, holes[0] - 1] if holes[0] else NULL_PAGE
            self.pages[row, holes] = self.pool.allocator.alloc(len(holes), after=int(before))
            if holes[0] * self.page_size < first[row]:
                padded.append(int(self.pages[row, holes[0]]))
        if padded:
            self.pool.copy_pages([NULL_PAGE] * len(padded), padded)
        self._changed()

    def _unshare(self, first_page: int, end_page: int) -> None:
        """Copy-on-write: replaces pages in columns [first_page, end_page) that someone else holds too."""
        counts = self.pool.allocator.refcounts
        held = self.pages[:, first_page:end_page]
        rows, columns = np.nonzero((counts[held] > 1) & (held != NULL_PAGE))
        if not len(rows):
            return
        pages, holders = np.unique(held[rows, columns], return_counts=True)
        self.pool.require(int(holders.sum() - np.count_nonzero(holders == counts[pages])))  # the last holder keeps it
        allocator = self.pool.allocator
        source, target = [], []
        for row, column in zip(rows, columns + first_page):
            page = int(self.pages[row, column])
            if allocator.refcounts[page] == 1:  # the others have left it in this very loop
                continue
            before = int(self.pages[row, column - 1]) if column else NULL_PAGE
            (new,) = allocator.alloc(1, after=before)
            allocator.release(np.array([page]))
            self.pages[row, column] = new
            source.append(page)
            target.append(int(new))
        self.pool.copy_pages(source, target)
        self._changed()

    def _drop_before(self, position: int) -> None:
        """Frees the pages that lie wholly before `position`; from then on nothing before it is held."""
        first, last = self.live_from // self.page_size, position // self.page_size
        if last <= first:
            return
        self.pool.allocator.release(self.pages[:, first:last])
        self.pages[:, first:last] = NULL_PAGE
        self.live_from = last * self.page_size
        self._changed()

    def can_shrink(self, length: int) -> bool:
        """Whether the tokens that the query at position `length` attends to are all still held."""
        return not self.window or self.live_from <= max(length - self.window + 1, 0)

    def shrink(self, length: int) -> None:
        """Frees the pages wholly beyond `length` that are not reserved, and those behind the window.

        Padding ends there too: what comes next in such a row is a token.
        """
        columns = max(self._pages_to(length), self._pages_to(self.reserved))
        self.pool.allocator.release(self.pages[:, columns:])
        self.pages = self.pages[:, :columns].copy()
        self.prepared = min(self.prepared, length)
        self.pads = np.minimum(self.pads, length)
        self._changed()
        if self.window:
            self._drop_before(max(length - self.window + 1, 0))

    def select(self, rows: np.ndarray, length: int) -> None:
        """Keeps `rows` (repeats allowed, any order): table rows and reference counts move, K/V stay where they are.

        Pages reserved beyond `length` hold nothing yet: they stay with the place in the batch, not with the row. As
        many are reserved for the rows that there are then.
        """
        columns, before = self._pages_to(length), self.rows
        chosen = self.pages[rows]
        if len(rows) == before:
            chosen[:, columns:] = self.pages[:, columns:]
        else:
            self.pool.allocator.release(self.pages[:, columns:])
            self.pages[:, columns:] = NULL_PAGE
            chosen = chosen[:, :columns]
        self.pool.allocator.retain(chosen[:, :columns])
        self.pool.allocator.release(self.pages[:, :columns])
        self.pages = chosen
        self.pads = self.pads[rows]
        self.prepared = length  # a page may be shared now: ask before the next write
        self._changed()
        if len(rows) != before and self.reserved > length:
            self._fill(np.maximum(self.pads, length), self.reserved, exact=True)

    def fork(self, length: int) -> BlockTable:
        """A second table over the same pages, `length` tokens long; whoever writes first into a page copies it."""
        twin = BlockTable(self.pool, self.window)
        columns = self._pages_to(length)
        twin.pages = self.pages[:, :columns].copy()
        twin.pads = self.pads.copy()
        twin.prepared = length
        twin.live_from = self.live_from
        twin.keep_past = self.keep_past
        self.pool.allocator.retain(twin.pages)
        self.prepared = min(self.prepared, length)
        return twin

    def release(self) -> None:
        """Returns all pages."""
        self.pool.allocator.release(self.pages)
        self.pages = np.zeros((0, 0), dtype=np.int32)
        self.pads = np.zeros(0, dtype=np.int64)
        self.prepared = self.reserved = self.live_from = 0
        self._changed()

    def __del__(self) -> None:  # forks outlive each other: a table that goes gives its pages back
        if hasattr(self, "pages"):
            self.release()

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The table, int32 `[rows, max_pages or more]`, and `first_held`, int32 `[rows]`, on a device.

        The tensors stay where they are while they are large enough, and are brought up to date on the current stream.
        """
        rows, width = self.pages.shape
        mirror = self._mirrors.get(device)
        if mirror is None or len(mirror.pages) != rows or mirror.pages.shape[1] < width:
            capacity = max(self._pages_to(self.reserve), width if mirror is None else int(width * GROWTH) + 1)
            with torch.inference_mode(False):  # what is made in that mode cannot be written outside of it
                pages = torch.zeros((rows, capacity), dtype=torch.int32, device=device)
                mirror = Mirror(pages, torch.zeros(rows, dtype=torch.int32, device=device))
            self._mirrors[device] = mirror
        if mirror.version != self._version:
            mirror.version = self._version
            table = np.zeros(mirror.pages.shape, dtype=np.int32)
            table[:, :width] = self.pages
            _upload(mirror.pages, table)
            _upload(mirror.first_held, np.array(self.first_held(), dtype=np.int32))
        return mirror.pages, mirror.first_held

    def first_held(self) -> list[int]:
        """The first position of every row whose page is not the null page."""
        if self._first_held is None:
            held = np.maximum(self.pads, self.live_from) // self.page_size
            if self.pages.shape[1]:  # a row cropped into its padding has no page yet where that ends now
                held = np.maximum(held, (self.pages != NULL_PAGE).argmax(axis=1))
            self._first_held = (held * self.page_size).tolist()
        return self._first_held

    def slots(self, row: int, begin: int, end: int) -> np.ndarray:
        """Slots of positions [begin, end) of a row; slots count the pool's tokens, page by page."""
        positions = np.arange(begin, end)
        return (
            self.pages[row, positions // self.page_size].astype(np.int64) * self.page_size + positions % self.page_size
        )

    def offsets(self) -> list[int | None]:
        """For every row what to add to a position for its slot, None where the row's pages are not consecutive.

        Holds for positions from `first_held` on. Worked out once for each change of the table.
        """
        if self._offsets is None:
            self._offsets = [self._offset(pages) for pages in self.pages]
        return self._offsets

    def _offset(self, pages: np.ndarray) -> int | None:
        held = np.flatnonzero(pages != NULL_PAGE)
        if not len(held):
            return None
        first, last = held[0], held[-1]
        if last - first != len(held) - 1 or (np.diff(pages[first : last + 1]) != 1).any():
            return None
        return int(pages[first] - first) * self.page_size


def _upload(target: torch.Tensor, source: np.ndarray) -> None:
    """Copies to a device without waiting. torch reuses the pinned buffer once the copy has run."""
    host = torch.from_numpy(source)
    target.copy_(host.pin_memory() if target.is_cuda else host, non_blocking=True)
