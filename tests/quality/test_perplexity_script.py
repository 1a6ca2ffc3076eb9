"""scripts/perplexity.py on small local models and datasets, offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jsonl import records
from pkv_hf.bench import metric
from pkv_hf.bench.inputs import texts, workload
from pkv_hf.bench.results import resume
from places import ROOT
from small_datasets import TEXTS, write_dataset
from tiny import byte_tokenizer, tiny

TIMES = ("tokens_per_s", "peak_bytes", "first_token_s", "date")


@pytest.fixture
def perplexity(run, model, out, tmp_path):
    def perplexity(*arguments):
        places = ("--out", out, "--plots", tmp_path / "plots", "--device", "cpu")
        return run("perplexity", "--model", model, *places, "--chunk", 16, *arguments)

    return perplexity


def figures(record: dict) -> dict:
    """A record without what differs from run to run."""
    return {key: value for key, value in record.items() if not key.startswith(TIMES)}


def test_perplexity_of_contexts_is_recorded_drawn_and_printed(perplexity, out):
    status, lines = perplexity("--contexts", 64, 128, "--max-windows", 2)
    assert status == 0
    printed = json.loads(lines[-1])
    assert [(r["context"], r["windows"], r["text"]) for r in records(out)] == [(64, 2, "pydoc"), (128, 2, "pydoc")]
    for shown, record in zip(printed["results"], records(out)):
        assert shown.items() <= record.items()
        assert abs(record["difference_percent"]) < 1e-3
        assert {"perplexity_unpatched", "tokens_per_s_unpatched", "peak_bytes_unpatched", "commit"} <= set(record)
    assert Path(printed["plot"]).read_bytes().startswith(b"\x89PNG")
    assert not out.with_suffix(".partial").exists()


@pytest.mark.parametrize("name", ["data.csv", "data.jsonl", "data.parquet", "data.txt", "folder/data.csv"])
def test_a_dataset_of_local_files_is_read(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    write_dataset(path, TEXTS)
    rows = texts.load_split(str(path.parent if "/" in name else path), "train")
    assert list(texts.column_of(rows, "text", "train")) == TEXTS


def test_empty_rows_are_blank_lines_and_nulls_nothing(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": ""}\n{"text": "a"}\n{"text": null}\n{"text": ""}\n{"text": "b"}\n')
    found = list(texts.column_of(texts.load_split(str(path), "train"), "text", "train"))
    assert found == ["", "a", "", "b"]
    prompts = workload.from_texts(byte_tokenizer(), found, count=5, new_tokens=2, longest=9)
    assert [len(prompt.ids) for prompt in prompts] == [1, 1]


def test_a_slice_of_a_split_is_read(perplexity, out, tmp_path):
    path = write_dataset(tmp_path / "data.csv", TEXTS)
    assert perplexity("--dataset", path, "--split", "train[:2]", "--contexts", 50)[0] == 0
    assert records(out)[0]["windows"] == (len(TEXTS[0]) + 2 + len(TEXTS[1])) // 50


def test_rope_scaling_gives_more_positions(perplexity, out):
    assert perplexity("--contexts", 600, "--max-windows", 1, "--rope-scaling", "yarn:2")[0] == 0
    assert perplexity("--contexts", 600, "--max-windows", 1, "--rope-scaling", "linear:1.5")[0] == 0
    yarn, linear = records(out)
    assert abs(yarn["difference_percent"]) < 1e-3
    assert yarn["rope_scaling"] == "yarn:2"
    assert yarn["perplexity"] != pytest.approx(linear["perplexity"], rel=1e-4)


def test_modes_and_pages_are_measured_in_one_run(perplexity, out, monkeypatch):
    """Of several kinds of pages the windows go through transformers once, in each mode."""
    scored = []
    for name in ("by_forward", "by_chunks", "by_generate"):
        score = getattr(metric, name)
        monkeypatch.setattr(
            metric, name, lambda *args, n=name, f=score, **more: scored.append((n, len(args[1]))) or f(*args, **more)
        )
    arguments = ("--contexts", 70, "--max-windows", 1, "--decode-tokens", 3)
    status, lines = perplexity(*arguments, "--mode", "chunk", "decode", "--kv-dtype", "same", "int8")
    assert status == 0
    found = records(out)
    cells = [(r["mode"], r["kv_dtype"], r["chunk"], r["decode_tokens"]) for r in found]
    assert cells == [("chunk", None, 16, None), ("chunk", "int8", 16, None), ("decode", None, None, 3),
                     ("decode", "int8", None, 3)]  # fmt: skip
    assert [scored.count((name, 70)) for name in ("by_forward", "by_chunks", "by_generate")] == [2, 3, 3]
    for same, int8 in (found[:2], found[2:]):
        assert same["perplexity_unpatched"] == int8["perplexity_unpatched"]
        assert same["largest_log_prob_difference"] < 5e-5
        assert int8["largest_log_prob_difference"] > 1e-3
    assert [r["kv_dtype"] for r in json.loads(lines[-1])["results"]] == [None, "int8"] * 2


def test_a_killed_run_goes_on_and_equals_one_that_was_not(perplexity, out, monkeypatch):
    arguments = ("--contexts", 40, 64, "--max-windows", 2)
    calls = []
    score = metric.by_chunks

    def counted(model, ids, chunk, cache=None):
        calls.append(len(ids))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return score(model, ids, chunk, cache)

    monkeypatch.setattr(metric, "by_chunks", counted)
    stop = None
    perplexity(*arguments)
    in_all = len(calls)
    stop = len(calls) + in_all - 1
    with pytest.raises(KeyboardInterrupt):
        perplexity(*arguments)
    assert len(records(out)) == 2  # nothing of an unfinished run
    finished = sorted(out.with_suffix(".partial").glob("*/*.json"))
    assert len(finished) == 2 * 3 * 2 - 2
    (finished[0].parent / "torn.1234").write_text('{"log_pro')  # what a kill while writing leaves
    calls.clear()
    stop = None
    status, _ = perplexity(*arguments)
    assert status == 0
    assert len(calls) == 2 + 2  # what was missing, of both engines, and a warm-up of each
    whole, resumed = records(out)[:2], records(out)[2:]
    assert [figures(record) for record in whole] == [figures(record) for record in resumed]
    assert not out.with_suffix(".partial").exists()


def test_parts_of_another_run_are_not_taken(model, out, monkeypatch):
    loaded = tiny("llama")
    store = resume.Store(out, {"mode": "chunk"}, loaded)
    assert store.part("a", lambda: {"value": 1}) == store.part("a", dict) == {"value": 1}
    assert resume.Store(out, {"mode": "decode"}, loaded).part("a", lambda: {"value": 2}) == {"value": 2}
    loaded.lm_head.weight.data[0, 0] += 1
    assert resume.Store(out, {"mode": "chunk"}, loaded).part("a", lambda: {"value": 3}) == {"value": 3}
    monkeypatch.setattr(resume, "environment", lambda: {"commit": "another"})
    assert resume.Store(out, {"mode": "chunk"}, tiny("llama")).part("a", lambda: {"value": 4}) == {"value": 4}


def test_two_processes_give_the_figures_of_one(perplexity, model, out, tmp_path):
    arguments = ["--contexts", "48", "--max-windows", "3", "--mode", "decode", "--decode-tokens", "3"]
    assert perplexity(*arguments)[0] == 0
    launch = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ]
    places = ["--model", model, "--out", out, "--plots", tmp_path / "plots", "--device", "cpu", "--chunk", "16"]
    done = subprocess.run(
        [*launch, ROOT / "scripts" / "perplexity.py", *places, *arguments],
        env={**os.environ}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (figures(record) for record in records(out))
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert len(done.stdout.strip().splitlines()[-1:]) == 1
    assert json.loads(done.stdout.splitlines()[-1])["results"][0]["perplexity"] == two["perplexity"]
    for key, value in one.items():
        if "difference" in key:
            assert abs(two[key] - value) < 1e-3
        elif "perplexity" in key:
            assert two[key] == pytest.approx(value, rel=1e-5)
        else:
            assert two[key] == value


BAD = [
    (["--dataset", "{data}", "--split", "train", "--column", "body"], "--column body", "it has number, text"),
    (["--dataset", "{data}", "--split", "train", "--column", "number"], "--column number holds int", "number, text"),
    (["--dataset", "{data}"], "--split test is not in", "it has train"),
    (["--dataset", "{empty}", "--split", "train"], "--split train holds no text", "pass another split"),
    (["--dataset", "no/such-dataset"], "--dataset no/such-dataset cannot be loaded", ""),
    (["--dataset", "{binary}"], "pass a file that ends in .csv", "--text-file"),
    (["--text-file", "missing.txt"], "--text-file missing.txt cannot be read", "No such file"),
    (["--contexts", 1000], "--contexts 1000 exceeds the model's 512 positions", "--rope-scaling yarn:2"),
    (["--contexts", 2], "context 2 is too small", "pass at least 3"),
    (["--text-file", "{short}", "--contexts", 500], "the text has 10 tokens", "pass a shorter one or more text"),
    (["--max-windows", 0], "--max-windows 0", "pass at least 1"),
    (["--rope-scaling", "ntk:2"], "--rope-scaling ntk:2", "pass yarn:2"),
    (["--rope-scaling", "yarn:much"], "--rope-scaling yarn:much", "pass yarn:2"),
    (["--chunk", 0], "chunk 0 is too small", "pass at least 1"),
    (["--mode", "decode", "--decode-tokens", 1], "decode tokens 1 is too small", "pass at least 2"),
    (["--mode", "decode", "--decode-tokens", 64], "decode tokens 64 leave no prompt", "pass fewer"),
    (["--mode", "chunk", "decode", "--decode-tokens", 80, "--contexts", 90, 70], "decode tokens 80 leave no", "fewer"),
    (["--text-file", "missing.txt", "--model", "no/such-model"], "--text-file missing.txt", "No such file"),
    (["--model", "no/such-model"], "--model no/such-model cannot be loaded", "HF_HUB_OFFLINE=1: set it to 0"),
    (["--model", "{bloom}"], "no layer of BloomForCausalLM was patched", "attention interface"),
    (["--device", "nonsense"], "--device nonsense cannot be used", "pass another"),
    (["--out", "{data}/out.jsonl"], "--out", "cannot be written"),
]


@pytest.mark.parametrize(("arguments", "says", "way_out"), BAD, ids=[case[1] for case in BAD])
def test_bad_input_is_one_line_and_status_2(run, model, tmp_path, arguments, says, way_out):
    files = {"data": write_dataset(tmp_path / "data.csv", TEXTS), "empty": tmp_path / "empty.jsonl",
             "binary": tmp_path / "data.bin", "short": tmp_path / "short.txt", "bloom": tmp_path / "bloom"}  # fmt: skip
    files["empty"].write_text('{"text": ""}\n{"text": null}\n')
    files["binary"].write_bytes(b"\x00\xff")
    files["short"].write_text("ten tokens")
    if "{bloom}" in arguments:
        import transformers

        config = transformers.BloomConfig(vocab_size=260, hidden_size=32, n_layer=1, n_head=2)
        transformers.BloomForCausalLM(config).save_pretrained(files["bloom"])
        byte_tokenizer().save_pretrained(files["bloom"])
    arguments = [str(argument).format(**files) for argument in arguments]
    before = [
        "--model",
        model,
        "--contexts",
        64,
        "--out",
        tmp_path / "out.jsonl",
        "--plots",
        tmp_path,
        "--device",
        "cpu",
    ]
    status, _ = run("perplexity", *before, *arguments)
    said = run.stderr
    assert status == 2
    assert says in said.splitlines()[-1]
    assert way_out in said.splitlines()[-1]
    assert "Traceback" not in said
    assert not (tmp_path / "out.jsonl").exists()
