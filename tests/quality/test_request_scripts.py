"""scripts/passkey.py and benchmark_dataset.py on small local models, datasets and traces, offline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from jsonl import records
from pkv_hf.bench import measure
from pkv_hf.bench.inputs import workload
from small_datasets import TEXTS, write_dataset
from tiny import byte_tokenizer


def test_passkeys_are_hidden_where_they_should_be():
    from pkv_hf.bench.inputs.passkey import key_of, prompt

    tokenizer = byte_tokenizer(bos_token="<s>")
    for length in (400, 777):
        places = []
        for depth in (0.0, 0.5, 1.0):
            ids = prompt(tokenizer, length, depth, key_of(3))
            text = tokenizer.decode(ids)
            assert len(ids) == length
            assert text.startswith("<s>There is a pass key")
            assert text.endswith("The pass key is")
            assert text.count(key_of(3)) == 2
            places.append(text.index("The pass key is") / length)
        assert places == sorted(places)
        assert places[0] < 0.2
        assert places[2] > 0.5
    assert len({key_of(trial) for trial in range(20)}) == 20


def test_passkey_records_every_cell_and_draws_them(run, model, out, tmp_path, monkeypatch):
    arguments = ("--model", model, "--lengths", 300, 400, "--depths", 0, 1, "--trials", 2, "--device", "cpu")
    status, lines = run("passkey", *arguments, "--out", out, "--plots", tmp_path)
    assert status == 0
    assert [(r["length"], r["depth"]) for r in records(out)] == [(300, 0.0), (300, 1.0), (400, 0.0), (400, 1.0)]
    assert all(r["same_tokens"] == 1 and r["found"] == r["found_unpatched"] for r in records(out))
    assert all((r["route"], r["left"]) == ("sdpa", []) for r in records(out))
    assert Path(json.loads(lines[-1])["plot"]).read_bytes().startswith(b"\x89PNG")


def test_passkey_counts_what_is_found_and_what_differs(run, model, out, tmp_path, monkeypatch):
    from pkv_hf.bench.inputs import passkey
    from pkv_hf.replaced import STATE

    generate = measure.run_generate
    asked = {False: 0, True: 0}

    def answer(loaded, inputs, new_tokens):
        done = generate(loaded, inputs, new_tokens)
        on_pages = hasattr(loaded, STATE)
        asked[on_pages] += 1
        text = " 25248." if on_pages or asked[on_pages] == 2 else " 11111."
        done.sequences[0, -len(text) :] = byte_tokenizer()(text, return_tensors="pt").input_ids[0]
        return done

    monkeypatch.setattr(measure, "run_generate", answer)
    monkeypatch.setattr(passkey, "key_of", lambda trial: "25248")
    arguments = ("--model", model, "--lengths", 300, "--depths", 0.5, "--trials", 2, "--device", "cpu")
    status, lines = run("passkey", *arguments, "--out", out, "--plots", tmp_path)
    assert status == 0
    assert asked == {False: 3, True: 3}  # a warm-up before two trials
    assert json.loads(lines[-1])["found"] == 1
    assert records(out)[0]["found_unpatched"] == records(out)[0]["same_tokens"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lengths", 40], "--lengths 40 is too short for a hidden key: pass at least"),
        (["--lengths", 510], "exceeds the model's 512 positions"),
        (["--depths", 50], "--depths 50.0 is not from 0 to 1"),
        (["--trials", 0], "--trials 0: pass at least 1"),
    ],
)
def test_passkey_refuses_bad_input(run, model, out, arguments, says):
    places = ("--model", model, "--device", "cpu", "--out", out, "--lengths", 300)
    assert run("passkey", *places, *arguments)[0] == 2
    assert says in run.stderr.splitlines()[-1]
    assert not out.exists()


@pytest.fixture
def dataset_speed(run, model, out):
    def dataset_speed(*arguments):
        return run("benchmark_dataset", "--model", model, "--device", "cpu", "--out", out, *arguments)

    return dataset_speed


def test_generation_on_a_dataset_is_measured_with_and_without_pages(dataset_speed, out, tmp_path):
    path = write_dataset(tmp_path / "data.csv", TEXTS)
    source = ("--dataset", path, "--split", "train", "--requests", 5, "--max-active", 2, "--new-tokens", 4)
    status, lines = dataset_speed(*source, "--max-length", 90)
    assert status == 0
    before, after = records(out)
    printed = json.loads(lines[-1])
    assert printed["speedup"] == after["tokens_per_s"] / before["tokens_per_s"]
    assert (before["engine"], after["engine"], after["route"], after["left"]) == ("unpatched", "patched", "sdpa", [])
    for record in (before, after):
        assert (record["requests"], record["prompt_tokens"], record["new_tokens"]) == (5, 5 * 86, 20)
        assert record["same_tokens"] == 1
        assert 0 < record["first_token_s_p50"] <= record["latency_s_p50"]
        assert record["latency_s_p50"] <= record["latency_s_p95"] <= record["latency_s_p99"]


def test_generation_on_a_trace_leaves_out_what_is_too_long(dataset_speed, out, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_len,decode_len\n3,30,2\n1,50,7\n2,600,5\n0,20,1\n")
    assert dataset_speed("--trace-file", trace, "--max-active", 2)[0] == 0
    record = records(out)[1]
    assert (record["source"], record["requests"], record["too_long"]) == ("trace.csv", 3, 1)
    assert (record["prompt_tokens"], record["new_tokens"]) == (100, 10)


def test_a_workload_keeps_order_lengths_and_each_requests_own_end():
    from pkv_hf.bench.inputs.traces import Request
    from pkv_hf.bench.measure import Run

    source = torch.arange(10, 20)
    prompts = workload.from_trace([Request(7, 1), Request(50, 2), Request(6, 3)], source, longest=20)
    assert [prompt.ids.tolist() for prompt in prompts] == [[*range(10, 17)], [17, 18, 19, 10, 11, 12]]
    assert [len(batch) for batch in workload.batches([*prompts, *prompts, prompts[0]], 2)] == [2, 2, 1]
    inputs = workload.padded(prompts, 0, "cpu")
    assert inputs["input_ids"][1].tolist() == [0, 17, 18, 19, 10, 11, 12]
    assert inputs["attention_mask"].sum(dim=1).tolist() == [7, 6]
    sequences = torch.cat([inputs["input_ids"], torch.tensor([[1, 2, 3], [4, 5, 6]])], dim=1)
    run = Run(sequences, first_token_s=1.0, step_s=(0.5, 0.25), peak_bytes=0, kv_bytes=0)
    assert workload.latencies(run, prompts) == [1.0, 1.75]
    assert workload.answers(run, prompts) == [[1], [4, 5, 6]]


def test_other_tokens_in_float32_are_an_error_and_not_recorded(dataset_speed, out, monkeypatch):
    from pkv_hf.runtime.step import Step

    attend = Step.attend
    monkeypatch.setattr(Step, "attend", lambda self, *args: attend(self, *args) * (-1 if self.bounds.begin else 1))
    with pytest.raises(SystemExit, match="of the requests got other tokens"):
        dataset_speed("--requests", 2, "--new-tokens", 12, "--max-length", 100)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--requests", 0], "--requests 0: pass at least 1"),
        (["--max-active", 0], "--max-active 0: pass at least 1"),
        (["--new-tokens", 1], "--new-tokens 1: pass at least 2"),
        (["--new-tokens", 512], "--new-tokens 512 leaves no prompt in 512 tokens"),
        (["--max-length", 1000], "--max-length 1000 exceeds the model's 512 positions"),
        (["--text-file", "{blank}"], "blank.txt holds no text"),
        (["--trace-file", "missing.csv"], "missing.csv cannot be read as a trace"),
        (["--trace-file", "{trace}"], "no request fits 512 tokens"),
    ],
)
def test_generation_refuses_bad_input(run, dataset_speed, out, tmp_path, arguments, says):
    (tmp_path / "trace.csv").write_text("prompt_len,decode_len\n600,5\n")
    (tmp_path / "blank.txt").write_text(" \n")
    files = {"trace": tmp_path / "trace.csv", "blank": tmp_path / "blank.txt"}
    assert dataset_speed(*(str(argument).format(**files) for argument in arguments))[0] == 2
    assert says in run.stderr.splitlines()[-1]
    assert not out.exists()


def test_a_killed_run_over_a_dataset_goes_on_with_the_next_batch(dataset_speed, out, tmp_path, monkeypatch):
    path = write_dataset(tmp_path / "data.csv", TEXTS)
    arguments = ("--dataset", path, "--split", "train", "--requests", 4, "--max-active", 2, "--new-tokens", 4)
    generate, calls, stop = measure.run_generate, [], 6  # two warm-ups, then the last batch on pages

    def counted(model, inputs, *rest):
        calls.append(inputs["input_ids"].shape)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return generate(model, inputs, *rest)

    monkeypatch.setattr(measure, "run_generate", counted)
    with pytest.raises(KeyboardInterrupt):
        dataset_speed(*arguments)
    assert not out.exists()
    calls.clear()
    assert dataset_speed(*arguments)[0] == 0
    assert len(calls) == 2  # a warm-up, and the last batch
    assert {r["same_tokens"] for r in records(out)} == {1}
