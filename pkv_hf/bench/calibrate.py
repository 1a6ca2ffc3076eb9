"""`pkv-hf calibrate`: measures this GPU's constants for the policy's cost model, and stores them."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pkv_hf.arguments import needs
from pkv_hf.bench.attention_steps import RUNNERS, AttentionShape, AttentionStep, Timing
from pkv_hf.bench.inputs.traces import CALIBRATION_SEED, FAMILIES, decode_steps, synthetic
from pkv_hf.cache.pool import free_bytes
from pkv_hf.errors import UsageError
from pkv_hf.policy.calibration import check_writable, constants_for, path_for, reset, save
from pkv_hf.routes.costs import MODES, Constants, RouteConstants, Work, predict
from pkv_hf.routes.registry import ROUTES
from pkv_hf.tables import table

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measures how fast this GPU runs each route, and stores it for route='auto'. Takes under a minute; FlashInfer, "
        "where it is installed, compiles its kernels first."
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--show", action="store_true", help="print what is stored, or what stands in for it")
    action.add_argument("--reset", action="store_true", help="delete what is stored")
    parser.add_argument("--device", default="cuda", help="the GPU (default: %(default)s)")


def main(arguments: argparse.Namespace) -> None:
    """Raises UsageError where there is no such GPU, or what it measures cannot be stored."""
    try:
        device = torch.device(arguments.device)
    except RuntimeError as error:
        raise UsageError(f"--device {arguments.device!r} is no device of torch: use cuda or cuda:N") from error
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UsageError(f"--device {arguments.device}: no such GPU here; on a CPU there is nothing to calibrate")
    if (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {arguments.device}: there are {torch.cuda.device_count()} GPUs, from cuda:0 on")
    path = path_for(device)
    if arguments.reset:
        with _writing(path):
            deleted = reset(device)
        print(json.dumps({"path": str(path), "deleted": deleted}))
        return
    if not arguments.show:
        needs("triton")
        with _writing(path):
            check_writable(device)  # before the minute that measuring takes
        constants, quality = calibrate(device, measure)
        with _writing(path):
            save(device, constants, quality)
    constants = constants_for(device)
    print(show(constants), end="\n\n")
    print(json.dumps({"path": str(path), "stored": path.exists()}))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}): name another folder in PKV_HF_CACHE") from error


def show(constants: Constants) -> str:
    rows = [
        (
            f"{mode} G{group} {route}",
            f"{c.bandwidth / 1e9:,.0f}",
            f"{c.min_parallel:.2f}",
            f"{c.launch_s * 1e6:.1f}",
            f"{c.plan_s * 1e6:.1f}",
        )
        for mode, groups in constants.routes.items()
        for group, routes in sorted(groups.items())
        for route, c in routes.items()
    ]
    header = ("constants", "GB/s", "programs an SM for it", "launch us", "plan us")
    return f"constants: {constants.source}\n\n{table(header, rows)}"
