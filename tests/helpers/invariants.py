"""What holds of paged caches between any two operations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np

import pkv_hf.cache
from pkv_hf import PagedCache


def check(*caches: PagedCache) -> None:
    """Raises AssertionError where caches, all that there are on their pools, are not consistent."""
    for cache in caches:
        tables = cache.tables
        lengths = {layer.length for layer in cache.layers}
        assert len(lengths) == 1
        (length,) = lengths
        assert len({table.rows for table in tables.values()}) == 1
        for window, table in tables.items():
            check_table(table, length)
            assert table.window == window
            named = np.zeros(table.pool.allocator.capacity + 1, dtype=np.int32)
            for holder in caches:
                np.add.at(named, holder.tables[window].pages, 1)
            assert (table.pool.allocator.refcounts[1:] == named[1:]).all()
            for storage in table.pool.storage.values():
                for tensor in storage.tensors:
                    assert tensor.shape[1] >= len(named)  # a growth may have been interrupted
                    assert not tensor[:, 0].any()  # the null page


def check_table(table: Any, length: int) -> None:
    """Of a table whose layers hold `length` tokens a row."""
    page, counts = table.page_size, table.pool.allocator.refcounts
    rows, columns = table.pages.shape
    assert table.pads.shape == (rows,)
    assert 0 <= table.pages.min(initial=0) <= table.pages.max(initial=0) < len(counts)
    assert 0 <= table.owned_from <= table.prepared
    assert table.reserved in (0, table.expected)
    if not rows:
        assert (length, table.prepared, table.expected, table.live_from) == (0, 0, 0, 0)
        return
    assert (table.pads >= 0).all()
    assert columns * page >= max(length, table.prepared, table.reserved if table.copies == 1 else 0)
    if length:
        assert table.live_from <= table.first_visible(length)

    def over(begin, end):
        """The entries of positions [begin, end) that are no padding."""
        first, at = np.maximum(np.maximum(table.pads, table.live_from), begin)[:, None], np.arange(columns) * page
        return table.pages[np.maximum(at, first) < np.minimum(at + page, end)]

    owned = over(table.owned_from, table.prepared)
    assert (over(0, length) > 0).all()
    assert (owned > 0).all()
    assert (counts[owned] == 1).all()  # no page has two writers


class Interrupt:
    """Raises KeyboardInterrupt before the n-th line that runs of pkv_hf.cache, counted from 0, or never."""

    def __init__(self, n: int = -1) -> None:
        self.n = n
        self.lines: list[tuple[str, int]] = []
        """Those that have run, by file and number."""
        (self._folder,) = pkv_hf.cache.__path__

    def __enter__(self) -> Interrupt:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Callable | None:
        return self._line if frame.f_code.co_filename.startswith(self._folder) else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Callable | None:
        if event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) == self.n + 1:
                raise KeyboardInterrupt
        return self._line

    def places(self) -> list[int]:
        """Where in `lines` each line ran first, and where last."""
        first = {line: n for n, line in reversed([*enumerate(self.lines)])}
        last = {line: n for n, line in enumerate(self.lines)}
        return sorted({*first.values(), *last.values()})
