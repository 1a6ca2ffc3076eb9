"""Pages and who holds them: how many are taken, a reference-counting allocator, and the K and V storage behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

import numpy as np
import psutil
import torch

from pkv_hf.errors import PoolAllocationError
from pkv_hf.kernels.quantize import LARGEST


class LayerStorage(NamedTuple):
    """One layer's memory, head-major: pages `[H_kv, num_pages, page_size, head_dim]`, scales `[H_kv, num_pages,
    page_size]` in float32 where pages are quantised."""

    k: torch.Tensor
    v: torch.Tensor
    k_scales: torch.Tensor | None
    v_scales: torch.Tensor | None

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor in self if tensor is not None]


def movable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as torch moves it about: its bytes where it is of float8, which torch does not index."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


NULL_PAGE = 0
"""Table entries of pages that hold no token (left padding, behind a window) name this page; it is all zeros."""

LIKELY = 8192
"""New tokens that a row is taken to come to, where its limit is beyond: most limits are never reached."""

GROWTH = 1.25
"""A pool that is full grows to this multiple of what it needs, so that appending stays linear in the tokens."""


class Holder(Protocol):
    """A block table, as the pages of its pool see it."""

    pages: np.ndarray
    """Those that it names, any shape."""


class PageAllocator:
    """How often each page of one pool is held. Page 0, the null page, is never handed out.

    Counts are derived: `holders` are the truth, and whoever changes what one of them names says so by `changed`. Pages
    of holders that are gone are free. What `alloc` hands out has to be named before it is asked again.
    `alloc` prefers a run of consecutive pages, since consecutive pages of a row can be read without a copy.
    """

    def __init__(self) -> None:
        self.holders: WeakSet[Holder] = WeakSet()
        self._refcounts: np.ndarray
        self._counted: int  # holders, as they were counted; -1 where one has changed since
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy of the same capacity: the tables copied along become its holders."""
        return {"_refcounts": self._refcounts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, holders=WeakSet(), _counted=-1)

    @property
    def refcounts(self) -> np.ndarray:
        """Of every page, int32 `[pages]`; the null page counts one holder."""
        if self._counted != len(self.holders):
            counts = np.zeros(len(self._refcounts), dtype=np.int32)
            for holder in self.holders:
                counts += np.bincount(holder.pages.reshape(-1), minlength=len(counts)).astype(np.int32)
            counts[NULL_PAGE] = 1
            self._refcounts, self._counted = counts, len(self.holders)
        return self._refcounts

    @property
    def capacity(self) -> int:
        """Pages that tokens can live in (the null page is not one of them)."""
        return len(self._refcounts) - 1

    @property
    def free(self) -> int:
        return int(np.count_nonzero(self.refcounts == 0))

    def changed(self) -> None:
        """Says that a holder names other pages than before."""
        self._counted = -1

    def forget(self) -> None:
        """Takes the capacity back to nothing."""
        self._refcounts = np.ones(1, dtype=np.int32)
        self._counted = -1

    def grow(self, capacity: int) -> None:
        added = capacity - self.capacity
        self._refcounts = np.concatenate([self._refcounts, np.zeros(added, dtype=np.int32)])

    def alloc(self, count: int, after: int = NULL_PAGE) -> np.ndarray:
        """Takes `count` free pages, as one run if there is one, the run that follows page `after` before all others.

        The caller makes sure that so many are free.
        """
        free = self.refcounts == 0
        if after != NULL_PAGE and after + count < len(free) and free[after + 1 : after + 1 + count].all():
            pages = np.arange(after + 1, after + 1 + count)
        else:
            pages = self._first_fit(np.flatnonzero(free), count)
        self._refcounts[pages] = 1
        return pages.astype(np.int32)

    @staticmethod
    def _first_fit(free: np.ndarray, count: int) -> np.ndarray:
        if len(free) < count:
            raise RuntimeError(f"{count} pages asked of a pool with {len(free)} free ones")
        runs = np.flatnonzero(free[count - 1 :] - free[: len(free) - count + 1] == count - 1)
        first = runs[0] if len(runs) else 0
        return free[first : first + count]


class PagePool:
    """The K and V pages of all layers of one kind. Forks of a cache share it.

    A layer's pool is a tensor `[num_pages, H_kv, page_size, head_dim]`. Its memory is head-major
    (`[H_kv, num_pages, page_size, head_dim]`), so that the tokens of consecutive pages are consecutive for every head
    and torch reads them as one `[H_kv, tokens, head_dim]` view.
    """

    def __init__(self, page_size: int, num_layers: int) -> None:
        self.page_size = page_size
        self.num_layers = num_layers
        self.allocator = PageAllocator()
        self.storage: dict[int, LayerStorage] = {}
        self.version = 0  # counts changes of `storage`: whoever keeps its addresses must look
        self.device = torch.device("cpu")
        self.state_dtype = torch.float32  # of the states that came first
        self.layer_page_nbytes = 0  # bytes of one page of one layer, K and V, once states have been seen

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for storage in self.storage.values() for tensor in storage.tensors)

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page over all layers, K and V."""
        return self.layer_page_nbytes * self.num_layers

    def layer(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V pages of a layer, each `[num_pages, H_kv, page_size, head_dim]`."""
        k, v, *_ = self.storage[layer_idx]
        return k.transpose(0, 1), v.transpose(0, 1)

    def scales(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Scales of a layer's K and V, each float32 `[num_pages, H_kv, page_size]`; None where it is not quantised."""
        *_, k, v = self.storage[layer_idx]
        return None if k is None or v is None else (k.transpose(0, 1), v.transpose(0, 1))

    def expect(self, key: torch.Tensor, value: torch.Tensor, dtype: torch.dtype | None) -> None:
        """Learns the size of a page from the first states `[B, H_kv, q_len, head_dim]`, before a page is asked for."""
        if self.storage:
            return
        self.device, self.state_dtype = key.device, key.dtype
        self.layer_page_nbytes = self.page_size * sum(
            states.shape[1] * (states.shape[3] * (dtype or states.dtype).itemsize + 4 * (dtype in LARGEST))
            for states in (key, value)
        )

    def add_layer(self, layer_idx: int, key: torch.Tensor, value: torch.Tensor, dtype: torch.dtype | None) -> None:
        """Makes the pages of a layer for states like `key` and `value` (`[B, H_kv, q_len, head_dim]`)."""
        both = (key, value)
        shapes = [(states.shape[1], self.allocator.capacity + 1, self.page_size) for states in both]
        self.version += 1
        k, v = (
            self._allocate((*shape, states.shape[3]), dtype or states.dtype, states.device)
            for shape, states in zip(shapes, both)
        )
        scales: list[torch.Tensor | None] = [None, None]
        if dtype in LARGEST:
            scales = [self._allocate(shape, torch.float32, states.device) for shape, states in zip(shapes, both)]
        self.storage[layer_idx] = LayerStorage(k, v, *scales)

    def fits(self, pages: int) -> bool:
        """Whether `pages` pages, K and V of all layers, are free or can be made in the memory that is."""
        missing = pages - self.allocator.free
        nbytes = (self.allocator.capacity + missing) * self.page_nbytes
        return missing <= 0 or nbytes <= free_bytes(self.device) + self.nbytes

    def require(self, pages: int, exact: bool = False) -> None:
        """Makes sure that `pages` pages are free: grows every layer to just that many (`exact`) or by a factor.

        Raises PoolAllocationError where they do not fit.
        """
        missing = pages - self.allocator.free
        if missing <= 0:
            return
        needed = self.allocator.capacity + missing
        capacity = needed if exact else int(needed * GROWTH) + 1
        # Layers may sit on several devices: only on the CPU, which overcommits, is all of it asked of this one.
        layers_here = self.num_layers if self.device.type == "cpu" else 1
        if capacity * self.layer_page_nbytes * layers_here > free_bytes(self.device) + self.nbytes:
            raise self._out_of_memory(capacity)
        self.version += 1
        for layer_idx, storage in self.storage.items():  # one at a time: old and new of one layer stand side by side
            grown = [None if tensor is None else self._grown(tensor, capacity + 1) for tensor in storage]
            self.storage[layer_idx] = LayerStorage(*grown)  # type: ignore[arg-type]
        self.allocator.grow(capacity)

    def forget_unfinished(self) -> None:
        """Drops pools that ran out of memory before all their layers were there, so that a smaller try can follow."""
        if len(self.storage) < self.num_layers and self.allocator.free == self.allocator.capacity:
            self.storage.clear()
            self.allocator.forget()

    def _grown(self, old: torch.Tensor, pages: int) -> torch.Tensor:
        heads, kept, *page = old.shape
        if kept >= pages:  # an earlier growth got this far before it ran out of memory
            return old
        new = self._allocate((heads, pages, *page), old.dtype, old.device)
        new[:, :kept] = old
        return new

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        try:
            with torch.inference_mode(False):  # what is made in that mode cannot be written outside of it
                tensor = torch.empty(shape, dtype=dtype, device=device)
        except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU allocator raises a plain one
            raise self._out_of_memory(shape[1]) from error
        tensor[:, NULL_PAGE] = 0
        return tensor

    def _out_of_memory(self, pages: int) -> PoolAllocationError:
        return PoolAllocationError(
            f"out of memory: {pages} KV pages of {self.page_size} tokens wanted {pages * self.page_nbytes:,} bytes on "
            f"{self.device}, where {free_bytes(self.device):,} bytes are free. Lower max_new_tokens (or max_length), "
            "the prompt or the batch."
        )

    def copy_pages(self, source: Sequence[int] | np.ndarray, target: Sequence[int] | np.ndarray) -> None:
        """Copies whole pages, in every layer (copy-on-write)."""
        self._copy(source, target, lambda tensor: tensor)

    def copy_tokens(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copies slots, in every layer; slots count the pool's tokens, page by page."""
        self._copy(source, target, lambda tensor: tensor.view(len(tensor), -1, *tensor.shape[3:]))

    def _copy(
        self,
        source: Sequence[int] | np.ndarray,
        target: Sequence[int] | np.ndarray,
        seen_as: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Copies along dimension 1 of all tensors, seen as they are counted there."""
        both = torch.from_numpy(np.array([source, target], dtype=np.int64))
        on_device: dict[torch.device, torch.Tensor] = {}  # one upload for all layers there
        for storage in self.storage.values():
            for tensor in map(seen_as, map(movable, storage.tensors)):
                if tensor.device not in on_device:
                    host = both.pin_memory() if tensor.is_cuda else both
                    on_device[tensor.device] = host.to(tensor.device, non_blocking=True)
                src, dst = on_device[tensor.device]
                tensor.index_copy_(1, dst, tensor.index_select(1, src))


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, what torch's own allocator holds unused included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


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
