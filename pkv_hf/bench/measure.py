"""One `generate()` call, measured: when each token came, how much memory it took, what its KV cache held."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from pkv_hf import compat
from pkv_hf.cache.paged import PagedCache
from pkv_hf.memory.sizes import state_bytes

SAMPLE_SECONDS = 0.01
"""How often the CPU's memory is looked at."""


@dataclass(frozen=True)
class Run:
    """Times in seconds, memory in bytes."""

    sequences: torch.Tensor
    """Prompt and new tokens, int64 `[B, length]`, on the CPU."""
    first_token_s: float
    step_s: tuple[float, ...]
    """The time of every step after the first: of a token a row, or of a round of drafting and verifying."""
    peak_bytes: int
    """On a GPU the most allocated; on the CPU how far the process grew over what it held before, sampled."""
    kv_bytes: int
    tokens_per_step: float = 1.0
    """Tokens a row that a step gave in the mean: more than one where drafted ones were right."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second over all rows while decoding: those of a step in the median step's time."""
        return len(self.sequences) * self.tokens_per_step / statistics.median(self.step_s)


def run_generate(
    model: Any,
    inputs: dict[str, torch.Tensor],
    new_tokens: int,
    on_token: Callable[[], object] = lambda: None,
    **settings: Any,
) -> Run:
    """A greedy `model.generate()` of exactly `new_tokens` tokens a row (at least 2); `on_token` follows each step.

    Of beams (`num_beams`) the best one comes back, and `on_token` is not called.
    """
    clock, ticks = _Clock(on_token), _Ticks(inputs["input_ids"].device)
    beams = settings.get("num_beams", 1) > 1
    # transformers takes no streamer with beams; its loop waits for each of their steps by itself
    settings |= {"logits_processor": [ticks]} if beams else {"streamer": clock}
    with PeakMemory(inputs["input_ids"].device) as peak:
        ticks.tick()
        output = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            **settings,
        )
    start, first, *rest = ticks.seconds() if beams else clock.times
    counts = clock.counts[2:]
    return Run(
        sequences=output.sequences.cpu(),
        first_token_s=first - start,
        step_s=tuple(after - before for before, after in zip([first, *rest], rest)),
        peak_bytes=peak.nbytes,
        kv_bytes=kv_bytes(output[compat.CACHE]),
        tokens_per_step=statistics.mean(counts) / len(inputs["input_ids"]) if counts else 1.0,
    )


def kv_bytes(cache: Any) -> int:
    """Bytes that a cache holds: a `PagedCache`'s pools, any other's keys and values, and linear-attention states."""
    if isinstance(cache, PagedCache):
        return cache.memory().held_bytes
    keys_values = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(map(state_bytes, cache.layers)) + sum(held.nbytes for held in keys_values if held is not None)


class _Clock(BaseStreamer):
    """Notes when the prompt was taken and when each token had arrived on the host."""

    def __init__(self, on_token: Callable[[], object]) -> None:
        self.times: list[float] = []
        self.counts: list[int] = []
        self.on_token = on_token

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.counts.append(value.numel())
        if len(self.times) > 1:
            self.on_token()

    def end(self) -> None:
        pass


class _Ticks(LogitsProcessor):
    """Notes when the logits of each step were there: on a GPU by its own clock, since the host comes by before."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.ticks: list[Any] = []

    def tick(self) -> None:
        if self.on_gpu:
            self.ticks.append(torch.cuda.Event(enable_timing=True))
            self.ticks[-1].record()
        else:
            self.ticks.append(time.perf_counter())

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.tick()
        return scores

    def seconds(self) -> list[float]:
        if not self.on_gpu:
            return self.ticks
        self.ticks[-1].synchronize()
        return [self.ticks[0].elapsed_time(tick) / 1e3 for tick in self.ticks]


class PeakMemory:
    """The most memory that was in use while this context ran, `nbytes`: as `Run.peak_bytes`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.nbytes = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            gc.collect()
            with contextlib.suppress(AttributeError, OSError):  # glibc's: freed memory counts anew
                ctypes.CDLL(None).malloc_trim(0)
            self._done = threading.Event()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def _sample(self) -> None:
        process = psutil.Process()
        before = process.memory_info().rss
        while not self._done.wait(SAMPLE_SECONDS):
            self.nbytes = max(self.nbytes, process.memory_info().rss - before)

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.nbytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self._done.set()
            self._thread.join()
