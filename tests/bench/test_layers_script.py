"""scripts/check_layers.py, and the models that it alters by hand."""

from __future__ import annotations

import json

import pytest
import torch

from jsonl import records
from pkv_hf.bench import benchmark
from pkv_hf.bench.alterations import ALTERATIONS, altered
from pkv_hf.bench.inputs.shapes import SHAPES
from pkv_hf.origins import foreign

NAME = "llama-3.2-1b"
TINY = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "vocab_size": 256}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_alterations_show_in_tokens_and_pass_for_a_librarys_code(name):
    model = SHAPES[NAME].build(torch.float32, "cpu", small=True, **TINY)
    inputs = benchmark.prompts(NAME, model, [20])
    before, kept = model(**inputs).logits, model.model.layers[0]
    with altered(model, name):
        assert not torch.allclose(model(**inputs).logits, before, rtol=1e-3, atol=1e-3)
        assert foreign(model.modules()) == ""
        assert type(kept).__name__ == "LlamaDecoderLayer"
    other = SHAPES[NAME].build(torch.float32, "cpu", small=True, **TINY)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(**inputs).logits, before)  # other models are as they were


@pytest.fixture
def check(run, tmp_path, monkeypatch, capsys):
    """Runs the script on two layers of a few elements, by torch's attention: that takes no interpreted kernel.

    Returns its status and its records.
    """
    pytest.importorskip("triton")
    script = run.load("check_layers")
    build = type(SHAPES[NAME]).build
    small = {**TINY, "num_hidden_layers": 2}
    monkeypatch.setattr(type(SHAPES[NAME]), "build", lambda *args, **fields: build(*args, **{**fields, **small}))
    monkeypatch.setattr(script, "ALTERED", NAME)
    monkeypatch.setattr(script, "ROUTE", "sdpa")
    monkeypatch.setattr(script, "LENGTHS", {torch.float32: [20, 9], torch.bfloat16: [20]})

    def of(*arguments) -> tuple[int, list[dict]]:
        out = tmp_path / "layers.jsonl"
        monkeypatch.setattr("sys.argv", ["check_layers", "--new-tokens", "3", "--out", str(out), *arguments])
        status = script.main()
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["records"] == len(records(out))
        return status, records(out)

    of.script = script
    return of


def test_a_model_and_an_alteration_are_recorded(check, monkeypatch):
    monkeypatch.setattr(check.script, "ALTERATIONS", {"activation": ALTERATIONS["activation"]})
    status, (model, alteration) = check("--only", NAME, "--parts", "models", "altered")
    assert status == 0
    assert (model["part"], model["name"], model["right"]) == ("models", NAME, True)
    assert model["float32"]["tokens_equal"]
    assert 0 < model["bfloat16"]["logit_error"] <= 2 * model["bfloat16"]["own_logit_error"]
    assert (model["float32"]["layers"], model["float32"]["fused"]) == (2, 0)
    assert "sdpa" in model["float32"]["not_fused"]
    assert model["float32"]["calls"]["transformers"] == 0
    assert (alteration["name"], alteration["right"]) == ("activation", True)
    assert alteration["logits_moved"] > 0.01


@pytest.mark.parametrize("wrong", ["tokens", "logits", "error"])
def test_what_is_wrong_is_recorded_and_said_by_the_status(check, monkeypatch, wrong):
    if wrong == "tokens":
        counted = iter(range(9))
        monkeypatch.setattr(check.script, "_tokens", lambda *_: torch.tensor(next(counted)))
    if wrong == "logits":
        errors = iter((0.1, 0.1, 0.1, 0.201))
        monkeypatch.setattr(check.script.logits, "error", lambda *_: next(errors))
    if wrong == "error":
        monkeypatch.setattr(check.script, "_logit_error", lambda *_: 1 / 0)
    status, (model,) = check("--only", NAME, "--parts", "models")
    assert (status, model["right"]) == (1, False)
    assert ("error" in model) == (wrong == "error")
