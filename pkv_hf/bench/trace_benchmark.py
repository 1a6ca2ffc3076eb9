"""A trace played through a batch: its steps timed by every route, by the policy's choice and by an oracle's."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from pkv_hf.bench.attention_steps import RUNNERS, AttentionShape, AttentionStep, Timing
from pkv_hf.bench.inputs.traces import Request, decode_steps
from pkv_hf.errors import WrongResultError
from pkv_hf.policy.choose import CHOOSE_EVERY, Decision, choose
from pkv_hf.routes.registry import ROUTES

MAX_ERROR, MEAN_ERROR = 2e-3, 3e-4
Record = dict[str, Any]


def check(step: AttentionStep, routes: list[str]) -> dict[str, float]:
    """The largest error of each route's first layer against float64.

    Raises WrongResultError for one that differs from float64 or from FlashInfer by more than 2e-3, or 3e-4 in the mean.
    """
    exact = step.reference()
    outputs = {}
    for route in routes:
        runner = step.runner(route, captured=False)
        runner.plan()
        outputs[route] = runner.run(1)
    references = {"float64": exact, **{name: out for name, out in outputs.items() if name.startswith("flashinfer")}}
    for route, output in outputs.items():
        for name, reference in references.items():
            error = (output.double() - reference).abs()
            if not (error.max() < MAX_ERROR and error.mean() < MEAN_ERROR):
                raise WrongResultError(
                    f"{route} is off {name} by {float(error.max()):.2g} (mean {float(error.mean()):.2g}) on rows of "
                    f"{step.lengths.tolist()}"
                )
    return {route: float((output.double() - exact).abs().max()) for route, output in outputs.items()}


def decisions_a_step(played: Sequence[list[int]]) -> float:
    """How often the policy is asked, as a loop does: when rows have come or gone, and every CHOOSE_EVERY steps."""
    asked, since = 0, 0
    for i, lengths in enumerate(played):
        since += 1
        if not i or since == CHOOSE_EVERY or lengths != [length + 1 for length in played[i - 1]]:
            asked, since = asked + 1, 0
    return asked / len(played)


class Played:
    """The measured steps of one case."""

    def __init__(self, shape: AttentionShape, graph: bool, decisions: float) -> None:
        self.shape, self.graph, self.decisions = shape, graph, decisions
        self.lengths: list[list[int]] = []
        self.wall: dict[str, list[float]] = {}
        self.gpu: dict[str, list[float]] = {}
        self.plan: dict[str, list[float]] = {}
        self.last: Decision | None = None

    def add(self, lengths: list[int], timings: dict[str, Timing], samples: int) -> None:
        """Adds a step, with the policy's choice and the oracle's. A decision's time is a median, as all others are."""
        walls = {route: (t.graph_s or 0.0) if self.graph else t.eager_s for route, t in timings.items()}
        gpus = {route: t.gpu_s for route, t in timings.items() if t.gpu_s is not None}
        decided = [self._decide(lengths) for _ in range(samples)]
        self.last = decided[-1][0]
        decision_s = statistics.median(seconds for _, seconds in decided) * self.decisions
        chosen = self.last.route.name
        self.lengths.append(lengths)
        for route, timing in timings.items():
            self._note(route, walls[route], gpus.get(route), timing.plan_s)
        self._note("policy", walls[chosen] + decision_s, gpus.get(chosen), timings[chosen].plan_s + decision_s)
        self._note("oracle", min(walls.values()), min(gpus.values(), default=None), 0.0)

    def _decide(self, lengths: list[int]) -> tuple[Decision, float]:
        """The policy's decision, and the seconds that it took."""
        started = time.perf_counter()
        last = None if self.last is None else self.last.route.name
        decision = choose("auto", self.shape.step(lengths, self.graph), last, before=self.last)
        return decision, time.perf_counter() - started

    def _note(self, engine: str, wall: float, gpu: float | None, plan: float) -> None:
        self.wall.setdefault(engine, []).append(wall)
        self.plan.setdefault(engine, []).append(plan)
        if gpu is not None:
            self.gpu.setdefault(engine, []).append(gpu)

    def counters(self, engine: str) -> dict[str, float | None]:
        """Means over the steps of what the route is made of; None for what only the library knows."""
        if engine not in ("split", "workqueue"):
            return {}
        works = [ROUTES[engine].work(self.shape.step(lengths, self.graph)) for lengths in self.lengths]
        found = [work for work in works if work is not None]
        return {
            "launches": float(np.mean([w.launches for w in found])) * self.shape.layers,
            "programs_per_sm": float(np.mean([w.parallel for w in found])),
            "kv_mb": float(np.mean([w.kv_bytes for w in found])) / 1e6,
            "merge_mb": float(np.mean([w.merge_bytes for w in found])) / 1e6,
        }

    def record(self, engine: str) -> Record:
        walls, gpus = np.array(self.wall[engine]), np.array(self.gpu.get(engine, []))
        rows = sum(len(lengths) for lengths in self.lengths)
        token = self.shape.kv_heads * self.shape.step([1], self.graph).token_bytes
        kv_bytes = token * sum(map(sum, self.lengths))
        record: Record = {
            "engine": engine, "graph": self.graph, "steps": len(walls),
            "wall_ms_p50": float(np.median(walls)) * 1e3, "wall_ms_p95": float(np.percentile(walls, 95)) * 1e3,
            "wall_ms_p99": float(np.percentile(walls, 99)) * 1e3, "tokens_per_s_wall": rows / float(walls.sum()),
            "gpu_us_p50": float(np.median(gpus)) * 1e6 if len(gpus) else None,
            "tokens_per_s_gpu": rows / float(gpus.sum()) / self.shape.layers if len(gpus) else None,
            "gb_s": kv_bytes / float(gpus.sum()) / 1e9 if len(gpus) else None,
            "scheduling_ms": float(np.median(self.plan[engine])) * 1e3, **self.counters(engine),
        }  # fmt: skip
        for name, times in (("wall", self.wall), ("gpu", self.gpu)):
            if engine in times:
                regret = np.array(times[engine]) / np.array(times["oracle"]) - 1
                record |= {
                    f"regret_{name}_mean": float(regret.mean()),
                    f"regret_{name}_p95": float(np.percentile(regret, 95)),
                }
        return record


