"""The command lines in scripts/, on small cases."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jsonl import records
from pkv_hf.bench.results.records import OUT_FOLDER
from places import ROOT
from tiny import tiny

SCRIPTS = ROOT / "scripts"


def test_benchmark_generate_appends_a_record_for_every_case_and_engine(run, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    out = tmp_path / "results" / "generate.jsonl"
    arguments = ("--model", tmp_path / "model", "--lengths", "40", "30,7,12", "--new-tokens", 12, "--out", out)
    for times in (1, 2):
        status, lines = run("benchmark_generate", *arguments)
        assert status == 0
        assert json.loads(lines[-1])["records"] == 4
        assert len(records(out)) == 4 * times  # added to, never replaced
    cases = [(r["batch"], r["lengths"], r["engine"]) for r in records(out)[:4]]
    ragged = (3, [30, 7, 12])
    assert cases == [(1, [40], "dynamic"), (1, [40], "patched"), (*ragged, "dynamic"), (*ragged, "patched")]
    for record in records(out):
        assert record["tokens_match"] is True
        assert record["step_ms_p20"] <= record["step_ms_p50"] <= record["step_ms_p80"]
        assert record["percent_of_floor"] == pytest.approx(100 * record["floor_ms"] / record["step_ms_p50"])
        assert {"gpu", "torch", "triton", "transformers", "commit", "date", "peak_gib", "setup_s"} <= set(record)


def test_beams_and_drafts_are_measured(run, tmp_path):
    """A draft of the same weights is always right, one of other weights never."""
    for seed, name in enumerate(("model", "other")):
        tiny("llama", seed=seed).save_pretrained(tmp_path / name)
    out = tmp_path / "generate.jsonl"
    arguments = ("--model", tmp_path / "model", "--lengths", "40", "--new-tokens", 24, "--out", out)
    assert run("benchmark_generate", *arguments, "--mode", "beams", "--num-beams", 3)[0] == 0
    assisted = (*arguments, "--mode", "assisted", "--draft-tokens", 3)
    for name in ("model", "other"):
        assert run("benchmark_generate", *assisted, "--assistant", tmp_path / name)[0] == 0
    found = records(out)
    assert [(r["mode"], r["num_beams"], r["draft_tokens"]) for r in found[::2]] == [
        ("beams", 3, 0), ("assisted", 1, 3), ("assisted", 1, 3)
    ]  # fmt: skip
    assert all(r["tokens_match"] and r["step_ms_p20"] <= r["step_ms_p50"] for r in found)
    assert all(r["route"] == "sdpa" for r in found[1::2])
    assert [r["tokens_per_step"] for r in found] == [1, 1, pytest.approx(4, abs=0.5), pytest.approx(4, abs=0.5), 1, 1]
    read = [r["floor_ms"] * r["read_gb_s"] for r in found]
    assert read[4] == pytest.approx(4 * read[0], rel=0.2)  # three drafts of a model of the same size


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--new-tokens", 5], "--new-tokens 5: pass more than 5"),
        (["--mode", "beams", "--num-beams", 1], "--num-beams 1: pass 2 or more"),
        (["--mode", "assisted"], "pass --assistant"),
        (["--mode", "assisted", "--assistant", "x", "--new-tokens", 30], "--new-tokens 30: pass more than 30"),
        (["--mode", "assisted", "--assistant", "x", "--lengths", "9,8"], "transformers takes one row"),
    ],
)
def test_benchmark_generate_refuses_bad_input(run, capsys, arguments, says):
    with pytest.raises(SystemExit):
        run("benchmark_generate", *arguments)
    assert says in capsys.readouterr().err


def test_benchmark_generate_counts_4_bit_weights_and_adapters_as_what_they_take(run, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny("llama", intermediate_size=128).save_pretrained(tmp_path / "model")
    pytest.importorskip("peft")
    out, floors = tmp_path / "generate.jsonl", []
    for weights, rank in ((None, None), ("nf4", None), ("nf4-nested", 4)):
        options = [*(["--weights", weights] if weights else []), *(["--lora", rank] if rank else [])]
        arguments = ("--model", tmp_path / "model", "--lengths", "40", "--new-tokens", 8, "--out", out, *options)
        assert run("benchmark_generate", *arguments)[0] == 0
        record = records(out)[-1]
        floors.append(record["floor_ms"] * record["read_gb_s"] * 1e6)
        assert (record["weights"], record["adapter"]) == (weights, "lora-r4" if rank else None)
        assert floors[-1] == pytest.approx(record["weight_bytes"] + 2 * 3 * 2 * 16 * 4 * (40 + 4))
    linears = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    plain, four_bits, nested_adapted = floors
    assert plain - four_bits == pytest.approx(linears * (4 - 0.5 - 4 / 64))
    adapters = 4 * 4 * 3 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    blocks = sum(3 * times * -(-size // 64 // 256) for times, size in ((2, 64 * 64), (2, 64 * 32), (3, 64 * 128)))
    assert nested_adapted - four_bits == pytest.approx(adapters + linears * (1 - 4) / 64 + 4 * blocks)


def test_benchmark_devices_compares_one_device_with_two_processes(run, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny("llama").save_pretrained(tmp_path / "model")
    out = tmp_path / "devices.jsonl"
    arguments = ("--model", tmp_path / "model", "--lengths", 20, 9, "--new-tokens", 8, "--device", "cpu", "--out", out)
    status, lines = run("benchmark_devices", *arguments)
    assert status == 0
    assert json.loads(lines[-1]) == {"model": str(tmp_path / "model"), "records": 4, "tokens_match": True}
    found = [(r["way"], r["devices"], r["engine"], r["route"], r["tokens_match"]) for r in records(out)]
    assert found == [
        ("one device", 1, "dynamic", None, True), ("one device", 1, "patched", "sdpa", True),
        ("tensor parallel", 2, "dynamic", None, True), ("tensor parallel", 2, "patched", "sdpa", True),
    ]  # fmt: skip


def test_benchmark_devices_records_nothing_where_tokens_differ(run, tmp_path, monkeypatch, capsys):
    devices, out = run.load("benchmark_devices"), tmp_path / "devices.jsonl"
    ways = {"one device": {"dynamic": {"tokens": [[1]]}}, "tensor parallel": {"patched": {"tokens": [[2]]}}}
    monkeypatch.setattr(devices, "everywhere", lambda *_: ways)
    monkeypatch.setattr("sys.argv", ["benchmark_devices", "--device", "cpu", "--out", str(out)])
    assert devices.main() == 1
    assert "patched, tensor parallel: other tokens" in capsys.readouterr().err
    assert not out.exists()


def test_check_kernels_passes_and_appends_a_record_for_every_route_and_dtype(run, tmp_path, monkeypatch):
    """Of errors that are given: tests/kernels has those of the kernels."""
    pytest.importorskip("triton")
    from pkv_hf.kernels.checks import attention as check
    from pkv_hf.kernels.checks import fuzz

    def right(case, routes, device):
        judged.append(case.dtype)
        errors = {"split": check.DTYPES.index(case.dtype) + judged.count(case.dtype), "workqueue": 1}
        return {name: check.Result(errors[name] / 2, sdpa_error=1.0, rms=1.0, written=True) for name in routes}

    judged, out = [], tmp_path / "kernels.jsonl"
    monkeypatch.setattr(fuzz, "measure_routes", right)
    status, lines = run("check_kernels", "--cases", 2, "--longest", 60, "--out", out)
    assert status == 0
    summary = json.loads(lines[-1])
    assert (summary["passed"], summary["worst"]) == (True, 2.0)
    names = "route", "dtype", "cases", "error_over_sdpa_p50", "error_over_sdpa_max"
    found = [tuple(record[name] for name in names) for record in records(out)]
    assert found == [
        ("split", "float32", 2, 0.75, 1.0), ("split", "float16", 2, 1.25, 1.5), ("split", "bfloat16", 2, 1.75, 2.0),
        *[("workqueue", dtype, 2, 0.5, 0.5) for dtype in ("float32", "float16", "bfloat16")],
    ]  # fmt: skip


def test_check_kernels_fails_where_a_kernel_is_wrong(run, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from pkv_hf.kernels.checks import attention as check
    from pkv_hf.kernels.checks import fuzz

    right = check.run

    def wrong(case, route, inputs, out):
        right(case, route, inputs, out)
        if route == "split":
            out[0, 0, 0, 0] += 1

    monkeypatch.setattr(check, "run", wrong)
    for module in (check, fuzz):  # how often a small case, or one that seems wrong, is drawn
        monkeypatch.setattr(module, "MAX_DRAWS", 2)
    status, lines = run("check_kernels", "--cases", 1, "--longest", 40, "--out", tmp_path / "kernels.jsonl")
    assert status == 1
    assert json.loads(lines[-1])["passed"] is False
    assert any(line.startswith("FAILED split") for line in lines)
    assert not (tmp_path / "kernels.jsonl").exists()


def test_soak_records_what_ran(run, tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "soak.jsonl"
    for kind, cases in (("kernels", 2), ("layers", 9), ("cache", 3), ("leaks", 8)):
        status, lines = run("soak", kind, "--cases", cases, "--longest", 40, "--seed", 5, "--out", out)
        assert status == 0, lines
        assert json.loads(lines[-1])[kind]["failures"] == 0
    found = records(out)
    assert [(r["kind"], r["cases"], r["failures"], r["seed"]) for r in found] == [
        ("kernels", 2, 0, 5),
        ("layers", 9, 0, 5),
        ("cache", 6, 0, 5),
        ("leaks", 8, 0, 5),
    ]
    assert found[1]["configurations"] == 3
    assert found[1]["error_over_torch_max"] <= found[1]["bound"]
    assert found[2]["operations"] > 10
    for record in found:
        assert {"seconds", "device", "gpu", "torch", "triton", "transformers", "commit", "date"} <= set(record)


def test_soak_leaves_out_what_a_gpu_does_not_have(run, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from pkv_hf.kernels import launch
    from pkv_hf.kernels.checks import attention as check
    from pkv_hf.kernels.checks import fuzz

    judged = []

    def right(case, device):
        judged.append(case)
        return fuzz.Outcome(case, {"split": check.Result(error=1.0, sdpa_error=1.0, rms=1.0, written=True)})

    monkeypatch.setattr(fuzz, "judge", right)
    monkeypatch.setattr(launch, "capability", lambda _: (7, 5))
    status, _ = run("soak", "kernels", "--cases", 600, "--longest", 20, "--out", tmp_path / "soak.jsonl")
    assert status == 0
    (record,) = records(tmp_path / "soak.jsonl")
    assert 100 < record["cases"] == len(judged) < 500
    assert {case.dtype for case in judged} == {torch.float16, torch.float32}
    assert {case.kv_dtype for case in judged} == {None, torch.int8}
    monkeypatch.setattr(launch, "has_dtypes", lambda *_: False)
    status, _ = run("soak", "kernels", "--cases", 1, "--longest", 20, "--out", tmp_path / "soak.jsonl")
    assert status == 2
    assert "ask for more --cases" in run.stderr
    assert len(records(tmp_path / "soak.jsonl")) == 1


def test_soak_fails_where_a_kernel_is_wrong_or_a_page_is_lost(run, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from pkv_hf.cache.pool import PageAllocator
    from pkv_hf.kernels import append
    from pkv_hf.kernels.checks import attention as check
    from pkv_hf.kernels.checks import fuzz

    right, out = check.run, tmp_path / "soak.jsonl"
    for module in (check, fuzz):  # how often a small case, or one that seems wrong, is drawn
        monkeypatch.setattr(module, "MAX_DRAWS", 2)

    def wrong(case, route, inputs, out):
        right(case, route, inputs, out)
        if route == "workqueue":
            out[0, 0, 0, 0] = float("nan")

    monkeypatch.setattr(check, "run", wrong)
    monkeypatch.setattr(PageAllocator, "changed", lambda self: None)
    for name in ("append", "rope_append"):  # writes nothing
        monkeypatch.setattr(append, name, lambda k_pages, v_pages, q, *_, **settings: q)
    for kind, cases in (("kernels", 1), ("layers", 4), ("cache", 10)):
        status, lines = run("soak", kind, "--cases", cases, "--longest", 20, "--out", out)
        assert status == 1
        assert lines[0].startswith(f"FAILED {kind} ")
        assert json.loads(lines[-1])["passed"] is False
        assert records(out)[-1]["failures"] > 0


NO_ERRORS = "0 errors"
NO_HAZARDS = "0 hazards displayed (0 errors, 0 warnings)"


def watched(summary, passed="16 passed in 9.21s\n"):
    """A sanitizer's log of one run, with an empty summary of one that was cut off."""
    return "========= COMPUTE-SANITIZER\n" + passed + (summary and f"========= ERROR SUMMARY: {summary}\n")


