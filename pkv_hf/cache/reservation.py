"""How many positions a table takes pages for when its first tokens come."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LIKELY = 8192
"""New tokens that a row is taken to come to, where its limit is beyond: most limits are never reached."""


def affordable(length: int, limit: int, fits: Callable[[int], bool]) -> int:
    """Positions to reserve, up to `limit`, for rows of `length` tokens: for the likely new ones, or a part of these.

    `fits` says of a number of positions whether memory holds them. What the rows have already is not asked about.
    """
    new = max(min(limit - length, LIKELY), 0)
    while new and not fits(length + new):
        new //= 2
    return min(length + new, limit)


def pages_of_copies(pads: np.ndarray, page_size: int, positions: int, copies: int, shared: int) -> int:
    """Pages that `positions` of rows with `pads` leading positions of padding take, each as `copies` rows.

    Whole pages of the first `shared` positions count once, all that follow for each copy.
    """
    first, end = pads // page_size, -(-positions // page_size)
    shared_end = min(shared // page_size, end)
    together = np.maximum(shared_end - first, 0)
    own = np.maximum(end - np.maximum(first, shared_end), 0)
    return int(together.sum() + copies * own.sum())
