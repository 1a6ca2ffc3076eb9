"""One layer of a `PagedCache`: what transformers reads and writes, over pages."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from pkv_hf.cache.packing import Packing, Places
from pkv_hf.cache.pool import movable
from pkv_hf.cache.table import BlockTable
from pkv_hf.kernels.quantize import dequantize, quantize


class PagedLayer(CacheLayerMixin):
    """K and V of one attention layer in the pages of a pool, `length` tokens a row.

    `update` is transformers' own contract: it returns dense K and V, views of the pages where those are consecutive and
    copies where not. A patched model does not call it; its steps write with `write` and read pages in place.
    """

    is_croppable = True

    def __init__(self, table: BlockTable, layer_idx: int, kv_dtype: torch.dtype | None) -> None:
        self.table = table  # shared by all layers of a kind
        self.layer_idx = layer_idx
        self.kv_dtype = kv_dtype
        self.length = 0

    def __repr__(self) -> str:
        return f"PagedLayer(length={self.length}, window={self.table.window or None})"

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return self.layer_idx in self.table.pool.storage

    @property
    def is_sliding(self) -> bool:
        return self.table.window > 0

    @property
    def sliding_window(self) -> int | None:
        return self.table.window or None

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
        """Dense keys `[B, H_kv, S, head_dim]`, made on demand; S ends at the window. None before the first token."""
        return self._dense_since_window(0)

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """Dense values, as `keys`."""
        return self._dense_since_window(1)

    def _dense_since_window(self, which: int) -> torch.Tensor | None:
        if not self.length:
            return None
        return self.dense(self.first_visible(), self.length)[which]

    def first_visible(self) -> int:
        """The first position that a query at position `length` attends to."""
        return self.table.first_visible(self.length)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.table.pool.expect(key_states, value_states, self.kv_dtype)
        self.table.pool.add_layer(self.layer_idx, key_states, value_states, self.kv_dtype)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends states `[B, H_kv, q_len, head_dim]`; returns K and V of every position that their queries can see."""
        first, past = self.first_visible(), self.length
        held = self.dense(first, past) if past and getattr(key_states, "requires_grad", False) else None
        self.write(key_states, value_states)
        if not past:
            return key_states, value_states
        if held is not None:  # gradients flow to the new states, not through the pages
            return torch.cat([held[0], key_states], dim=-2), torch.cat([held[1], value_states], dim=-2)
        k, v = self.dense(first, self.length)
        return k.to(key_states.dtype), v.to(value_states.dtype)

    def write(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Appends states `[B, H_kv, q_len, head_dim]` to the pages, without building anything dense."""
        begin, end = self.length, self.prepare(key_states, value_states)
        self._write(
            (key_states, value_states),
            lambda storage, states: write_tokens(storage, self.table, begin, end, states),
        )
        self.length = end

    def write_packed(self, key_states: torch.Tensor, value_states: torch.Tensor, packing: Packing) -> None:
        """Writes the first tokens of all rows, states `[1, H_kv, packing.tokens, head_dim]` without their padding.

        Padding in a row's first page becomes zeros: a mask does not keep a NaN of fresh memory out of a softmax.
        """
        self.prepare(key_states, value_states, len(packing.starts), packing.length)
        places = packing.places(self.table, key_states.device)
        self._write(
            (key_states[0], value_states[0]),
            lambda storage, tokens: write_places(storage, places, tokens),
        )
        self.length = packing.length

    def _write(
        self, states: tuple[torch.Tensor, torch.Tensor], put: Callable[[torch.Tensor, torch.Tensor], None]
    ) -> None:
        """Lets `put` write K and V, each `[..., head_dim]`, and their scales where pages are quantised."""
        k, v, *scales = self.table.pool.storage[self.layer_idx]
        for tokens, storage, storage_scales in zip(states, (k, v), scales):
            tokens = tokens.detach()
            if storage_scales is not None:
                tokens, of_tokens = quantize(tokens, storage.dtype)
                put(storage_scales[..., None], of_tokens[..., None])
            put(storage, tokens)

    def prepare(
        self, key_states: torch.Tensor, value_states: torch.Tensor, rows: int | None = None, q_len: int | None = None
    ) -> int:
        """Makes pages for the next `q_len` tokens of `rows` rows, by default as many as the states have.

        Returns the position where they end. Raises ValueError where the states are not those of the rows and heads that
        the cache holds.
        """
        self._check(key_states, value_states)
        rows, q_len = rows or len(key_states), q_len or key_states.shape[2]
        if not self.table.rows:
            self.table.start(rows)
        if rows != self.table.rows:
            raise ValueError(
                f"key_states has batch {rows}, but the PagedCache holds {self.table.rows} rows: use a new cache, "
                "reset(), batch_repeat_interleave() or batch_select_indices()"
            )
        self.table.pool.expect(key_states, value_states, self.kv_dtype)
        self.table.prepare(self.length, self.length + q_len)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.length + q_len

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
            ("key_states", "value_states"), (key_states, value_states), self.table.pool.storage[self.layer_idx]
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
        return self.table.pool.layer(self.layer_idx)

    @property
    def scales(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Scales of quantised K and V, each float32 `[num_pages, H_kv, page_size]`; None where they are not."""
        return self.table.pool.scales(self.layer_idx)

    def dense(self, begin: int, end: int, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of positions [begin, end) of some rows, each `[rows, H_kv, end - begin, head_dim]`.

        Views of the pages where every row's are consecutive and evenly apart, else copies; null pages read as zeros.
        Quantised pages come in the dtype of the states that were written.
        """
        k, v, *scales = self.table.pool.storage[self.layer_idx]
        dense = [read_dense(storage, self.table, begin, end, rows) for storage in (k, v)]
        for i, storage_scales in enumerate(scales):
            if storage_scales is not None:
                apart = read_dense(storage_scales[..., None], self.table, begin, end, rows)
                dense[i] = dequantize(dense[i], apart[..., 0], self.table.pool.state_dtype)
        return dense[0], dense[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self.first_visible()
        return self.length - first + query_length, first

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.table.window or -1

    def offload(self) -> None:
        raise NotImplementedError("a PagedCache is not offloaded: use cache_implementation='offloaded' instead")

    def prefetch(self) -> None:
        raise NotImplementedError("a PagedCache is not offloaded: use cache_implementation='offloaded' instead")


def write_tokens(storage: torch.Tensor, table: BlockTable, begin: int, end: int, states: torch.Tensor) -> None:
    """Writes states `[rows, H, end - begin, D]` at positions [begin, end) of head-major storage `[H, num_pages,
    page_size, D]`. Positions in null pages are left out."""
    flat = movable(storage).view(storage.shape[0], -1, storage.shape[3])
    for row, (held, offset) in enumerate(zip(table.first_held(), table.offsets())):
        first = max(begin, held)
        tokens = movable(states[row][:, first - begin :])
        if offset is not None:
            flat[:, first + offset : end + offset] = tokens
        elif first < end:
            slots = torch.from_numpy(table.slots(row, first, end)).to(storage.device)
            flat.index_copy_(1, slots, tokens.to(flat.dtype))


def write_places(storage: torch.Tensor, places: Places, tokens: torch.Tensor) -> None:
    """Writes packed tokens `[H, tokens, D]` to their places in head-major storage, and zeros to the padding's."""
    flat = movable(storage).view(storage.shape[0], -1, storage.shape[3])
    tokens = movable(tokens)
    if len(places.kept) < tokens.shape[1]:
        tokens = tokens.index_select(1, places.kept)
    flat.index_copy_(1, places.slots, tokens.to(flat.dtype))
    if len(places.padding):
        flat.index_fill_(1, places.padding, 0)


def read_dense(storage: torch.Tensor, table: BlockTable, begin: int, end: int, rows: slice) -> torch.Tensor:
    """Positions [begin, end) of head-major storage `[H, num_pages, page_size, D]` as `[rows, H, end - begin, D]`."""
    heads, _, page_size, head_dim = storage.shape
    offsets = table.offsets()[rows]
    if None not in offsets and begin >= max(table.first_held()[rows]):
        first = offsets[0]
        apart = offsets[1] - first if len(offsets) > 1 else 0  # type: ignore[operator]
        if apart >= 0 and all(offset == first + i * apart for i, offset in enumerate(offsets)):  # type: ignore[operator]
            return storage.as_strided(
                (len(offsets), heads, end - begin, head_dim),
                (apart * head_dim, storage.stride(0), head_dim, 1),
                storage.storage_offset() + (first + begin) * head_dim,  # type: ignore[operator]
            )
    first_page, last_page = begin // page_size, -(-end // page_size)
    pages = table.pages[rows, first_page:last_page]
    index = torch.from_numpy(pages.reshape(-1).astype(np.int64)).to(storage.device)
    tokens = (
        movable(storage)
        .index_select(1, index)
        .view(storage.dtype)
        .view(heads, len(offsets), -1, head_dim)
        .transpose(0, 1)
    )
    inside = begin - first_page * page_size
    return tokens[:, :, inside : inside + end - begin]
