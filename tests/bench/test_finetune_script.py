"""scripts/finetune_then_serve.py on a tiny model with a real tokenizer."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch

from pkv_hf.bench import measure
from places import ROOT
from tiny import tiny

pytest.importorskip("peft")

SCRIPT = ROOT / "scripts" / "finetune_then_serve.py"


def run(monkeypatch, *arguments: object) -> int:
    """The script's main() with arguments; its exit status."""
    spec = importlib.util.spec_from_file_location("finetune_then_serve", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, arguments)])
    spec.loader.exec_module(script)
    return script.main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, smollm2_tokenizer):
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", vocab_size=len(smollm2_tokenizer), intermediate_size=128).save_pretrained(folder)
    smollm2_tokenizer.save_pretrained(folder)
    return folder


def test_adapters_are_trained_saved_loaded_and_served(folder, tmp_path, monkeypatch, capsys):
    sizes = ("--steps", 12, "--block", 32, "--prompts", 3, "--new-tokens", 6, "--learning-rate", 0.02)
    out = tmp_path / "finetune.jsonl"
    assert run(monkeypatch, "--model", folder, *sizes, "--adapters", tmp_path / "adapters", "--out", out) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    result = json.loads(lines[-1])
    assert out.read_text() == f"{lines[-1]}\n"
    assert {"gpu", "torch", "transformers", "commit", "date"} <= set(result)
    assert result["perplexity_after"] < result["perplexity_before"]
    assert result["tokens_identical"] is True
    assert result["reloaded_tokens_identical"] is True
    assert result["route"] == ("split" if torch.cuda.is_available() else "sdpa")
    assert (tmp_path / "adapters" / "adapter_model.safetensors").is_file()
    samples = dict(line.split(maxsplit=1) for line in lines if line.startswith(("before ", "after ")))
    assert samples["before"] != samples["after"]
    assert "training: 100%" in printed.err
    cells = [line.split()[-2:] for line in lines if line.startswith(("perplexity", "serving", "a token"))]
    assert len(cells) == 3
    assert cells[2] == [f"{result[name]:.2f}" for name in ("step_ms_p50_unpatched", "step_ms_p50")]
    assert all(float(cell) > 0 for pair in cells for cell in pair)


@pytest.mark.parametrize("installed", [True, False])
def test_adapters_over_4_bit_weights(installed, folder, monkeypatch, capsys):
    pytest.importorskip("bitsandbytes")
    sizes = ("--steps", 2, "--block", 32, "--prompts", 2, "--new-tokens", 4, "--learning-rate", 0.02)
    if not installed:
        monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    served, run_generate = [], measure.run_generate

    def noted(model, *arguments):
        base = model.get_base_model()
        served.append((base.model.norm.weight.dtype, base.model.embed_tokens.weight.dtype, base.lm_head.weight.dtype))
        served.append(type(base.model.layers[0].mlp.up_proj.base_layer).__name__)
        assert base.model.layers[0].mlp.up_proj.active_adapters
        assert not base.model.layers[0].mlp.up_proj.merged
        return run_generate(model, *arguments)

    monkeypatch.setattr(measure, "run_generate", noted)
    sizes = (*sizes, "--weights", "nf4", "--dtype", "bfloat16")
    assert run(monkeypatch, "--model", folder, *sizes) == (0 if installed else 2)
    printed = capsys.readouterr()
    if not installed:
        assert "--weights nf4 cannot be loaded: " in printed.err
        assert "bitsandbytes" in printed.err
        return
    result = json.loads(printed.out.splitlines()[-1])
    assert result["weights"] == "nf4"
    assert served == [(torch.bfloat16,) * 3, "Linear4bit"] * 2  # trained in float32, served as they were loaded


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--steps", 0), "--steps is 0: pass at least 1"),
        (("--learning-rate", 2), "--learning-rate is 2.0"),
        (("--text-file", "/nowhere"), "--text-file /nowhere cannot be read"),
        (("--out", "FOLDER"), "--out "),
        (("--model", "/nowhere/at/all"), "--model /nowhere/at/all cannot be loaded"),
        (("--text-file", "SHORT"), "the text has "),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, says, folder, tmp_path, monkeypatch, capsys):
    short = tmp_path / "short.txt"
    short.write_text("Too short to train on.")
    paths = {"SHORT": short, "FOLDER": tmp_path}
    arguments = [paths.get(argument, argument) for argument in arguments]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(monkeypatch, "--model", folder, *arguments) == 2
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("finetune_then_serve: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"finetune_then_serve: {says}")
    assert "Traceback" not in printed.err
    assert not printed.out
