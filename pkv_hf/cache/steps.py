"""What a cache knows of the forwards that it serves, and how its last static step is taken back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from pkv_hf.cache.linear import Checkpoint, SecondBuffers

if TYPE_CHECKING:
    from pkv_hf.cache.paged import PagedCache


class CacheStep(Protocol):
    """What a cache knows of the forward of a patched model that it serves."""

    captured: bool
    """Whether a CUDA graph keeps what the forward does."""

    def update(self, k: torch.Tensor, v: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends k and v `[rows, H_kv, q_len, D]` to a layer; returns what its attention is to be called with."""


class StaticSteps(dict[tuple, Any]):
    """A cache's decode steps on static buffers, by shape. They hold its addresses: no copy may take them over."""

    def __reduce__(self) -> tuple[type[StaticSteps], tuple[()]]:
        return StaticSteps, ()


class LastStep:
    """The last step of a cache on static buffers, and linear-attention states as they were before it.

    They are copied at the begin of every such step, which may be taken back when the next one's tokens are known.
    """

    def __init__(self) -> None:
        self._second = SecondBuffers()
        self._before: tuple[list[int], Checkpoint] | None = None

    def __reduce__(self) -> tuple[type[LastStep], tuple[()]]:
        return LastStep, ()

    @property
    def nbytes(self) -> int:
        return self._second.nbytes

    def begin(self, cache: PagedCache) -> tuple[list[int], Checkpoint]:
        """The cache's checkpoint before a step, which holds until the next one begins."""
        self._before = None
        return cache.checkpoint(second=self._second)

    def end(self, before: tuple[list[int], Checkpoint]) -> None:
        """Notes that the step is done that began with `before`."""
        before[1].seal()
        self._before = before

    def take_back(self, cache: PagedCache) -> None:
        """Has the cache as it was before. Raises RuntimeError where the step was not the last change of it."""
        before, self._before = self._before, None
        if before is None or cache.get_seq_length() != max(before[0]) + 1 or not before[1].sealed:
            raise RuntimeError(
                "take_back() takes back one decode step on static buffers, and the last change of the cache was none: "
                "fork() it before what may be taken back"
            )
        try:
            cache.go_back(before)
        except BaseException:  # interrupted: what has begun is done to the end
            cache.go_back(before)
            raise
