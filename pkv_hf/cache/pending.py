"""What is still to be done to a cache when it is used next: rows that change places, K and V outside of the pages."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pkv_hf.cache.pool import LayerStorage

NAMES = ("keys", "values")


def check_indices(indices: Any, rows: int) -> None:
    """Raises ValueError for what does not say which of so many rows to keep."""
    wrong = not isinstance(indices, torch.Tensor) or indices.ndim != 1
    wrong = wrong or indices.is_floating_point() or indices.is_complex()
    if wrong or (indices.dtype == torch.bool and len(indices) != rows):
        given = f"{indices.dtype} {list(indices.shape)}" if isinstance(indices, torch.Tensor) else repr(indices)
        raise ValueError(f"indices is {given}: want integers [count] or booleans [{rows}] in a tensor")


class Reordering:
    """Beams' new order on its way from a GPU to the block tables, which are the host's; nobody waits for it."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = torch.empty(rows.shape, dtype=rows.dtype, device="cpu", pin_memory=True)
        self._rows.copy_(rows, non_blocking=True)
        self._copied = torch.cuda.current_stream(rows.device).record_event()

    def rows(self) -> np.ndarray:
        self._copied.synchronize()
        return self._rows.numpy()


class States:
    """Keys and values of one layer `[rows, H_kv, tokens, head_dim]`: assigned ones, and copies of what its pages hold.

    A copy is of positions [begin, end) and may be edited in place, which its version tells.
    """

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        self.tensors: list[torch.Tensor | None] = [None, None]
        self._versions: list[int | None] = [None, None]  # of copies, as they were made

    def lend(self, which: int, copy: torch.Tensor) -> None:
        self.tensors[which], self._versions[which] = copy, copy._version

    def assign(self, which: int, given: torch.Tensor) -> None:
        self.tensors[which], self._versions[which] = given, None

    def assigned(self, which: int) -> bool:
        return self.tensors[which] is not None and self._versions[which] is None

    def edited(self, which: int) -> bool:
        tensor, version = self.tensors[which], self._versions[which]
        return tensor is not None and version is not None and tensor._version != version

    @property
    def any_assigned(self) -> bool:
        return self.assigned(0) or self.assigned(1)


def checked(which: int, given: Any, storage: LayerStorage | None) -> torch.Tensor:
    """Keys or values that are assigned to a layer. Raises ValueError for what its pages cannot hold."""
    name = NAMES[which]
    if not isinstance(given, torch.Tensor) or not given.is_floating_point() or given.ndim != 4 or not len(given):
        said = f"{given.dtype} {list(given.shape)}" if isinstance(given, torch.Tensor) else repr(given)
        raise ValueError(
            f"{name} is {said}: assign a tensor of floating point [rows, KV heads, tokens, head_dim]; reset() of the "
            "cache forgets all tokens"
        )
    if storage is None:
        return given
    pages = (storage.k, storage.v)[which]
    heads, head_dim = pages.shape[0], pages.shape[3]
    if (given.shape[1], given.shape[3]) != (heads, head_dim):
        raise ValueError(
            f"{name} has {given.shape[1]} heads of {given.shape[3]}, but the PagedCache holds {heads} of {head_dim}: "
            "use a cache for each model"
        )
    if given.device != pages.device:
        raise ValueError(f"{name} is on {given.device}, the layer's pages on {pages.device}: move it there first")
    return given
