"""The sizes and dtypes that pages come in, and what a cache takes of memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pkv_hf.cache.table import BlockTable
from pkv_hf.kernels.quantize import LARGEST

PAGE_SIZES = (16, 32, 64, 128, 256)
KV_DTYPES: dict[Any, torch.dtype] = {
    **{dtype: dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, *LARGEST)},
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
"""What pages can hold, by what a caller may write for it."""


def check_page_size(page_size: int) -> None:
    """Raises ValueError for what pages do not come in."""
    if type(page_size) is not int or page_size not in PAGE_SIZES:
        raise ValueError(f"page_size={page_size!r} is not one of {PAGE_SIZES}")


def check_kv_dtype(kv_dtype: torch.dtype | str | None) -> None:
    """Raises ValueError for what no pages can hold."""
    if kv_dtype is not None and (not isinstance(kv_dtype, (str, torch.dtype)) or kv_dtype not in KV_DTYPES):
        raise ValueError(f"kv_dtype={kv_dtype!r} is not one of {list(KV_DTYPES)}, or None for the dtype of the states")


@dataclass(frozen=True)
class CacheMemory:
    """What a cache holds. Pages are counted over the kinds of layers, each page once for all layers of its kind."""

    held_bytes: int
    """Bytes of the page pools, K and V of all layers, of linear-attention states, and of those that a step is taken
    back to."""
    live_bytes: int
    """Bytes of the tokens that can still be attended to; a token that several rows share counts once a row. All of the
    linear-attention states count."""
    pages_in_use: int
    """Pages that this cache's rows hold, pages reserved for tokens to come included."""
    pages_free: int
    """Pages of the pools that nobody holds."""
    pages_shared: int
    """Pages held more than once, by several rows or by forks."""

    @classmethod
    def of(cls, tables: Iterable[BlockTable], length: int, states: int, second: int) -> CacheMemory:
        """Of tables whose rows are `length` tokens long, `states` bytes of linear-attention states, and `second` of
        the buffers that these are copied into."""
        held, live = states + second, states
        in_use = free = shared = 0
        for table in tables:
            counts = table.pool.allocator.refcounts
            named = np.unique(table.pages[table.pages > 0])
            in_use += len(named)
            shared += int(np.count_nonzero(counts[named] > 1))
            free += table.pool.allocator.free
            first = np.maximum(table.pads, table.first_visible(length))
            tokens = int(np.maximum(length - first, 0).sum())
            live += tokens * table.pool.page_nbytes // table.page_size
            held += table.pool.nbytes
        return cls(held, live, in_use, free, shared)