@pytest.mark.parametrize(
    ("log", "status", "summary", "clean"),
    [
        (watched(NO_ERRORS), None, NO_ERRORS, True),
        (watched(NO_HAZARDS).replace("ERROR ", "RACECHECK "), None, NO_HAZARDS, True),
        (watched("10 errors"), None, "10 errors", False),
        (watched(NO_ERRORS), 1, NO_ERRORS, False),
        (watched(""), None, "none", False),
        ("", None, "none", False),
        (watched(NO_ERRORS) * 2, None, NO_ERRORS, True),
        (watched(NO_HAZARDS) + watched("1 hazard displayed (1 error)"), None, "1 hazard displayed (1 error)", False),
        (watched(NO_ERRORS) + watched(""), None, NO_ERRORS, False),
        (watched(NO_ERRORS) + watched(NO_ERRORS, "no tests ran\n"), None, NO_ERRORS, False),
    ],
    ids=["clean", "racecheck", "errors", "failed", "cut off", "empty", "runs", "hazard", "cut off later", "no tests"],
)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_sanitizers_are_clean_where_each_run_says_so(run, tmp_path, tool, log, status, summary, clean):
    for name in ("memcheck", "racecheck", "initcheck"):
        (tmp_path / f"{name}.log").write_text(log if name == tool else watched(NO_ERRORS))
        (tmp_path / f"{name}.seconds").write_text("9\n")
    if status:
        (tmp_path / f"{tool}.status").write_text(f"{status}\n")
    ended, lines = run("record_sanitizers", tmp_path, "--out", tmp_path / "sanitizers.jsonl")
    assert ended == (0 if clean else 1)
    assert json.loads(lines[-1])["clean"] is clean
    (record,) = records(tmp_path / "sanitizers.jsonl")
    assert record["clean"] is clean
    found = record[tool]
    assert (found["clean"], found["summary"], found["tests"]) == (clean, summary, 16 * log.count("16 passed"))


