"""`pkv-hf plan` and `pkv-hf env`, as a user runs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

import pkv_hf
from pkv_hf import cli, compat
from tiny import tiny


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pkv-hf", *map(str, arguments)])
        status = cli.main()
        printed = capsys.readouterr()
        run.stderr = printed.err
        return status, printed.out.splitlines()

    return run


def test_a_plan_is_that_of_the_function(run, tmp_path):
    tiny("llama").config.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    status, lines = run(
        "plan", tmp_path, "--prompt-tokens", 900, "--max-new-tokens", 20, "--batch", 3, "--gpu-memory", "4GiB",
        "--dtype", "bfloat16", "--kv-dtype", "int8", "--weight-bits", 4, "--prefill-chunk-size", 128,
    )  # fmt: skip
    expected = pkv_hf.plan(
        config, prompt_tokens=900, max_new_tokens=20, batch=3, gpu_memory="4GiB", dtype=torch.bfloat16,
        kv_dtype="int8", weight_bits=4, prefill_chunk_size=128,
    )  # fmt: skip
    assert status == 0
    assert "\n".join(lines[:-2]) == repr(expected)
    told = json.loads(lines[-1])
    assert (told["model"], told["fits"], told["total"]) == (str(tmp_path), True, expected.total)
    assert {name: told[name] for name in vars(expected)} == vars(expected)


def test_a_plan_reads_the_packaged_model(run):
    status, lines = run("plan", "smollm2", "--gpu-memory", "1GiB", "--prompt-tokens", 8000)
    assert (status, json.loads(lines[-1])["fits"]) == (0, False)


def test_the_environment_is_told(run, monkeypatch):
    monkeypatch.setenv("PKV_HF_CACHE", "/somewhere")
    status, lines = run("env")
    assert status == 0
    told = json.loads(lines[-1])
    assert told["pkv_hf"] == pkv_hf.__version__
    assert told["torch"] == torch.__version__
    assert told["pkv_hf is in"] == str(Path(pkv_hf.__file__).parent)
    assert told["PKV_HF_CACHE"] == "/somewhere"
    assert {line.split("  ")[0] for line in lines[:-2]} == set(told)
    assert all(f"cuda:{index}" in told for index in range(torch.cuda.device_count()))


def test_the_environment_of_a_transformers_that_is_not_served_is_told(run, monkeypatch):
    monkeypatch.setattr(compat, "SUPPORTED", False)
    monkeypatch.setattr(
        compat.transformers, "__version__", "4.40.1"
    )  # importing a model may put another in sys.modules
    assert run("env")[0] == 0
    assert run("plan", "smollm2")[0] == 2
    assert "is older than" in run.stderr
