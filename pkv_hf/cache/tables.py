"""All that a cache and its layers hold in common: the block tables, lengths, and what is still to be done to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pkv_hf.cache import dense
from pkv_hf.cache.pending import NAMES, Reordering, States, checked
from pkv_hf.cache.pool import PagePool
from pkv_hf.cache.table import BlockTable


class Tables:
    """The block table of each kind of layer, by its window (0 for full attention), and every layer's length.

    A layer without K and V of its own has the window None, a length of 0 and no table.

    Two things may be pending, in this order: rows that are to change places (`reordering`), and keys and values outside
    of the pages (`states`). `settled()` does them and is the way to the tables. Operations on all of it are `atomic`.

    Args:
        windows: of each layer, in tokens; one of them at least is not None.
        page_size: tokens a page.
        limit: the most positions that are expected of a row, 0 where nobody knows.
        kv_dtype: of the pages, None for that of the states.
    """

    def __init__(
        self, windows: Sequence[int | None], page_size: int, limit: int = 0, kv_dtype: torch.dtype | None = None
    ) -> None:
        self.windows = tuple(windows)
        self.kv_dtype = kv_dtype
        self.by_window = {
            window: BlockTable(PagePool(page_size, self.windows.count(window)), window, limit)
            for window in sorted({window for window in self.windows if window is not None})
        }
        self.lengths = [0] * len(self.windows)
        self.states: dict[int, States] = {}
        self.reordering: Reordering | None = None

    def __getstate__(self) -> dict[str, Any]:
        self.settled()
        return dict(vars(self))

    def settled(self) -> dict[int, BlockTable]:
        """The tables, by window, with nothing pending."""
        if self.reordering is not None:
            self.reorder()
        if self.states:
            self._take_back()
        return self.by_window

    @contextmanager
    def atomic(self) -> Iterator[None]:
        """What fails or is interrupted inside leaves all as it was."""
        before = [(table, table.state()) for table in self.by_window.values()]
        lengths, states, reordering = self.lengths, self.states, self.reordering
        self.lengths, self.states = list(lengths), dict(states)
        try:
            yield
        except BaseException:
            for table, state in before:
                table.restore(state)
            self.lengths, self.states, self.reordering = lengths, states, reordering
            raise

    def longest(self, window: int) -> int:
        """Tokens a row of the layer of a kind that holds most."""
        return max(length for length, own in zip(self.lengths, self.windows) if own == window)

    def start(self, rows: int, pads: np.ndarray) -> None:
        """Begins `rows` empty rows with `pads` leading positions of padding, int64 `[rows]`."""
        self._forget_pending()
        with self.atomic():
            self.lengths = [0] * len(self.windows)
            for table in self.by_window.values():
                table.start(rows, pads)

    def cut(self, lengths: Sequence[int]) -> None:
        """Takes every layer back to its length; where all are 0, no row is left."""
        if not any(lengths):
            self._forget_pending()
        with self.atomic():
            tables = self.settled()
            self.lengths = list(lengths)
            for window, table in tables.items():
                if any(lengths):
                    table.shrink(self.longest(window))
                else:
                    table.release()

    def forget_unfinished(self) -> None:
        """Where no row is left, drops pools that ran out of memory before all their layers were there."""
        for table in self.by_window.values():
            table.pool.forget_unfinished()

    def _forget_pending(self) -> None:
        self.states, self.reordering = {}, None

    def select(self, rows: np.ndarray) -> None:
        """Keeps `rows`, repeats allowed, in any order. Raises ValueError for none, IndexError for what is not there."""
        self._check_rows(rows, self.settled())
        with self.atomic():
            self._select(rows)

    def reorder(self) -> None:
        """Does what `reordering` has left to do. Raises as `select` does, once."""
        if self.reordering is None:
            return
        rows = self.reordering.rows()
        try:
            self._check_rows(rows, self.by_window)
        except (ValueError, IndexError):
            self.reordering = None
            raise
        with self.atomic():
            self._select(rows)
            self.reordering = None

    def _select(self, rows: np.ndarray) -> None:
        for window, table in self.by_window.items():
            table.select(rows, self.longest(window))

    @staticmethod
    def _check_rows(rows: np.ndarray, tables: dict[int, BlockTable]) -> None:
        held = next(iter(tables.values())).rows
        if not len(rows):
            raise ValueError(f"indices keeps none of {held} rows: reset() forgets all of them")
        if not (-held <= rows.min() and rows.max() < held):
            raise IndexError(f"row indices from {rows.min()} to {rows.max()} do not fit a cache of {held} rows")

    def fork(self) -> Tables:
        """The same contents on the same pages; whoever writes into a page first copies it."""
        tables = self.settled()
        twin = object.__new__(Tables)
        twin.windows, twin.kv_dtype, twin.lengths = self.windows, self.kv_dtype, list(self.lengths)
        twin.states, twin.reordering = {}, None
        twin.by_window = {window: table.fork(self.longest(window)) for window, table in tables.items()}
        return twin

    def window(self, layer_idx: int) -> int:
        """The sliding window of a layer that keeps K and V."""
        window = self.windows[layer_idx]
        assert window is not None
        return window

    def length(self, layer_idx: int) -> int:
        """Tokens a row of a layer: of its assigned keys, where there are any."""
        states = self.states.get(layer_idx)
        keys = states.tensors[0] if states is not None and states.assigned(0) else None
        return self.lengths[layer_idx] if keys is None else keys.shape[2]

    def get(self, layer_idx: int, which: int) -> torch.Tensor | None:
        """Keys or values of a layer `[rows, H_kv, tokens, head_dim]`, from its window on; None where there are none.

        Edits in place hold, and are those of this cache's rows alone: it is a view of pages that nobody else holds, or
        a copy that is written back.
        """
        self.reorder()
        table, end = self.by_window[self.window(layer_idx)], self.lengths[layer_idx]
        states = self.states.get(layer_idx)
        if states is not None and states.tensors[which] is not None:
            return states.tensors[which]
        if not end:
            return None
        begin = table.first_visible(end)
        tensor, in_place = dense.editable(table.pool, layer_idx, which, table, begin, end)
        if not in_place:
            self.states.setdefault(layer_idx, States(begin, end)).lend(which, tensor)
        return tensor

    def assign(self, layer_idx: int, which: int, given: torch.Tensor | None) -> None:
        """Makes `given` a layer's keys or values. Raises ValueError for what its pages cannot hold.

        Behind a sliding window raises NotImplementedError: the positions of what is assigned are not known.
        """
        window = self.window(layer_idx)
        if window:
            raise NotImplementedError(
                f"{NAMES[which]} of a PagedCache's layer with a sliding window of {window} cannot be assigned: pass "
                "DynamicCache(config=model.config) to the call, or edit them in place"
            )
        self.reorder()
        tensor = checked(which, given, self.by_window[window].pool.storage.get(layer_idx))
        self.states.setdefault(layer_idx, States(0, self.lengths[layer_idx])).assign(which, tensor)

    def _take_back(self) -> None:
        """Writes what `states` holds to pages, and forgets it."""
        with self.atomic():
            for window, table in self.by_window.items():
                own = {i: states for i, states in self.states.items() if self.windows[i] == window}
                if any(states.any_assigned for states in own.values()):
                    self._begin_anew(table, own)
                else:
                    self._write_edits(table, own)
            self.states = {}

    def _write_edits(self, table: BlockTable, own: dict[int, States]) -> None:
        """Writes copies that were edited to the positions that they are of."""
        for layer_idx, states in own.items():
            for which, tensor in enumerate(states.tensors):
                if states.edited(which):
                    assert tensor is not None
                    table.unshare(states.begin, states.end)
                    storage = table.pool.storage[layer_idx]
                    dense.write_rows(storage, which, table, states.begin, states.end, tensor)

    def _begin_anew(self, table: BlockTable, own: dict[int, States]) -> None:
        """Writes all layers of a kind to fresh pages: what was assigned, and what the others hold."""
        layers = [i for i, window in enumerate(self.windows) if window == table.window]
        shapes = {i: self._shape(table, i, own.get(i)) for i in layers if self.lengths[i] or i in own}
        rows = {shape[0] for shape in shapes.values()}
        if len(rows) > 1:
            raise ValueError(
                f"layers have keys and values of {sorted(rows)} rows: assign those of every layer, or reset() the cache"
            )
        longest = max(shape[2] for shape in shapes.values())
        fresh = BlockTable(table.pool, table.window)
        if longest:
            first = next(layer_idx for layer_idx, shape in shapes.items() if shape[2])
            keys, values = self._both(table, first, own.get(first))
            table.pool.expect(keys, values, self.kv_dtype)
            fresh.start(rows.pop())
            fresh.prepare(0, longest)
        for layer_idx, (*_, length) in shapes.items():
            if length:
                keys, values = self._both(table, layer_idx, own.get(layer_idx))
                if layer_idx not in table.pool.storage:
                    table.pool.add_layer(layer_idx, keys, values, self.kv_dtype)
                storage = table.pool.storage[layer_idx]
                dense.write_rows(storage, dense.KEYS, fresh, 0, length, keys)
                dense.write_rows(storage, dense.VALUES, fresh, 0, length, values)
            self.lengths[layer_idx] = length
        table.take(fresh)

    def _shape(self, table: BlockTable, layer_idx: int, states: States | None) -> tuple[int, ...]:
        """Rows, heads and tokens of a layer as it is to be. Raises ValueError where keys and values differ in them."""
        storage, shapes = table.pool.storage.get(layer_idx), []
        for which in (dense.KEYS, dense.VALUES):
            tensor = None if states is None else states.tensors[which]
            if tensor is not None:
                shapes.append(tuple(tensor.shape[:3]))
            else:
                heads = 0 if storage is None else len(storage.k)
                shapes.append((table.rows, heads, self.lengths[layer_idx]))
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"layer {layer_idx} has keys {list(shapes[0])} and values {list(shapes[1])} [rows, KV heads, tokens]: "
                "assign both alike, or reset() the cache"
            )
        return shapes[0]

    def _both(self, table: BlockTable, layer_idx: int, states: States | None) -> list[torch.Tensor]:
        """A layer's keys and values as they are to be: outside of the pages, or what these hold."""
        outside = [None, None] if states is None else states.tensors
        return [
            dense.read(table.pool, layer_idx, which, table, 0, self.lengths[layer_idx]) if tensor is None else tensor
            for which, tensor in enumerate(outside)
        ]