def test_sanitizers_select_every_kernel_by_its_name():
    (pattern,) = re.findall("--kernel-name 'regex=(.*)'", (SCRIPTS / "sanitize.sh").read_text())
    sources = [path.read_text() for path in (SCRIPTS.parent / "kernels").rglob("*.py")]
    names = [name for source in sources for name in re.findall(r"Launcher\((\w+)", source)]
    assert len(names) >= 10
    assert all(re.search(pattern, name) for name in names)


@pytest.mark.parametrize("failing", [False, True])
def test_tests_are_recorded_by_how_they_ended(tmp_path, failing):
    """In a process of its own: pytest runs them."""
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_right(): pass\n@pytest.mark.skip\ndef test_left(): pass\n"
        + failing * "@pytest.fixture\ndef bad(): assert 0\ndef test_wrong(): assert 0\ndef test_none(bad): pass\n"
    )
    command = [sys.executable, SCRIPTS / "record_tests.py", "test_some.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == int(failing), done.stderr
    (record,) = records(tmp_path / OUT_FOLDER / "tests.jsonl")
    assert (record["passed"], record["skipped"]) == (1, 1)
    assert record["failed"] == ["test_some.py::test_none", "test_some.py::test_wrong"] * failing
    assert json.loads(done.stdout.splitlines()[-1])["failed"] == record["failed"]


def test_every_engine_runs(run, tmp_path):
    from pkv_hf.bench.benchmark import ENGINES

    tiny("llama", num_hidden_layers=1).save_pretrained(tmp_path / "model")
    engines = [engine for engine in ENGINES if engine != "static-compile"]  # which needs a compiler and minutes
    arguments = ("--model", tmp_path / "model", "--lengths", "20", "--new-tokens", 8, "--engines", "dynamic-cold")
    status, lines = run("benchmark_generate", *arguments, *engines, "--out", tmp_path / "generate.jsonl")
    assert status == 0
    assert set(json.loads(lines[-1])["step_ms_p50"]) == {"dynamic-cold", *engines}


def test_benchmark_traces_measures_every_route_and_the_oracle(run, tmp_path):
    pytest.importorskip("triton")
    trace, out = tmp_path / "requests.csv", tmp_path / "traces.jsonl"
    trace.write_text("prompt_len,decode_len\n40,3\n90,2\n17,4\n")
    small = ("--max-active", 2, "--steps", 3, "--samples", 1, "--kv-heads", 2, "--head-dim", 64, "--dtype", "float16")
    status, lines = run("benchmark_traces", "--trace-file", trace, *small, "--holes", 0.5, "--out", out)
    assert status == 0
    assert json.loads(lines[-1])["records"] == 4
    by_engine = {r["engine"]: r for r in records(out)}
    walls = [by_engine[engine]["tokens_per_s_wall"] for engine in ("split", "workqueue", "policy", "oracle")]
    assert walls[3] >= max(walls[:3])
    assert by_engine["oracle"]["regret_wall_mean"] == 0 <= by_engine["policy"]["regret_wall_mean"]
    assert all(0 < r["max_abs_err"] < 2e-3 for r in by_engine.values())


def test_benchmark_traces_refuses_a_bad_file_and_a_wrong_kernel(run, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from pkv_hf.kernels.attention import split

    trace, out = tmp_path / "requests.csv", tmp_path / "traces.jsonl"
    trace.write_text("prompt_len,decode_len\n40,x\n")
    assert run("benchmark_traces", "--trace-file", trace, "--out", out)[0] == 2
    assert "line 2: decode_len='x'" in run.stderr
    trace.write_text("prompt_len,decode_len\n40,3\n")
    right = split.decode_split
    monkeypatch.setattr(split, "decode_split", lambda *args, **kwargs: right(*args, **kwargs) + 1)
    with pytest.raises(SystemExit, match="split is off float64 by"):
        run("benchmark_traces", "--trace-file", trace, "--kv-heads", 2, "--head-dim", 64, "--out", out)
    assert not out.exists()


def test_benchmark_attention_measures_every_value_that_is_swept(run, tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "attention.jsonl"
    small = ("--query-heads", 4, "--head-dim", 64, "--samples", 1, "--engines", "split", "workqueue", "--out", out)
    status, lines = run("benchmark_attention", "--rows", 1, 3, "--length", 50, "--group", 1, 4, "--splits", 3, *small)
    assert status == 0
    assert json.loads(lines[-1])["records"] == 8
    assert {(r["rows"], r["group"], r["engine"]) for r in records(out)} == {
        (rows, group, engine) for rows in (1, 3) for group in (1, 4) for engine in ("split", "workqueue")
    }
    with pytest.raises(SystemExit):
        run("benchmark_attention", "--query-heads", 4, "--group", 3)


@pytest.mark.parametrize("name", ["record_gpu", "record_shapes", "record_quality", "record_policy"])
def test_what_records_on_a_gpu_asks_for_options_that_there_are(run, name, tmp_path, monkeypatch):
    """Its commands, parsed by the scripts that they name."""
    for command in ("python3", "pkv-hf"):
        stub = tmp_path / command
        stub.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv))\n")
        stub.chmod(0o755)
    done = subprocess.run(
        [SCRIPTS / f"{name}.sh", tmp_path, "text.txt", "requests.csv"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    commands = [json.loads(line)[1:] for line in done.stdout.splitlines()]
    commands = [command for command in commands if command[0].startswith("scripts/")]
    assert len(commands) > 4
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_leave(self):
        parse_args(self)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_leave)
    for script, *arguments in commands:
        with pytest.raises(ParsedError):
            run(Path(script).stem, *arguments)


class ParsedError(Exception):
    pass
