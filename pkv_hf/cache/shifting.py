"""Tokens of one row moved to the right in many: the pages of a prefix under left padding."""

from __future__ import annotations

import numpy as np
import torch

from pkv_hf.cache.paged import PagedCache
from pkv_hf.cache.pool import NULL_PAGE, PagePool
from pkv_hf.cache.table import BlockTable


def shifted(cache: PagedCache, pads: np.ndarray) -> PagedCache:
    """A fork of a cache of one row without padding: row `i` of it is `pads[i]` positions of padding, then its tokens.

    The fork is as long as the cache, so that row `i` lacks the last `pads[i]` tokens, or all where there are no more.
    Rows that are moved by whole pages share the cache's pages. All that are moved by as much beyond whole pages share
    one copy, of bytes and scales as they are stored.

    The cache keeps its pages behind sliding windows (`activate_past_recording`), since rows are moved out of there; the
    fork does not.

    Linear-attention states are of all tokens: with them no row lacks any.

    Raises PoolAllocationError, with nothing held, where the copies do not fit.
    """
    assert not (pads.any() and cache.linear_layers)
    fork, length = cache.fork(), cache.get_seq_length()
    for table in fork.tables.values():
        _shift(table, pads, length)
    for layer in fork.paged_layers:
        layer.record_past = False
    for of_states in fork.linear_layers:
        of_states.select_states(torch.zeros(len(pads), dtype=torch.int64))
    return fork


def _shift(table: BlockTable, pads: np.ndarray, length: int) -> None:
    """Moves the one row of a table, as long as `length`, into a row for each of `pads`, int64 `[rows]`."""
    size, allocator, own = table.page_size, table.pool.allocator, table.pages[0]
    live, columns = table.first_visible(length) // size, np.arange(len(own))
    before, inside = np.divmod(pads[:, None], size)
    page = columns - before  # of the moved row, by its own count
    held = (page >= 0) & (columns >= live) & (pads[:, None] < length)
    aligned, moved = held & (inside == 0), held & (inside > 0)
    copies, which = np.unique((inside * len(own) + page)[moved], return_inverse=True)
    table.pool.require(len(copies))
    made = allocator.alloc(len(copies))
    pages = np.full(held.shape, NULL_PAGE, dtype=np.int32)
    pages[aligned], pages[moved] = own[page[aligned]], made[which]
    table.place(pages, pads, live * size)
    if len(copies):
        inside, page = np.divmod(copies, len(own))
        _copy_moved(table.pool, own, page * size - inside, made, length)


def _copy_moved(pool: PagePool, own: np.ndarray, first: np.ndarray, made: np.ndarray, length: int) -> None:
    """Fills pages `made` with the tokens of `own` from the `first` of each on, those that are not there with zeros."""
    size = pool.page_size
    wanted = first[:, None] + np.arange(size)
    token = np.clip(wanted, 0, length - 1)
    source = np.where(wanted == token, own[token // size], NULL_PAGE).astype(np.int64) * size + token % size
    target = made[:, None].astype(np.int64) * size + np.arange(size)
    pool.copy_tokens(source.ravel(), target.ravel())
