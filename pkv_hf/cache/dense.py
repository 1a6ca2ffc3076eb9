"""K and V between dense tensors and the pages of a layer: written, quantised where pages are, and read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from pkv_hf.cache.packing import Places
from pkv_hf.cache.pool import LayerStorage, PagePool, movable
from pkv_hf.cache.table import BlockTable
from pkv_hf.kernels.quantize import dequantize, quantize

KEYS, VALUES = 0, 1
"""Which of the two, in a `LayerStorage`."""


def write(storage: LayerStorage, which: int, states: torch.Tensor, put: Callable) -> None:
    """Lets `put(head-major storage, states)` write K or V, `[..., head_dim]`, and scales where pages are quantised."""
    pages, scales, states = storage[which], storage[which + 2], states.detach()
    assert pages is not None
    if scales is not None:
        states, of_states = quantize(states, pages.dtype)
        put(scales[..., None], of_states[..., None])
    put(pages, states)


def write_rows(
    storage: LayerStorage, which: int, table: BlockTable, begin: int, end: int, states: torch.Tensor
) -> None:
    """Writes K or V `[rows, H_kv, end - begin, head_dim]` at positions [begin, end), which are writable."""
    write(storage, which, states, lambda pages, states: write_tokens(pages, table, begin, end, states))


def read(
    pool: PagePool, layer_idx: int, which: int, table: BlockTable, begin: int, end: int, rows: slice = slice(None)
) -> torch.Tensor:
    """K or V of positions [begin, end) of some rows, `[rows, H_kv, end - begin, head_dim]`.

    A view of the pages where every row's are consecutive and evenly apart, else a copy; null pages read as zeros.
    Quantised pages come in the dtype of the states that were written.
    """
    storage = pool.storage[layer_idx]
    pages, scales = storage[which], storage[which + 2]
    assert pages is not None
    dense = read_dense(pages, table, begin, end, rows)
    if scales is None:
        return dense
    return dequantize(dense, read_dense(scales[..., None], table, begin, end, rows)[..., 0], pool.state_dtype)


def editable(
    pool: PagePool, layer_idx: int, which: int, table: BlockTable, begin: int, end: int
) -> tuple[torch.Tensor, bool]:
    """`read` of all rows as what may be edited in place, and whether the edit is the pages' own.

    It is where the pages read as one view, are not quantised, and nobody else holds one.
    """
    scales = pool.storage[layer_idx][which + 2]
    with torch.inference_mode(False):  # what is made in that mode counts no edits
        dense = read(pool, layer_idx, which, table, begin, end)
        viewed = scales is None and _run(table, begin, slice(None)) is not None
        if viewed and table.alone(begin, end):
            return dense, True
        return dense.clone() if viewed else dense, False


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
    run = _run(table, begin, rows)
    if run is not None:
        count, first, apart = run
        return storage.as_strided(
            (count, heads, end - begin, head_dim),
            (apart * head_dim, storage.stride(0), head_dim, 1),
            storage.storage_offset() + (first + begin) * head_dim,
        )
    first_page, last_page = begin // page_size, -(-end // page_size)
    pages = table.pages[rows, first_page:last_page]
    index = torch.from_numpy(pages.reshape(-1).astype(np.int64)).to(storage.device)
    tokens = (
        movable(storage)
        .index_select(1, index)
        .view(storage.dtype)
        .view(heads, len(pages), -1, head_dim)
        .transpose(0, 1)
    )
    inside = begin - first_page * page_size
    return tokens[:, :, inside : inside + end - begin]


def _run(table: BlockTable, begin: int, rows: slice) -> tuple[int, int, int] | None:
    """How many rows there are, the first one's offset, and slots from each to the next; None where slots are not so."""
    offsets = table.offsets()[rows]
    if None in offsets or begin < max(table.first_held()[rows]):
        return None
    first = offsets[0]
    apart = offsets[1] - first if len(offsets) > 1 else 0  # type: ignore[operator]
    if apart < 0 or any(offset != first + i * apart for i, offset in enumerate(offsets)):  # type: ignore[operator]
        return None
    return len(offsets), first, apart  # type: ignore[return-value]
