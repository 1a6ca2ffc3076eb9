"""The command, as a user runs it."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import transformers

from pkv_hf import cli
from pkv_hf.bench.inputs import models
from pkv_hf.bench.inputs import smollm2 as smollm2_package
from tiny import tiny


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pkv-hf", "demo", *map(str, arguments)])
        status = cli.main()
        return status, capsys.readouterr()

    return run


def test_the_last_line_is_json(run, monkeypatch, smollm2_tokenizer, tmp_path):
    model = tiny("llama", vocab_size=len(smollm2_tokenizer))
    monkeypatch.setattr(smollm2_package, "load_smollm2", lambda dtype: model)
    status, printed = run("--prompt-tokens", 300, "--new-tokens", 8, "--json", tmp_path / "result.json")
    assert status == 0
    result = json.loads(printed.out.splitlines()[-1])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["tokens_identical"] is True
    expected = {"model": "smollm2", "prompt_tokens": 300, "new_tokens": 8}
    assert {name: result[name] for name in expected} == expected
    if not torch.cuda.is_available():
        assert (result["device"], result["route"]) == ("cpu", "sdpa")
    assert result["speedup"] == pytest.approx(result["tokens_per_s_patched"] / result["tokens_per_s_unpatched"])
    per_token = 3 * 2 * 2 * 16 * 4  # layers, K and V, KV heads, head_dim, bytes
    assert result["kv_bytes_unpatched"] == 307 * per_token
    assert result["kv_bytes_patched"] == (20 + 1) * 16 * per_token
    for words in ("last step: ", "transformers", "patched", "decoding, tokens/s", "KV cache", "peak memory", "route"):
        assert words in printed.out


def test_a_model_that_patch_refuses_is_one_line_and_status_2(run, monkeypatch):
    config = transformers.BloomConfig(vocab_size=128, hidden_size=32, n_layer=1, n_head=2, eos_token_id=None)
    encoded = type("Encoded", (), {"input_ids": torch.ones(1, 20, dtype=torch.long)})
    loaded = transformers.BloomForCausalLM(config).eval(), lambda *_, **__: encoded
    monkeypatch.setattr(models, "load", lambda *_: loaded)
    status, printed = run("--prompt-tokens", 20, "--new-tokens", 3)
    assert status == 2
    assert "no layer of BloomForCausalLM was patched" in printed.err.splitlines()[-1]
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt-tokens", 0], "--prompt-tokens is 0"),
        (["--new-tokens", 2], "--new-tokens is 2"),
        (["--text-file", "missing.txt"], "missing.txt cannot be read"),
        (["--json", "missing/result.json"], "--json missing/result.json cannot be written"),
        (["--json", "."], "--json . cannot be written"),
        (["--model", "no/such-model"], "--model no/such-model cannot be loaded"),
        (["--model", "no/such-model"], "HF_HUB_OFFLINE=1: set it to 0"),
        (["--prompt-tokens", 500], "exceed the model's 512 positions: pass at most --prompt-tokens 448"),
        (["--prompt-tokens", 300, "--text-file", __file__], "--prompt-tokens asks for 300"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, monkeypatch, arguments, says):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "--model" not in arguments:
        encoded = type("Encoded", (), {"input_ids": torch.zeros(1, 200, dtype=torch.long)})
        monkeypatch.setattr(models, "load", lambda *_: (tiny("llama"), lambda *_, **__: encoded))
    status, printed = run(*arguments)
    assert status == 2
    assert says in printed.err.splitlines()[-1]
    assert "Traceback" not in printed.err
