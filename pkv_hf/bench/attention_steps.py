"""Decode attention by itself: one step of a trace, run and timed by every route that takes it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pkv_hf.bench.inputs.traces import block_tables
from pkv_hf.errors import UsageError
from pkv_hf.kernels.flashinfer import Planned, Xqa
from pkv_hf.kernels.launch import Scales
from pkv_hf.kernels.quantize import quantize
from pkv_hf.kernels.reference import paged_attention
from pkv_hf.routes.base import Rejected, StepShape
from pkv_hf.routes.registry import ROUTES

L2_NBYTES = 64 << 20
"""More than any GPU's second-level cache served here; pools of a step are at least four times as large together."""


@dataclass(frozen=True)
class AttentionShape:
    """The model's side of a step: heads and pages."""

    kv_heads: int
    group: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    device: torch.device
    layers: int = 1
    holes: float = 0.0
    """Share of the pool's pages that no row has."""
    kv_dtype: torch.dtype | None = None
    """int8 or float8_e4m3fn for quantised pages."""
    scattered: bool = True
    """Pages in random order, as a long-lived pool has them; else consecutive, as `generate()` makes them."""

    def step(self, lengths: Sequence[int], captured: bool) -> StepShape:
        """What the policy is asked about rows of these lengths, one query each."""
        return StepShape(
            device=self.device,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype or self.dtype,
            q_len=1,
            group=self.group,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            page_size=self.page_size,
            layers=self.layers,
            rows=len(lengths),
            tokens=sum(lengths),
            longest=max(lengths),
            padded=False,
            windowed=False,
            autocast=False,
            captured=captured,
            named=True,
        )


@dataclass(frozen=True)
class Timing:
    """Medians of one route on one step."""

    gpu_s: float | None
    """A layer's time on the device, by replays of a CUDA graph; None on a CPU."""
    eager_s: float
    """The whole step, planned and launched by the host, until the device is done."""
    graph_s: float | None
    """The same with the launches replayed from a graph."""
    plan_s: float
    """Of that, planning on the host."""


Pages = tuple[torch.Tensor, torch.Tensor, "Scales | None"]
"""K and V `[num_pages, H_kv, page_size, head_dim]`, and the scales of quantised ones."""