def measure(
    requests: Sequence[Request],
    max_active: int,
    shape: AttentionShape,
    steps: int,
    samples: int,
    seed: int | None,
    progress: str,
) -> list[Record]:
    """Records of a trace: every route, launched by the host and (on a GPU) replayed, on `steps` of its steps.

    Raises WrongResultError, before anything is timed, where an engine is wrong; UsageError where the policy's choice
    for a step is none of those that are measured.
    """
    played = list(decode_steps(requests, max_active))
    chosen = [played[i] for i in np.linspace(0, len(played) - 1, min(steps, len(played))).astype(int)]
    rng = np.random.default_rng(seed)
    decisions = decisions_a_step(played)
    by_mode = [
        Played(shape, graph, decisions) for graph in ((False, True) if shape.device.type == "cuda" else (False,))
    ]
    errors: dict[str, float] = {}
    for lengths in tqdm(chosen, desc=progress, file=sys.stderr):
        step = AttentionStep(shape, lengths, rng)
        routes = [route for route in RUNNERS if step.accepts(route)]
        if choose("auto", shape.step(lengths, captured=False)).route.name not in routes:
            raise step.refused(RUNNERS)
        errors = errors or check(step, routes)
        timings = {route: step.time(route, samples) for route in routes}
        for of_mode in by_mode:
            of_mode.add(lengths, timings, samples)
    return [
        of_mode.record(engine)
        | {"max_abs_err": errors.get(engine, max(errors.values())), "decisions_a_step": decisions}
        for of_mode in by_mode
        for engine in of_mode.wall
    ]
