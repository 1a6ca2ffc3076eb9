"""Fitting a GPU's constants, and keeping them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pkv_hf.bench import calibrate
from pkv_hf.bench.attention_steps import AttentionShape, AttentionStep, Timing
from pkv_hf.bench.calibrate import Sample, fit, steps
from pkv_hf.bench.inputs.traces import HELD_OUT_SEEDS, decode_steps, synthetic
from pkv_hf.policy.choose import choose
from pkv_hf.routes.costs import MODES, RouteConstants, Work, predict
from pkv_hf.routes.registry import ROUTES

pytest.importorskip("triton")

CPU = torch.device("cpu")
TRUTH = {
    "graph": {
        "split": RouteConstants(2.9e12, 1.5, 4e-6),
        "workqueue": RouteConstants(2.9e12, 1.5, 5e-6),
    },
    "eager": {
        "split": RouteConstants(2.8e12, 1.5, 22e-6),
        "workqueue": RouteConstants(2.8e12, 1.5, 21e-6),
    },
}
"""A GPU as the model has it."""


@pytest.fixture(autouse=True)
def many_multiprocessors(monkeypatch):
    """The interpreter's device with the multiprocessors of a large GPU."""
    for module in ("pkv_hf.routes.base", "pkv_hf.routes.triton", "pkv_hf.kernels.launch"):
        monkeypatch.setattr(f"{module}.device_limits", lambda device: (132, 227 * 1024))


def simulated(noise: float = 0.0):
    """Timings of a GPU that behaves as `TRUTH`, up to some relative noise."""
    rng = np.random.default_rng(1)

    def seconds(shape: AttentionShape, lengths: list[int], route: str, mode: str) -> float:
        work = ROUTES[route].work(shape.step(lengths, captured=mode == "graph"))
        return predict(work, TRUTH[mode][route]) * (1 + noise * rng.standard_normal())

    def timings(shape: AttentionShape, lengths: list[int]) -> dict[str, Timing]:
        return {
            route: Timing(seconds(shape, lengths, route, "graph"), seconds(shape, lengths, route, "eager"), 0.0, 0.0)
            for route in ("split", "workqueue")
        }

    return timings


def test_a_fit_finds_the_constants_again():
    rng = np.random.default_rng(0)
    truth = RouteConstants(2.5e12, float(calibrate.PARALLEL[20]), 6e-6)
    works = [
        Work(int(rng.integers(10**6, 10**9)), float(rng.uniform(0.2, 4)), 2, int(rng.integers(10**6)))
        for _ in range(40)
    ]
    found, errors = fit([Sample(work, predict(work, truth)) for work in works])
    assert found.bandwidth == pytest.approx(truth.bandwidth, rel=1e-6)
    assert found.min_parallel == truth.min_parallel
    assert found.launch_s == pytest.approx(truth.launch_s, rel=1e-6)
    assert max(map(abs, errors)) < 1e-6
    with pytest.raises(ValueError, match="no samples"):
        fit([])


def test_a_fit_never_gives_negative_launches():
    works = [Work(10**9, 4.0, 2), Work(10**6, 4.0, 2)]
    found, _ = fit([Sample(works[0], 1.2e-3), Sample(works[1], 1e-6)])  # small steps faster than their bytes allow
    assert found.launch_s == 0
    assert found.bandwidth > 0


def test_calibration_takes_its_own_traces_alone_and_the_policy_then_regrets_little_on_others():
    known, fitted = calibrate.calibrate(CPU, simulated(noise=0.02))
    assert fitted["seed"] not in HELD_OUT_SEEDS
    assert set(known.routes) == set(MODES)
    assert all(quality["error_p95"] < 0.1 for quality in fitted["quality"].values())
    exact = simulated()
    regrets = []
    for family, rows in (("bimodal", 4), ("zipf", 8), ("uniform", 8), ("bucketed", 1)):
        for lengths in list(decode_steps(synthetic(family, 24, HELD_OUT_SEEDS[0]), rows))[::40]:
            shape = AttentionShape(8, 4, 128, 16, torch.float16, CPU)
            times = {route: timing.gpu_s for route, timing in exact(shape, lengths).items()}
            taken = choose("auto", shape.step(lengths, captured=True), constants=known).route.name
            regrets.append(times[taken] / min(times.values()) - 1)
    assert np.mean(regrets) < 0.03
    assert np.percentile(regrets, 95) < 0.10


def test_steps_that_do_not_fit_are_left_out(monkeypatch):
    monkeypatch.setattr(calibrate, "free_bytes", lambda device: 4 * 4 * 40_000 * 32 * 128)
    asked = []

    def timings(shape, lengths):
        asked.append((shape.group, sum(lengths)))
        return simulated()(shape, lengths)

    calibrate.calibrate(CPU, timings)
    assert max(tokens for group, tokens in asked if group == 1) <= 40_000
    assert max(tokens for group, tokens in asked if group == 8) > 40_000


def test_steps_are_the_calibration_seeds():
    found = list(steps())
    assert len(found) == 5 * 4 * calibrate.STEPS
    assert {len(lengths) for lengths in found} >= {1, 4, 8, 16}
    assert found == list(steps())


@pytest.mark.parametrize("route", ["split", "workqueue"])
def test_a_step_is_timed_and_right(route):
    shape = AttentionShape(2, 2, 64, 16, torch.float32, CPU, layers=2, holes=0.5)
    step = AttentionStep(shape, [40, 7, 100], np.random.default_rng())
    runner = step.runner(route, captured=False)
    runner.plan()
    torch.testing.assert_close(runner.run(2).double(), step.reference(), atol=1e-5, rtol=1e-5)
    timing = step.time(route, samples=1)
    assert timing.eager_s > 0
    assert timing.gpu_s is timing.graph_s is None
