"""Tables and plots of results, the committed ones and small ones made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jsonl import records
from places import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def test_plots_are_drawn_for_every_model_and_gpu(run, tmp_path):
    committed = records(RESULTS / "generate.jsonl")
    status, lines = run("plot_results", "--out", tmp_path)
    assert status == 0
    files = json.loads(lines[-1])["plots"]
    assert len(files) == len({(r["model"], r["dtype"], r.get("weight_bits"), r["gpu"]) for r in committed})
    assert all(Path(file).read_bytes().startswith(b"\x89PNG") for file in files)


def test_attention_plots_are_drawn_from_records(run, tmp_path):
    attention = [
        {"rows": rows, "length": length, "query_heads": 32, "group": 4, "head_dim": 128, "page_size": 16, "holes": 0.0,
         "dtype": "float16", "kv_dtype": "same", "splits": 0, "engine": engine, "gpu": "NVIDIA X", "gpu_us": 20.0,
         "percent_of_read": 50.0 + rows + length / 2000 + 5 * (engine == "split")}
        for rows in (1, 8) for length in (8192, 32_768) for engine in ("split", "flashinfer")
    ]  # fmt: skip
    traces = [
        {"trace": "bimodal", "seed": seed, "max_active": 8, "group": 4, "head_dim": 128, "page_size": 16, "holes": 0.0,
         "dtype": "float16", "layers": 1, "graph": graph, "engine": engine, "gpu": "NVIDIA X",
         "tokens_per_s_wall": 1000.0 + seed % 7 * 20 + 600 * (engine == "policy")}
        for seed in (20260623, 20260624) for graph in (False, True) for engine in ("policy", "flashinfer")
    ]  # fmt: skip
    for name, found in (("attention", attention), ("traces", traces)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)))
    status, lines = run("plot_attention", "--results", tmp_path, "--out", tmp_path / "plots")
    assert status == 0
    files = [Path(file) for file in json.loads(lines[-1])["plots"]]
    assert [file.name for file in files] == ["attention-nvidia-x.png", "traces-nvidia-x.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


@pytest.mark.parametrize("script", ["readme_tables", "policy_tables"])
def test_pages_show_the_committed_results(run, script):
    assert run(script, "--check")[0] == 0


PLACE = {"gpu": "NVIDIA X", "torch": "2", "transformers": "5", "commit": "abc"}


def write(path: Path, lines: list[dict]) -> None:
    path.write_text("\n".join(json.dumps({**PLACE, **line}) for line in lines))


def test_tables_of_modes_and_of_greedy_decoding_stay_apart(run, tmp_path):
    times = {"step_ms_p20": 9.0, "step_ms_p80": 99.0, "percent_of_floor": 50.0, "first_token_ms": 1e3, "peak_gib": 2.0}
    case = {"model": "m", "dtype": "bfloat16", "lengths": [64], "kv_bytes": 2**20, "tokens_match": True, **times}
    beams, assisted = {"mode": "beams", "num_beams": 4}, {"mode": "assisted", "assistant": "d"}
    assisted |= {"draft_tokens": 5, "tokens_per_step": 1.5}
    lines = [
        {**case, **mode, "engine": engine, "route": None if engine == "dynamic" else "split", "step_ms_p50": ms}
        for mode, speeds in (({}, (20.0, 10.0)), (beams, (40.0, 10.0)), (assisted, (90.0, 15.0)))
        for engine, ms in zip(("dynamic", "patched"), speeds)
    ]
    tables = run.load("readme_tables")
    tables.RESULTS = tmp_path
    assert tables.modes_table() == tables.NO_GPU_RUN
    write(tmp_path / "generate.jsonl", lines)
    greedy, modes = tables.generate_table(True).splitlines()[2:4], tables.modes_table().splitlines()[2:6]
    assert "| 2.00x |" in greedy[1]
    assert ["m bfloat16, 1 x 64, 4 beams | patched (split)" in modes[1], "| 4.00x | 1.00 |" in modes[1]] == [True, True]
    assert ["5 tokens a round from d | patched" in modes[3], "| 6.00x | 1.50 |" in modes[3]] == [True, True]


def test_the_table_of_quantised_pages_compares_with_the_same_route_unquantised(run, tmp_path):
    tables = run.load("readme_tables")
    tables.RESULTS = tmp_path
    assert tables.quantised_table() == tables.NO_GPU_RUN
    case = {**tables.QUANTISED, "query_heads": 32, "dtype": "bfloat16", "gb_s": 2e3, "percent_of_read": 70.0}
    times = (
        ("split", "same", 200.0),
        ("split", "int8", 100.0),
        ("workqueue", "same", 150.0),
        ("workqueue", "fp8", 100.0),
    )
    lines = [{**case, "engine": engine, "kv_dtype": pages, "gpu_us": us} for engine, pages, us in times]
    elsewhere = ({"length": 8192}, {"gpu": "NVIDIA Y", "kv_dtype": "same"}, {"commit": "later", "kv_dtype": "same"})
    write(tmp_path / "attention.jsonl", [*lines, *({**lines[1], "gpu_us": 1.0, **other} for other in elsewhere)])
    rows = tables.quantised_table().splitlines()[2:]
    assert [row.split(" | ")[-1] for row in rows[:4]] == ["1.00x |", "2.00x |", "1.00x |", "1.50x |"]
    assert rows[4:] == ["", "Measured on: NVIDIA X; torch 2, transformers 5, commit abc."]


def test_the_table_of_fine_tuning_shows_what_serving_gained(run, tmp_path):
    tables = run.load("readme_tables")
    tables.RESULTS = tmp_path
    assert tables.finetune_table() == tables.NO_GPU_RUN
    case = {"model": "m", "dtype": "bfloat16", "rank": 8, "steps": 60, "batch": 8, "block": 512, "prompts": 4}
    case |= {"new_tokens": 64, "perplexity_before": 9.5, "perplexity_after": 7.25}
    times = {"step_ms_p20": 4.0, "step_ms_p50": 5.0, "step_ms_p80": 6.0}
    times |= {f"{name}_unpatched": 10 * ms for name, ms in times.items()}
    case |= {"tokens_identical": False, **times}
    write(tmp_path / "finetune.jsonl", [{**case, "weight_bits": bits} for bits in (None, 4)])
    plain, four_bits, *_ = tables.finetune_table().splitlines()[2:]
    assert "| 9.50 to 7.25 | 4 x 64 | 50.00 (40.00 to 60.00) | 5.00 (4.00 to 6.00) | 10.00x | no |" in plain
    assert "m bfloat16, NF4 weights, rank 8, 60 steps of 8 x 512" in four_bits


def test_perplexity_says_whether_its_target_is_met(run):
    tables = run.load("readme_tables")
    found = [
        tables.target(
            {"dtype": "bfloat16", "kv_dtype": pages, "difference_percent": percent, "difference_error_percent": error}
        )
        for pages, percent, error in ((None, 0.04, 0.01), (None, -0.06, 0.001), (None, 0.06, 0.02), ("int8", 0.6, 0.01))
    ]
    assert found == ["0.05 %: met", "0.05 %: missed", "0.05 %: too few tokens to tell", "0.5 %: missed"]