class AttentionStep:
    """Rows of given lengths on pages, with random queries, K and V.

    `splits` is what `split` cuts a row into, None for its own choice.
    """

    def __init__(
        self, shape: AttentionShape, lengths: Sequence[int], rng: np.random.Generator, splits: int | None = None
    ) -> None:
        self.shape = shape
        self.splits = splits
        self.lengths = np.asarray(lengths)
        device = shape.device
        tables, pages = block_tables(lengths, shape.page_size, shape.holes, rng if shape.scattered else None)
        self.layer_nbytes = int(self.lengths.sum()) * shape.kv_heads * shape.step(lengths, captured=False).token_bytes
        # Layers take turns on pools that do not fit the device's cache together, as a model's layers do.
        self.turns = max(shape.layers, -(-4 * L2_NBYTES // self.layer_nbytes) if device.type == "cuda" else 1)
        pools = min(self.turns, -(-4 * L2_NBYTES // self.layer_nbytes) + 1)
        size = (shape.kv_heads, pages, shape.page_size, shape.head_dim)
        self.pools = [self._pages(size) for _ in range(pools)]
        self.table = torch.from_numpy(tables).to(device)
        self.indices = torch.from_numpy(tables[tables > 0]).to(device)
        self.starts = torch.zeros(len(lengths), dtype=torch.int32, device=device)
        self.ends = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.q = self._random((len(lengths), shape.kv_heads * shape.group, 1, shape.head_dim))
        self.scale = shape.head_dim**-0.5

    def _random(self, size: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(size, dtype=self.shape.dtype, device=self.shape.device)

    def _pages(self, size: tuple[int, ...]) -> Pages:
        """Random K and V, head-major as a cache's pools are, and their scales."""
        k, v = (self._random(size) for _ in range(2))
        if self.shape.kv_dtype is None:
            return k.transpose(0, 1), v.transpose(0, 1), None
        (k, of_k), (v, of_v) = (quantize(states, self.shape.kv_dtype) for states in (k, v))
        return k.transpose(0, 1), v.transpose(0, 1), (of_k.transpose(0, 1), of_v.transpose(0, 1))

    def layers(self, count: int) -> Iterator[Pages]:
        return (self.pools[index % len(self.pools)] for index in range(count))

    def runner(self, route: str, captured: bool) -> Runner:
        """A route's runner. FlashInfer raises what it raises for a shape that it cannot serve."""
        return RUNNERS[route](self, captured)

    def accepts(self, route: str) -> bool:
        """Whether a route takes the step, FlashInfer's planned paths also where a graph is planned anew."""
        return self.refusal(route) is None

    def refusal(self, route: str) -> str | None:
        """Why a route does not take the step, None where it does."""
        answer = ROUTES[route].supports(self.shape.step(self.lengths.tolist(), captured=False))
        return answer.reason if isinstance(answer, Rejected) else None

    def refused(self, routes: Iterable[str]) -> UsageError:
        """What a command ends with where none of these routes takes the step."""
        reasons = "; ".join(f"{route}: {self.refusal(route)}" for route in routes if not self.accepts(route))
        return UsageError(f"no route takes such a step, pass another --device or other sizes ({reasons})")

    def reference(self) -> torch.Tensor:
        """The first layer in float64, `[rows, 1, H_q, head_dim]`."""
        rows = self.table, self.starts, self.ends
        k, v, scales = self.pools[0]
        return paged_attention(self.q.double(), k, v, *rows, scale=self.scale, scales=scales)

    def time(self, route: str, samples: int) -> Timing:
        """Times a route; FlashInfer's kernels must have run before, or their compilation counts."""
        runner, device = self.runner(route, captured=False), self.shape.device
        planning: list[float] = []

        def eager() -> None:
            started = time.perf_counter()
            runner.plan()
            planning.append(time.perf_counter() - started)
            runner.run(self.shape.layers)

        eager()
        eager_s = _wall(eager, device, samples)
        plan_s = statistics.median(planning[1:])
        if device.type != "cuda":
            return Timing(None, eager_s, None, plan_s)
        replayed = self.runner(route, captured=True)
        graph = _capture(replayed, self.shape.layers)

        def replay() -> None:
            replayed.plan()
            graph.replay()

        graph_s = _wall(replay, device, samples)
        if self.turns > self.shape.layers:
            graph = _capture(replayed, self.turns)
        gpu_s = _device_time(graph.replay, samples) / self.turns
        return Timing(gpu_s, eager_s, graph_s, plan_s)


class Runner:
    """A route on an `AttentionStep`: `plan` on the host once a step, then `run` some layers."""

    def __init__(self, step: AttentionStep, captured: bool) -> None:
        self.step = step

    def plan(self) -> None:
        pass

    def run(self, layers: int) -> torch.Tensor:
        """Launches the layers; returns the first one's output `[rows, 1, H_q, head_dim]`."""
        first, *_ = [self.layer(*pages) for pages in self.step.layers(layers)]
        return first

    def layer(self, k: torch.Tensor, v: torch.Tensor, scales: Scales | None) -> torch.Tensor:
        raise NotImplementedError


class _Split(Runner):
    def __init__(self, step: AttentionStep, captured: bool) -> None:
        super().__init__(step, captured)
        from pkv_hf.kernels.attention.split import decode_split

        self.decode, self.longest = decode_split, int(step.lengths.max())

    def layer(self, k: torch.Tensor, v: torch.Tensor, scales: Scales | None) -> torch.Tensor:
        step = self.step
        rows = step.table, step.starts, step.ends
        return self.decode(
            step.q, k, v, *rows, scale=step.scale, longest=self.longest, num_splits=step.splits, scales=scales
        )


class _Workqueue(Runner):
    def __init__(self, step: AttentionStep, captured: bool) -> None:
        super().__init__(step, captured)
        from pkv_hf.kernels.attention.workqueue import decode_workqueue

        self.decode = decode_workqueue

    def layer(self, k: torch.Tensor, v: torch.Tensor, scales: Scales | None) -> torch.Tensor:
        step = self.step
        return self.decode(step.q, k, v, step.table, step.starts, step.ends, scale=step.scale, scales=scales)


class _Planned(Runner):
    tensor_cores = False

    def __init__(self, step: AttentionStep, captured: bool) -> None:
        super().__init__(step, captured)
        fixed = {"rows": len(step.lengths), "max_pages": len(step.indices)} if captured else {}
        self.planned = Planned(step.shape.device, tensor_cores=self.tensor_cores, **fixed)

    def plan(self) -> None:
        step = self.step
        self.planned.plan(step.indices, step.lengths, step.q, step.pools[0][0], step.scale)

    def layer(self, k: torch.Tensor, v: torch.Tensor, scales: Scales | None) -> torch.Tensor:
        return self.planned.run(self.step.q, k, v)


class _PlannedTensorCores(_Planned):
    tensor_cores = True


class _Xqa(Runner):
    def __init__(self, step: AttentionStep, captured: bool) -> None:
        super().__init__(step, captured)
        self.xqa = Xqa(step.shape.device)

    def layer(self, k: torch.Tensor, v: torch.Tensor, scales: Scales | None) -> torch.Tensor:
        step = self.step
        return self.xqa.run(step.q, k, v, step.table, step.ends, step.scale)


RUNNERS: dict[str, type[Runner]] = {
    "split": _Split,
    "workqueue": _Workqueue,
    "flashinfer": _Planned,
    "flashinfer_tc": _PlannedTensorCores,
    "flashinfer_xqa": _Xqa,
}


def _wall(run: Callable[[], None], device: torch.device, samples: int) -> float:
    times = []
    for _ in range(samples):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _capture(runner: Runner, layers: int) -> torch.cuda.CUDAGraph:
    runner.plan()
    runner.run(layers)  # loads and allocates what a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        runner.run(layers)
    return graph


def _device_time(run: Callable[[], None], samples: int) -> float:
    run()
    times = []
    for _ in range(samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)
