"""Fitting a GPU's constants, and keeping them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys

import numpy as np
import pytest
import torch

from pkv_hf import calibrate, calibration, cli
from pkv_hf.attention_steps import AttentionShape, AttentionStep, Timing
from pkv_hf.calibrate import Sample, fit, steps
from pkv_hf.calibration import constants_for, path_for, reset, save
from pkv_hf.costs import MODES, Constants, RouteConstants, Work, predict
from pkv_hf.policy import ROUTES, choose
from pkv_hf.traces import HELD_OUT_SEEDS, decode_steps, synthetic

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
def own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("PKV_HF_CACHE", str(tmp_path / "cache"))
    constants_for.cache_clear()
    yield
    constants_for.cache_clear()


@pytest.fixture(autouse=True)
def many_multiprocessors(monkeypatch):
    """The interpreter's device with the multiprocessors of a large GPU."""
    for module in ("pkv_hf.routes", "pkv_hf.kernels.launch"):
        monkeypatch.setattr(f"{module}.device_limits", lambda device: (132, 227 * 1024))


def some_constants(bandwidth: float = 1e12) -> Constants:
    of_route = {"split": RouteConstants(bandwidth, 1.5, 4e-6), "workqueue": RouteConstants(bandwidth, 2.0, 5e-6, 1e-6)}
    return Constants({mode: {1: of_route, 4: of_route} for mode in MODES}, "a test")


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


def test_constants_are_kept_for_one_device(tmp_path):
    path = save(CPU, some_constants(), {"seed": 1})
    assert path == path_for(CPU)
    assert path.parent == tmp_path / "cache"
    known = constants_for(CPU)
    assert known.routes == some_constants().routes
    assert str(path) in known.source
    save(CPU, some_constants(2e12), {})
    assert constants_for(CPU).of("graph", 4)["split"].bandwidth == 2e12
    assert reset(CPU)
    assert not reset(CPU)
    assert constants_for(CPU).routes != some_constants().routes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content.update(format=99), "format"),
        (lambda content: content.update(gpu="NVIDIA T4"), "gpu is 'NVIDIA T4'"),
        (lambda content: content.update(torch="1.0"), "torch is '1.0'"),
        (lambda content: content.pop("routes"), "KeyError"),
        (lambda content: content["routes"].pop("eager"), "KeyError"),
        (lambda content: content["routes"].update(graph={}), "no groups"),
        (lambda content: content["routes"]["graph"]["4"]["split"].update(bandwidth=0), "out of range"),
        (lambda content: content["routes"]["graph"]["4"]["split"].update(launch_s=-1.0), "out of range"),
        (lambda content: content["routes"]["graph"]["4"]["split"].update(launch_s="soon"), "ValueError"),
        (lambda content: content["routes"]["graph"]["4"]["split"].update(speed=1.0), "TypeError"),
    ],
)
def test_a_foreign_file_is_ignored_aloud(change, reason, caplog):
    path = save(CPU, some_constants(), {})
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    known = constants_for(CPU)
    assert "device's properties" in known.source
    assert reason in caplog.text
    assert str(path) in caplog.text
    caplog.clear()
    constants_for(CPU)
    assert not caplog.text  # once


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\x00\xff"])
def test_a_corrupt_file_is_ignored_aloud(text, caplog):
    path = save(CPU, some_constants(), {})
    path.write_bytes(text.encode("latin-1"))
    assert "device's properties" in constants_for(CPU).source
    assert "calibration" in caplog.text


def test_a_save_that_dies_leaves_the_file_before(monkeypatch):
    path = save(CPU, some_constants(), {})

    def dies(content, file, **_):
        file.write("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration.json, "dump", dies)
    with pytest.raises(KeyboardInterrupt):
        save(CPU, some_constants(2e12), {})
    assert constants_for(CPU).routes == some_constants().routes
    assert list(path.parent.iterdir()) == [path]


def test_a_process_killed_while_it_saves_leaves_the_file_before():
    path = save(CPU, some_constants(), {})

    def dies(content, file, **_):
        file.write("{")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def save_and_die():
        calibration.json.dump = dies
        save(CPU, some_constants(2e12), {})

    process = multiprocessing.get_context("fork").Process(target=save_and_die)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    constants_for.cache_clear()
    assert constants_for(CPU).routes == some_constants().routes
    save(CPU, some_constants(3e12), {})
    assert constants_for(CPU).of("graph", 4)["split"].bandwidth == 3e12
    assert path == path_for(CPU)


def _save_often(bandwidth: float) -> None:
    for _ in range(50):
        save(CPU, some_constants(bandwidth), {})


def test_two_processes_may_save_at_once():
    save(CPU, some_constants(), {})
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_save_often, args=(bandwidth,)) for bandwidth in (2e12, 3e12)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        constants_for.cache_clear()
        assert "measured on" in constants_for(CPU).source  # never half a file
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(list(path_for(CPU).parent.iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device cpu: no such GPU here"),
        (["--device", "toaster"], "--device 'toaster' is no device of torch"),
        (["--device", "cuda:97", "--show"], "--device cuda:97"),
    ],
)
def test_the_command_names_what_is_wrong(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pkv-hf", "calibrate", *arguments])
    assert cli.main() == 2
    assert message in capsys.readouterr().err


def test_constants_are_shown():
    text = calibrate.show(some_constants())
    assert "graph G4 workqueue" in text
    assert "1,000" in text


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
