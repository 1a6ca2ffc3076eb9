"""Where a GPU's constants are kept, and the command that stores them."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest
import torch

from pkv_hf import cli
from pkv_hf.bench import calibrate
from pkv_hf.cli.calibrate import show
from pkv_hf.policy import calibration
from pkv_hf.policy.calibration import constants_for, path_for, reset, save
from pkv_hf.routes.costs import MODES, Constants, RouteConstants

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("PKV_HF_CACHE", str(tmp_path / "cache"))
    constants_for.cache_clear()
    yield
    constants_for.cache_clear()


def some_constants(bandwidth: float = 1e12) -> Constants:
    of_route = {"split": RouteConstants(bandwidth, 1.5, 4e-6), "workqueue": RouteConstants(bandwidth, 2.0, 5e-6, 1e-6)}
    return Constants({mode: {1: of_route, 4: of_route} for mode in MODES}, "a test")


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


def test_processes_killed_while_they_save_leave_the_file_before_and_nothing_that_adds_up():
    path = save(CPU, some_constants(), {})

    def dies(content, file, **_):
        file.write("{")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def save_and_die():
        calibration.json.dump = dies
        save(CPU, some_constants(2e12), {})

    for _ in range(2):
        process = multiprocessing.get_context("fork").Process(target=save_and_die)
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        constants_for.cache_clear()
        assert constants_for(CPU).routes == some_constants().routes
        assert len(list(path.parent.iterdir())) == 2
    save(CPU, some_constants(3e12), {})
    assert constants_for(CPU).of("graph", 4)["split"].bandwidth == 3e12
    assert list(path.parent.iterdir()) == [path]


def test_a_save_waits_for_that_of_another_process(monkeypatch):
    """The other is slow, and killed: what it left is taken over as a whole."""
    path, begun = path_for(CPU), multiprocessing.get_context("fork").Event()

    def slowly(content, file, **_):
        file.write("x" * 100_000)
        file.flush()
        begun.set()
        time.sleep(60)

    def save_slowly():
        calibration.json.dump = slowly
        save(CPU, some_constants(2e12), {})

    process = multiprocessing.get_context("fork").Process(target=save_slowly)
    process.start()
    assert begun.wait(60)
    threading.Timer(0.5, process.kill).start()
    started = time.monotonic()
    save(CPU, some_constants(3e12), {})
    assert time.monotonic() - started > 0.3
    assert constants_for(CPU).of("graph", 4)["split"].bandwidth == 3e12
    assert list(path.parent.iterdir()) == [path]


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as the command looks before it measures; returns what it measured."""
    pytest.importorskip("triton")
    measured = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    monkeypatch.setattr("pkv_hf.cli.calibrate.constants_for", lambda device: some_constants())
    monkeypatch.setattr(
        calibrate, "calibrate", lambda device, _: measured.append(device) or (some_constants(), {"seed": 1})
    )
    return measured


def command(monkeypatch, capsys, *arguments):
    """The command's status, and the lines of its stderr."""
    monkeypatch.setattr(sys, "argv", ["pkv-hf", "calibrate", *arguments])
    return cli.main(), capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("arguments", [[], ["--reset"]])
@pytest.mark.parametrize("place", ["below a file", "a folder of that name"])
def test_a_folder_that_cannot_be_written_is_named_before_anything_is_measured(
    arguments, place, gpu, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / ("file/cache" if place == "below a file" else "cache")
    monkeypatch.setenv("PKV_HF_CACHE", str(folder))
    if place == "a folder of that name":
        path_for(torch.device("cuda")).mkdir(parents=True)
    status, lines = command(monkeypatch, capsys, *arguments)
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith(f"pkv-hf calibrate: {folder}")
    assert lines[0].endswith("name another folder in PKV_HF_CACHE")
    assert gpu == []


def test_a_calibration_without_triton_measures_nothing(gpu, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)
    status, lines = command(monkeypatch, capsys)
    assert (status, len(lines)) == (2, 1)
    assert "pip install triton" in lines[0]
    assert gpu == []


def test_a_disk_that_fills_up_meanwhile_is_one_line(gpu, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(calibration.json, "dump", full)
    status, lines = command(monkeypatch, capsys)
    assert (status, len(lines)) == (2, 1)
    assert "No space left on device" in lines[0]
    assert len(gpu) == 1


def test_what_is_measured_is_stored(gpu, monkeypatch, capsys):
    assert command(monkeypatch, capsys) == (0, [])
    assert json.loads(path_for(torch.device("cuda")).read_text())["gpu"] == "NVIDIA X"


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
    text = show(some_constants())
    assert "graph G4 workqueue" in text
    assert "1,000" in text
