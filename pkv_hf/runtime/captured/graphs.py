"""CUDA graphs of one model that share their memory, so that calls to come capture into what calls gone by left."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable

import torch


class CaptureError(RuntimeError):
    """A forward cannot be captured in a CUDA graph."""

    @property
    def for_memory(self) -> bool:
        """Whether memory ran out, which another call may have."""
        return isinstance(self.__cause__, torch.OutOfMemoryError) or "out of memory" in str(self)


_streams: dict[tuple[int, int, torch.device], torch.cuda.Stream] = {}


def _capture_stream(key: tuple[int, int, torch.device]) -> torch.cuda.Stream:
    """The stream that captures for a thread and its stream, the same for all models.

    cuBLAS keeps a workspace of up to 32 MiB for each stream that it was called on, for good. Made during a capture it
    would keep a block of the graph's memory for good as well, so it is called here once.
    """
    if key not in _streams:
        device = key[-1]
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream), torch.no_grad():
            operand = torch.zeros(16, 16, device=device)
            torch.mm(operand, operand)
            torch.addmm(operand[0], operand, operand)  # cuBLASLt has one of its own
        _streams[key] = stream
    return _streams[key]


_given_up: list[tuple[int, int]] = []
"""Pools whose graphs are gone. torch keeps their memory, and takes it for nothing else, until its cache is emptied."""


def _hand_back() -> None:
    if _given_up:
        with contextlib.suppress(RuntimeError):  # not while another thread captures: the next one does it
            torch.cuda.empty_cache()
            _given_up.clear()


class GraphMemory:
    """A pool of memory and the stream that captures into it, for graphs that are replayed one after the other.

    Graphs in it write over each other's intermediate results, and a result over those of graphs captured before: it has
    to be read before the next replay. torch gives a pool up with its last graph, so one of our own lives as long as it.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        _hand_back()
        self.device = device
        self.stream = stream
        self.pool = torch.cuda.graph_pool_handle()
        weakref.finalize(self, _given_up.append, self.pool).atexit = False
        self.nbytes = 0
        """Memory that captures have reserved."""
        self._keeper, _ = self.capture(lambda: torch.zeros(1, device=device))

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Captures `run`; returns the graph and the tensor that a replay writes. Raises CaptureError."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        held = torch.cuda.memory_reserved(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            try:
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                result = run()
                graph.capture_end()
            except BaseException as error:
                with contextlib.suppress(RuntimeError):  # a capture that failed says so a second time
                    graph.capture_end()
                if isinstance(error, RuntimeError):
                    raise CaptureError(str(error)) from error
                raise
        current.wait_stream(self.stream)
        self.nbytes += max(torch.cuda.memory_reserved(self.device) - held, 0)
        return graph, result


class GraphMemories:
    """A model's graph memories: one for each thread and stream, whose replays come one after the other."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int, torch.device], GraphMemory] = {}

    def here(self, device: torch.device) -> GraphMemory:
        """That of the thread and stream that call. Raises CaptureError where there can be none."""
        key = (threading.get_ident(), torch.cuda.current_stream(device).cuda_stream, device)
        if key not in self._held:
            try:
                stream = _capture_stream(key)
            except RuntimeError as error:  # there is no memory for its workspaces
                raise CaptureError(str(error)) from error
            self._held[key] = GraphMemory(device, stream)
        return self._held[key]

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for memory in self._held.values())
