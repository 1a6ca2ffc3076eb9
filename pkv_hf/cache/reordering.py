"""Beams' new order on its way from the GPU to the block tables, which are the host's."""

from __future__ import annotations

import numpy as np
import torch


class Reordering:
    """Rows on their way from a GPU, copied without waiting for them."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = torch.empty(rows.shape, dtype=rows.dtype, device="cpu", pin_memory=True)
        self._rows.copy_(rows, non_blocking=True)
        self._copied = torch.cuda.current_stream(rows.device).record_event()

    def rows(self) -> np.ndarray:
        self._copied.synchronize()
        return self._rows.numpy()
