"""One layer of a `PagedCache`: what transformers reads and writes, over pages."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from pkv_hf.cache import dense
from pkv_hf.cache.packing import Packing
from pkv_hf.cache.pool import PagePool
from pkv_hf.cache.table import BlockTable
from pkv_hf.cache.tables import Tables


class PagedLayer(CacheLayerMixin):
    """K and V of one attention layer in the pages of a pool, `length` tokens a row.

    `update` is transformers' own contract: it returns dense K and V, views of the pages where those are consecutive and
    copies where not. A patched model does not call it; its steps write with `write` and read pages in place.
    """

    is_croppable = True
    # of one layer alone, as transformers' own do it: by assigning its keys and values
    crop = DynamicLayer.crop
    batch_repeat_interleave = DynamicLayer.batch_repeat_interleave
    batch_select_indices = DynamicLayer.batch_select_indices

    def __init__(self, tables: Tables, layer_idx: int) -> None:
        self.tables = tables  # shared by all layers of a cache
        self.layer_idx = layer_idx
        self.window = tables.window(layer_idx)
        self.kv_dtype = tables.kv_dtype

    def __repr__(self) -> str:
        return f"PagedLayer(length={self.length}, window={self.window or None})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedLayer:
        """As a part of its cache alone, whose tables are copied first: by itself it would copy the pages of all."""
        if id(self.tables) not in memo:
            raise NotImplementedError(
                "the layers of a PagedCache share its pages, one alone cannot be copied: copy.deepcopy() the cache, or "
                "pass DynamicCache(config=model.config) to a model that copies layers"
            )
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    @property
    def table(self) -> BlockTable:
        """Shared by all layers of a kind."""
        return self.tables.settled()[self.window]

    @property
    def _pool(self) -> PagePool:
        return self.tables.by_window[self.window].pool

    @property
    def length(self) -> int:
        """Tokens a row."""
        return self.tables.length(self.layer_idx)

    @length.setter
    def length(self, length: int) -> None:
        self.tables.lengths[self.layer_idx] = length

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return self.layer_idx in self._pool.storage

    @property
    def is_sliding(self) -> bool:
        return self.window > 0

    @property
    def sliding_window(self) -> int | None:
        return self.window or None

    @property
    def _sliding_window_tensor(self) -> torch.Tensor | None:
        """What a `DynamicCache` of transformers yields beside keys and values, where it is iterated over."""
        return torch.tensor(self.window, device=self._pool.device) if self.window else None

    @property
    def record_past(self) -> bool:
        return self.table.keep_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.table.keep_past = value

    def activate_past_recording(self) -> None:
        """Keeps what leaves the sliding window until the next `crop`, so that `crop` can go back to it."""
        self.table.keep_past = self.is_sliding

    @property
    def batch_size(self) -> int:
        return self.table.rows

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """Dense keys `[B, H_kv, S, head_dim]`, made on demand; S ends at the window. None before the first token.

        Where pages are not one view it is a copy, which the cache keeps until it is used next. Edits in place, by
        torch's operations, hold in it and from then on in the pages; edits that go around them (`.data`, numpy) may be
        lost. What is assigned takes the place of the layer's keys, of any number of tokens and rows: all its layers of
        full attention then begin anew, and what of the rows is padding, attention masks say. Raises ValueError for
        other than a tensor of the layer's heads, and NotImplementedError behind a sliding window.
        """
        return self.tables.get(self.layer_idx, dense.KEYS)

    @keys.setter
    def keys(self, given: torch.Tensor | None) -> None:
        self.tables.assign(self.layer_idx, dense.KEYS, given)

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """Dense values, as `keys`."""
        return self.tables.get(self.layer_idx, dense.VALUES)

    @values.setter
    def values(self, given: torch.Tensor | None) -> None:
        self.tables.assign(self.layer_idx, dense.VALUES, given)

    def first_visible(self) -> int:
        """The first position that a query at position `length` attends to."""
        return self.tables.by_window[self.window].first_visible(self.length)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._pool.expect(key_states, value_states, self.kv_dtype)
        self._pool.add_layer(self.layer_idx, key_states, value_states, self.kv_dtype)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends states `[B, H_kv, q_len, head_dim]`; returns K and V of every position that their queries can see.

        What fails leaves the layer as it was.
        """
        table, past = self.table, self.length
        first, before = self.first_visible(), table.state()
        try:
            held = self.dense(first, past) if past and getattr(key_states, "requires_grad", False) else None
            self.write(key_states, value_states)
            if not past:
                return key_states, value_states
            if held is not None:  # gradients flow to the new states, not through the pages
                return torch.cat([held[0], key_states], dim=-2), torch.cat([held[1], value_states], dim=-2)
            k, v = self.dense(first, self.length)
            return k.to(key_states.dtype), v.to(value_states.dtype)
        except BaseException:
            self.length = past
            if not past:
                table.restore(before)
                table.pool.forget_unfinished()
            raise

    def write(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Appends states `[B, H_kv, q_len, head_dim]` to the pages, without building anything dense."""
        begin, end = self.length, self.prepare(key_states, value_states)
        table = self.table
        storage = table.pool.storage[self.layer_idx]
        dense.write_rows(storage, dense.KEYS, table, begin, end, key_states)
        dense.write_rows(storage, dense.VALUES, table, begin, end, value_states)
        self.length = end

    def write_packed(self, key_states: torch.Tensor, value_states: torch.Tensor, packing: Packing) -> None:
        """Writes the first tokens of all rows, states `[1, H_kv, packing.tokens, head_dim]` without their padding.

        Padding in a row's first page becomes zeros: a mask does not keep a NaN of fresh memory out of a softmax.
        """
        self.prepare(key_states, value_states, len(packing.starts), packing.length)
        table = self.table
        places, storage = packing.places(table, key_states.device), table.pool.storage[self.layer_idx]
        for which, states in enumerate((key_states[0], value_states[0])):
            dense.write(storage, which, states, lambda pages, tokens: dense.write_places(pages, places, tokens))
        self.length = packing.length

    def prepare(
        self, key_states: torch.Tensor, value_states: torch.Tensor, rows: int | None = None, q_len: int | None = None
    ) -> int:
        """Makes pages for the next `q_len` tokens of `rows` rows, by default as many as the states have.

        Returns the position where they end. Raises ValueError where the states are not those of the rows and heads that
        the cache holds.
        """
        self._check(key_states, value_states)
        rows, q_len = rows or len(key_states), q_len or key_states.shape[2]
        table, begin = self.table, self.length
        if not table.rows:
            table.start(rows)
        if rows != table.rows:
            raise ValueError(
                f"key_states has batch {rows}, but the PagedCache holds {table.rows} rows: use a new cache, "
                "reset(), batch_repeat_interleave() or batch_select_indices()"
            )
        table.pool.expect(key_states, value_states, self.kv_dtype)
        table.prepare(begin, begin + q_len)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return begin + q_len

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Raises ValueError for states that the pages of this layer cannot take."""
        for name, states in (("key_states", key_states), ("value_states", value_states)):
            if not isinstance(states, torch.Tensor) or not states.is_floating_point():
                given = states.dtype if isinstance(states, torch.Tensor) else f"a {type(states).__name__}"
                raise ValueError(f"{name} is {given}: want a tensor of floating point")
        shape = key_states.shape
        if len(shape) != 4 or shape[:3] != value_states.shape[:3] or not shape[1] * shape[3] * value_states.shape[3]:
            raise ValueError(
                f"key_states is {list(key_states.shape)} and value_states {list(value_states.shape)}: want both "
                "[batch, KV heads, tokens, head_dim], alike but for head_dim"
            )
        if not self.is_initialized:
            return
        for name, states, pages in zip(
            ("key_states", "value_states"), (key_states, value_states), self._pool.storage[self.layer_idx]
        ):
            heads, head_dim = pages.shape[0], pages.shape[3]  # type: ignore[union-attr]
            if (states.shape[1], states.shape[3]) != (heads, head_dim):
                raise ValueError(
                    f"{name} has {states.shape[1]} heads of {states.shape[3]}, but the PagedCache holds {heads} of "
                    f"{head_dim}: use a cache for each model"
                )

    @property
    def pages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V pages, each `[num_pages, H_kv, page_size, head_dim]`."""
        return self._pool.layer(self.layer_idx)

    @property
    def scales(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Scales of quantised K and V, each float32 `[num_pages, H_kv, page_size]`; None where they are not."""
        return self._pool.scales(self.layer_idx)

    def dense(self, begin: int, end: int, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of positions [begin, end) of some rows, `[rows, H_kv, end - begin, head_dim]`, by `dense.read`."""
        table = self.table
        k, v = (
            dense.read(table.pool, self.layer_idx, which, table, begin, end, rows)
            for which in (dense.KEYS, dense.VALUES)
        )
        return k, v

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self.first_visible()
        return self.length - first + query_length, first

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.window or -1

    def reset(self) -> None:
        raise NotImplementedError("the layers of a PagedCache share its rows: reset() of the cache forgets all of them")

    def offload(self) -> None:
        raise NotImplementedError("a PagedCache is not offloaded: use cache_implementation='offloaded' instead")

    def prefetch(self) -> None:
        raise NotImplementedError("a PagedCache is not offloaded: use cache_implementation='offloaded' instead")
