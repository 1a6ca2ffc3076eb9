"""One cache's view of a pool: which page holds which tokens of which row, for all layers of one kind."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import torch

from pkv_hf.cache.mirror import Mirror
from pkv_hf.cache.pool import GROWTH, NULL_PAGE, PagePool, affordable, pages_of_copies

OF_THE_ROWS = ("pages", "pads", "live_from", "owned_from", "prepared", "expected", "reserved")
"""What of a table begins and ends with its rows."""


class BlockTable:
    """Pages of each row, by position: position `p` of row `b` is in page `pages[b, p // page_size]`.

    Rows are as long as each other, as transformers' caches have them. The host copy is the truth; `on(device)` mirrors
    it. `window` is the sliding window in tokens, 0 for full attention.

    The null page stands where a row has no page: in pages of padding alone, behind the window, and where no page was
    asked for yet. It reads as zeros and is never written. Row `b` holds tokens from `max(pads[b], live_from)` on:
    `pads` counts its leading positions of padding, and what is before `live_from` has left the window.

    A page is held once for each entry that names it, in this table or in its forks, and may be written by a row that
    alone holds it. `prepare` sees to that, for positions [owned_from, prepared). What shares pages (`select`, `fork`)
    leaves nothing of these.

    `limit` is the most positions that are expected of a row, 0 where nobody knows. The first tokens, which may be a
    chunk of a `prompt` of so many, reserve pages for `expected` positions: those of the likely new tokens. Where each
    row is to become `copies` rows, once its first `shared` positions are written, room is made in the pool for all of
    them. From then on positions [0, reserved) keep their pages when rows are cropped. Behind a window pages come back
    as others are taken: room is all that it needs.

    `pages` is never written in place while a `state` of before may be restored.
    """

    def __init__(self, pool: PagePool, window: int = 0, limit: int = 0) -> None:
        self.pool = pool
        self.page_size = pool.page_size
        self.window = window
        self.pages = np.zeros((0, 0), dtype=np.int32)  # [rows, columns]
        self.pads = np.zeros(0, dtype=np.int64)  # [rows]
        self.live_from = 0
        self.keep_past = False  # keep pages behind the window, so that `crop` can go back to them
        self.owned_from = self.prepared = 0
        self.limit = limit
        self.copies, self.shared = 1, 0
        self.prompt = 0
        self.expected = self.reserved = 0
        self._offsets: list[int | None] | None = None
        self._first_held: list[int] | None = None
        self._version = 0
        self._mirrors: dict[torch.device, Mirror] = {}
        self.held_by_routes: dict[Hashable, Any] = {}
        """What routes keep from step to step, such as workspace."""
        pool.allocator.holders.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_mirrors": {}, "held_by_routes": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, over a copy of the pool: forks that are not copied along hold no page there."""
        vars(self).update(state)
        self.pool.allocator.holders.add(self)

    def state(self) -> tuple[Any, ...]:
        """What `restore` takes."""
        return tuple(getattr(self, name) for name in OF_THE_ROWS)

    def restore(self, state: tuple[Any, ...]) -> None:
        """Goes back to a `state` of before. Pages that were given back since then may have been written to."""
        vars(self).update(zip(OF_THE_ROWS, state))
        self._changed()

    @property
    def rows(self) -> int:
        return len(self.pages)

    def first_visible(self, position: int) -> int:
        """The first position that a query at `position` attends to, padding aside."""
        return max(position - self.window + 1, 0) if self.window else 0

    def _columns(self, length: int) -> int:
        """Columns that positions [0, length) take."""
        return -(-length // self.page_size)

    def _changed(self) -> None:
        """Forgets what was worked out from `pages`, `pads` and `live_from`: whatever changes one of them ends here."""
        self._offsets = self._first_held = None
        self._version += 1
        self.pool.allocator.changed()

    def start(self, rows: int, pads: np.ndarray | None = None) -> None:
        """Begins `rows` empty rows with `pads` leading positions of padding. Pages come with the first tokens."""
        self.release()
        self.pages = np.zeros((rows, 0), dtype=np.int32)
        self.pads = np.zeros(rows, dtype=np.int64) if pads is None else np.array(pads, dtype=np.int64)
        self._changed()

    def release(self) -> None:
        """Returns all pages; no row is left."""
        self.pages = np.zeros((0, 0), dtype=np.int32)
        self.pads = np.zeros(0, dtype=np.int64)
        self.owned_from = self.prepared = self.expected = self.reserved = self.live_from = 0
        self._changed()

    def take(self, other: BlockTable) -> None:
        """Holds another table's rows in the place of its own; of the other none are left."""
        self.restore(other.state())
        other.release()

    def select(self, rows: np.ndarray, length: int) -> None:
        """Keeps `rows` (repeats allowed, any order): table rows move, K/V stay where they are.

        Pages reserved beyond `length` hold nothing yet: they stay with the place in the batch, not with the row. As
        many are reserved for the rows that there are then, as far as memory holds them.
        """
        before = self.fork(length)  # rows that go keep their pages until all is done
        written, same_places = self._columns(length), len(rows) == self.rows
        chosen = self.pages[rows]
        if same_places:
            chosen[:, written:] = self.pages[:, written:]
        self.pages = chosen if same_places else chosen[:, :written]
        self.pads = self.pads[rows]
        self._changed()
        if not same_places and self.reserved > length:
            first = np.maximum(self.pads, length)
            self._widen(self._columns(self.reserved))
            self.reserved = affordable(
                length, self.reserved, lambda end: self.pool.fits(int(self._missing(first, end).sum()))
            )
            self._fill(first, self.reserved, exact=True)
        before.release()

    def place(self, pages: np.ndarray, pads: np.ndarray, live_from: int) -> None:
        """Holds `pages` `[rows, columns]` in the place of its own, for rows that begin with `pads` of padding."""
        self.pages, self.pads, self.live_from = pages, pads, live_from
        self._changed()

    def fork(self, length: int) -> BlockTable:
        """A second table over the same pages, `length` tokens long; whoever writes first into a page copies it."""
        self.owned_from = self.prepared = length
        twin = BlockTable(self.pool, self.window)
        twin.keep_past = self.keep_past
        twin.pads = self.pads
        twin.live_from = self.live_from
        twin.owned_from = twin.prepared = length
        twin.pages = self.pages[:, : self._columns(length)].copy()
        twin._changed()
        return twin

    def can_shrink(self, length: int) -> bool:
        """Whether the tokens that the query at position `length` attends to are all still held."""
        return self.live_from <= self.first_visible(length)

    def shrink(self, length: int) -> None:
        """Frees the pages wholly beyond `length` that are not reserved, and those behind the window.

        Padding ends there too: what comes next in such a row is a token.
        """
        self.pages = self.pages[:, : self._columns(max(length, self.reserved))].copy()
        self.owned_from, self.prepared = min(self.owned_from, length), min(self.prepared, length)
        self.pads = np.minimum(self.pads, length)
        self._changed()
        self._drop_before(self.first_visible(length))

    def prepare(self, begin: int, end: int) -> None:
        """Makes positions [begin, end) of every row writable: each in a page that this row alone holds.

        Of a first step that is longer than the window, only what the next token attends to is kept. Raises
        PoolAllocationError where pages do not fit, with the table as it was.
        """
        if self.owned_from <= begin and end <= self.prepared:
            return
        before = self.state()
        try:
            if not begin and self.limit and not self.expected:
                self._reserve(max(end, self.prompt))
            if self.window and not self.keep_past:
                self._drop_before(self.first_visible(begin or end))
                before = self.state() if begin else before  # what the window has left may be written to from here on
            self._fill(np.maximum(self.pads, max(begin, self.live_from)), end)
            self.unshare(begin, end)
            apart = end < self.owned_from or self.prepared < begin
            self.owned_from = begin if apart else min(self.owned_from, begin)
            self.prepared = end if apart else max(self.prepared, end)
        except BaseException:
            self.restore(before)
            raise

    def _reserve(self, end: int) -> None:
        """Makes room for the positions that are expected of all copies, after a prompt that ends at `end`.

        Without copies to come, rows take their pages at once.
        """
        self.expected = affordable(end, self.limit, lambda positions: self.pool.fits(self._room(positions)))
        self.pool.require(self._room(self.expected), exact=True)
        self.reserved = 0 if self.window else self.expected
        if self.reserved and self.copies == 1:
            self._fill(self.pads, self.reserved)

    def _room(self, positions: int) -> int:
        """Pages that all copies hold when rows come to `positions`."""
        if not self.window:
            return pages_of_copies(self.pads, self.page_size, positions, self.copies, self.shared)
        # in a step of one token: a window of tokens, which may begin inside a page
        return self.copies * self.rows * min(self._columns(positions), self._columns(self.window) + 1)

    def _drop_before(self, position: int) -> None:
        """Frees the pages that lie wholly before `position`; from then on nothing before it is held."""
        first, end = self.live_from // self.page_size, position // self.page_size
        if end <= first:
            return
        self.pages = self.pages.copy()
        self.pages[:, first:end] = NULL_PAGE
        self.live_from = end * self.page_size
        self._changed()

    def _fill(self, first: np.ndarray, end: int, exact: bool = False) -> None:
        """Gives every row pages for positions [first[row], end) where it has none yet."""
        self._widen(self._columns(end))
        missing = self._missing(first, end)
        if not missing.any():
            return
        self.pool.require(int(missing.sum()), exact)
        self.pages = self.pages.copy()
        entered = []  # pages that a row enters inside: what is before its first position reads as zeros there too
        for row in np.flatnonzero(missing.any(axis=1)).tolist():
            columns = np.flatnonzero(missing[row])
            self.pages[row, columns] = self._alloc(row, int(columns[0]), len(columns))
            if columns[0] * self.page_size < first[row]:
                entered.append(int(self.pages[row, columns[0]]))
        if entered:
            self.pool.copy_pages([NULL_PAGE] * len(entered), entered)
        self._changed()

    def _widen(self, columns: int) -> None:
        """Adds columns of null pages, up to `columns` of them in all."""
        added = columns - self.pages.shape[1]
        if added > 0:
            self.pages = np.concatenate([self.pages, np.full((self.rows, added), NULL_PAGE, dtype=np.int32)], axis=1)
            self._changed()

    def _missing(self, first: np.ndarray, end: int) -> np.ndarray:
        """Which entries of positions [first[row], end) have no page, bool `[rows, columns]`."""
        columns = np.arange(self._columns(end))
        missing = (self.pages[:, : len(columns)] == NULL_PAGE) & (columns >= (first // self.page_size)[:, None])
        missing &= (first < end)[:, None]
        return missing

    def _alloc(self, row: int, column: int, count: int) -> np.ndarray:
        """Takes `count` free pages for a row from `column` on, if possible the run that follows its page before."""
        before = int(self.pages[row, column - 1]) if column else NULL_PAGE
        return self.pool.allocator.alloc(count, after=before)

    def unshare(self, begin: int, end: int) -> None:
        """Copy-on-write: replaces the pages of positions [begin, end) that someone else holds too."""
        allocator, first_column = self.pool.allocator, begin // self.page_size
        entries = self.pages[:, first_column : self._columns(end)]
        rows, columns = np.nonzero(allocator.refcounts[entries] > 1)  # the null page counts one holder
        if not len(rows):
            return
        self.pool.require(self._copies_needed(entries[rows, columns]))
        self.pages, counts = self.pages.copy(), allocator.refcounts.copy()
        source, target = [], []
        for row, column in zip(rows.tolist(), (columns + first_column).tolist()):
            page = int(self.pages[row, column])
            if counts[page] == 1:  # the others have left it in this very loop
                continue
            (self.pages[row, column],) = self._alloc(row, column, 1)
            counts[page] -= 1
            source.append(page)
            target.append(int(self.pages[row, column]))
        self.pool.copy_pages(source, target)
        self._changed()

    def alone(self, begin: int, end: int) -> bool:
        """Whether no other row and no fork holds a page of positions [begin, end)."""
        entries = self.pages[:, begin // self.page_size : self._columns(end)]
        return bool((self.pool.allocator.refcounts[entries] == 1).all())

    def _copies_needed(self, entries: np.ndarray) -> int:
        """Pages that entries take to share none: one each, but where nobody else holds a page, its last keeps it."""
        pages, holders = np.unique(entries, return_counts=True)
        return len(entries) - int(np.count_nonzero(holders == self.pool.allocator.refcounts[pages]))

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The table, int32 `[rows, columns or more]`, and `first_held`, int32 `[rows]`, on a device.

        The tensors stay where they are while they are large enough, and are brought up to date on the current stream.
        """
        mirror = self._mirrors.get(device)
        if mirror is None or mirror.version != self._version:
            mirror = self._mirrors[device] = self._mirrored(mirror, device)
        return mirror.pages, mirror.first_held

    def _mirrored(self, mirror: Mirror | None, device: torch.device) -> Mirror:
        """The device's mirror brought up to date, or a larger one where it is outgrown."""
        rows, columns = self.pages.shape
        if mirror is None or not mirror.fits(rows, columns):
            capacity = columns if mirror is None else int(columns * GROWTH) + 1
            mirror = Mirror(rows, max(self._columns(self.expected), capacity), device)
        mirror.show(self.pages, self.first_held(), self._version)
        return mirror

    def first_held(self) -> list[int]:
        """The first position of every row whose page is not the null page."""
        if self._first_held is None:
            columns = np.maximum(self.pads, self.live_from) // self.page_size
            if self.pages.shape[1]:  # a row cropped into its padding has no page yet where that ends now
                columns = np.maximum(columns, (self.pages != NULL_PAGE).argmax(axis=1))
            self._first_held = (columns * self.page_size).tolist()
        return self._first_held

    def slots(self, row: int, begin: int, end: int) -> np.ndarray:
        """Slots of positions [begin, end) of a row; slots count the pool's tokens, page by page."""
        positions = np.arange(begin, end)
        pages = self.pages[row, positions // self.page_size].astype(np.int64)
        return pages * self.page_size + positions % self.page_size

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
        if (np.diff(pages[first : last + 1]) != 1).any():  # a null page in between breaks the run too
            return None
        return int(pages[first] - first) * self.page_size
