"""A block table on a device, where kernels and captured steps read it."""

from __future__ import annotations

import numpy as np
import torch


class Mirror:
    """A device's copy of a block table: `pages` int32 `[rows, columns]`, `first_held` int32 `[rows]`.

    Captured steps keep the addresses: a mirror is written in place for as long as the table fits. Columns beyond the
    table's name the null page.
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # what is made in that mode cannot be written outside of it
            self.pages = torch.zeros((rows, columns), dtype=torch.int32, device=device)
            self.first_held = torch.zeros(rows, dtype=torch.int32, device=device)
        self.version = -1  # of the table that it shows, -1 for none

    def fits(self, rows: int, columns: int) -> bool:
        return len(self.pages) == rows and self.pages.shape[1] >= columns

    def show(self, pages: np.ndarray, first_held: list[int], version: int) -> None:
        """Takes over a version of the table, on the current stream, without waiting."""
        padded = np.zeros(self.pages.shape, dtype=np.int32)
        padded[:, : pages.shape[1]] = pages
        _upload(self.pages, padded)
        _upload(self.first_held, np.array(first_held, dtype=np.int32))
        self.version = version


def _upload(target: torch.Tensor, source: np.ndarray) -> None:
    """Copies to a device without waiting. torch reuses the pinned buffer once the copy has run."""
    host = torch.from_numpy(source)
    target.copy_(host.pin_memory() if target.is_cuda else host, non_blocking=True)
