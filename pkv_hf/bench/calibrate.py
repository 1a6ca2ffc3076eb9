"""Measures a GPU's constants for the policy's cost model."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from pkv_hf.bench.attention_steps import RUNNERS, AttentionShape, AttentionStep, Timing
from pkv_hf.bench.inputs.traces import CALIBRATION_SEED, FAMILIES, decode_steps, synthetic
from pkv_hf.cache.pool import free_bytes
from pkv_hf.routes.costs import MODES, Constants, RouteConstants, Work, predict
from pkv_hf.routes.registry import ROUTES

GROUPS = (1, 4, 8)
QUERY_HEADS = 32
MAX_ACTIVE = (1, 4, 8, 16)
REQUESTS = 24
STEPS = 2
"""Steps of each trace that are measured."""
SAMPLES = 5

PARALLEL = np.geomspace(0.25, 8, 41)
"""Values of C_min that a fit tries."""


@dataclass(frozen=True)
class Sample:
    """A step that took `seconds` a layer."""

    work: Work
    seconds: float


def steps() -> Iterator[list[int]]:
    """Lengths of the calibration traces' rows, at steps at even distances."""
    for family in FAMILIES:
        requests = synthetic(family, REQUESTS, CALIBRATION_SEED)
        for max_active in MAX_ACTIVE:
            played = list(decode_steps(requests, max_active))
            yield from (played[i] for i in np.linspace(0, len(played) - 1, STEPS + 2).astype(int)[1:-1])


def fit(samples: Sequence[Sample], plan_s: float = 0.0) -> tuple[RouteConstants, list[float]]:
    """The constants of least relative squared error, and the relative errors that they leave.

    C_min is searched; β and λ follow by linear least squares, λ at least 0. Raises ValueError for no samples.
    """
    if not samples:
        raise ValueError("no samples to fit")
    seconds = np.array([sample.seconds for sample in samples])
    launches = np.array([sample.work.launches for sample in samples]) / seconds
    best: tuple[float, RouteConstants] | None = None
    for min_parallel in PARALLEL:
        read = np.array([
            s.work.kv_bytes * max(1.0, min_parallel / s.work.parallel) + s.work.merge_bytes for s in samples
        ]) / seconds  # fmt: skip
        (slope, launch_s), *_ = np.linalg.lstsq(np.stack([read, launches], 1), np.ones(len(samples)), rcond=None)
        if launch_s < 0 or slope <= 0:
            slope, launch_s = read.sum() / (read @ read), 0.0
        error = float(((slope * read + launch_s * launches - 1) ** 2).mean())
        if best is None or error < best[0]:
            best = error, RouteConstants(float(1 / slope), float(min_parallel), float(launch_s), plan_s)
    assert best is not None
    constants = RouteConstants(best[1].bandwidth, best[1].min_parallel, best[1].launch_s)
    errors = [predict(sample.work, constants) / sample.seconds - 1 for sample in samples]
    return best[1], errors


def calibrate(
    device: torch.device, timings: Callable[[AttentionShape, list[int]], dict[str, Timing]]
) -> tuple[Constants, dict]:
    """Constants of a device from `timings`, each available route's on a step, and how well they fit.

    Steps that take more than a quarter of the device's free memory are left out.
    """
    routes: dict[str, dict[int, dict[str, RouteConstants]]] = {mode: {} for mode in MODES}
    quality: dict[str, dict[str, float]] = {}
    cases = [(group, lengths) for group in GROUPS for lengths in steps()]
    samples: dict[tuple[str, int, str], list[Sample]] = {}
    plans: dict[tuple[int, str], list[float]] = {}
    for group, lengths in tqdm(cases, desc="calibrating", file=sys.stderr):
        shape = AttentionShape(QUERY_HEADS // group, group, 128, 16, torch.float16, device)
        if 4 * sum(lengths) * shape.kv_heads * shape.head_dim * 4 > free_bytes(device):
            continue
        for route, timing in timings(shape, lengths).items():
            plans.setdefault((group, route), []).append(timing.plan_s)
            by_mode = {"graph": timing.gpu_s, "eager": timing.eager_s - timing.plan_s}
            for mode, seconds in by_mode.items():
                work = ROUTES[route].work(shape.step(lengths, captured=mode == "graph"))
                if seconds is not None and work is not None:
                    samples.setdefault((mode, group, route), []).append(Sample(work, seconds))
    for (mode, group, route), found in samples.items():
        constants, errors = fit(found, float(np.median(plans[group, route])))
        routes[mode].setdefault(group, {})[route] = constants
        p50, p95 = np.percentile(np.abs(errors), (50, 95))
        quality[f"{mode} G{group} {route}"] = {"samples": len(found), "error_p50": float(p50), "error_p95": float(p95)}
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Constants(routes, f"measured now, {date}"), {"date": date, "seed": CALIBRATION_SEED, "quality": quality}


def measure(shape: AttentionShape, lengths: list[int]) -> dict[str, Timing]:
    """Timings of every route that takes a step, on the device."""
    step = AttentionStep(shape, lengths, np.random.default_rng(CALIBRATION_SEED))
    return {route: step.time(route, SAMPLES) for route in RUNNERS if step.accepts(route)}
