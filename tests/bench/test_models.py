"""The record of which models are served: how a case ends, and what ends one that does not end by itself."""

from __future__ import annotations

import json
import os
import re
import time

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import pkv_hf
from jsonl import records
from pkv_hf.bench.model_types import modes, trial
from pkv_hf.bench.model_types.building import build, prompts
from pkv_hf.bench.model_types.cases import all_cases
from pkv_hf.bench.model_types.isolated import run_all
from pkv_hf.bench.model_types.reasons import shared
from pkv_hf.bench.model_types.shrinking import shrink
from pkv_hf.bench.results.published import write
from pkv_hf.replaced import STATE
from pkv_hf.routes.sdpa import Sdpa

ENDS = {
    "llama": ("LlamaForCausalLM", "pages", ""),
    "gemma3_text": ("Gemma3ForCausalLM", "pages", ""),
    "vipllava": ("VipLlavaForConditionalGeneration", "pages", ""),
    "doge": ("DogeForCausalLM", "left", "DogeAttention has a mask that is more than causal"),
    "mamba": ("MambaForCausalLM", "raises", "no layer of MambaForCausalLM was patched: every layer of Mamba"),
    "blip": ("BlipForConditionalGeneration", "own error", "cannot be run unpatched: TypeError:"),
}


def cases(*model_types: str):
    return [case for case in all_cases() if case.model_type in model_types and not case.variant]


def test_each_status_is_recorded_with_its_reason(run, tmp_path):
    out = tmp_path / "models.jsonl"
    status, lines = run("record_models", "--only", *ENDS, "--jobs", 2, "--out", out)
    assert status == 0
    found = {r["model_type"]: r for r in records(out) if not r["variant"]}
    assert {name: (r["class"], r["status"]) for name, r in found.items()} == {n: e[:2] for n, e in ENDS.items()}
    assert all(found[name]["reason"].startswith(reason) for name, (*_, reason) in ENDS.items())
    on_pages = {name: r for name, r in found.items() if r["status"] == "pages"}
    assert {name: (r["fused"], r["layers"], r["not_fused"], r["step_route"]) for name, r in on_pages.items()} == (
        dict.fromkeys(("llama", "gemma3_text", "vipllava"), (4, 4, {}, "sdpa"))
    )
    assert not any(r["eager"] or r["not_captured"] or r["not_run_ahead"] for r in on_pages.values())
    assert (found["doge"]["fused"], found["doge"]["layers"]) == (0, 4)
    assert list(found["doge"]["not_fused"].values()) == [4]
    assert {"gpu", "torch", "transformers", "commit", "date", "route", "of"} <= set.intersection(
        *map(set, found.values())
    )
    variants = [(r["variant"], r["status"]) for r in records(out) if r["variant"]]
    assert variants == [("RoPE of Llama 3.1", "pages")]
    summary = json.loads(lines[-1])
    assert summary["seconds"] > 0
    assert {name: summary[name] for name in ("records", *trial.STATUSES)} == {
        "records": 7, "pages": 4, "left": 1, "raises": 1, "wrong": 0, "own error": 1
    }  # fmt: skip


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v3", "mamba2", "qwen3_next"])
def test_every_vector_of_a_tiny_model_is_drawn(model_type):
    """Norms, biases, sinks, decays: what zeros or ones stand for would not show."""
    model = build(*cases(model_type))
    named = dict([*model.named_parameters(), *model.named_buffers()])
    vectors = {name: tensor for name, tensor in named.items() if tensor.is_floating_point() and "inv_freq" not in name}
    assert [name for name, tensor in vectors.items() if len(tensor.unique()) < min(tensor.numel(), 3)] == []
    assert all(tensor.isfinite().all() for tensor in vectors.values())


def test_modes_are_compared_and_recorded(run, tmp_path):
    out = tmp_path / "models.jsonl"
    assert run("record_models", "--modes", "--only", "vipllava", "--out", out)[0] == 0
    (found,) = records(out)
    own_path = {"static cache": modes.BY_TRANSFORMERS, "forward": modes.BY_TRANSFORMERS}
    assert found["modes"] == dict.fromkeys(modes.MODES, modes.ON_PAGES) | own_path


def test_a_mode_that_differs_is_wrong_and_one_that_transformers_refuses_is_not(monkeypatch):
    (llama,) = cases("llama")

    def differs(model):
        return CausalLMOutput(logits=torch.tensor([[1.0, 2.0], [3.0, hasattr(model, STATE)]]))

    def fails(model):
        raise ValueError("patched" if hasattr(model, STATE) else "plain")

    def refused(model):
        raise ValueError("of both")

    def unsteady(_):
        return CausalLMOutput(logits=torch.tensor([next(drawn)]))

    drawn = iter(range(9))
    tried = {"differs": differs, "fails": fails, "refused": refused, "unsteady": unsteady}
    monkeypatch.setattr(modes, "MODES", {**tried, "forward": modes.forward})
    found = trial.run(llama, "auto", modes=True)
    assert found["modes"] == {
        "differs": "other tokens or logits", "fails": "ValueError: patched when patched", "refused": modes.REFUSED,
        "unsteady": modes.REFUSED, "forward": modes.BY_TRANSFORMERS,
    }  # fmt: skip
    assert found["status"] == "wrong"
    assert found["reason"] == "differs: other tokens or logits; fails: ValueError: patched when patched"


def test_an_unknown_model_is_named(run, tmp_path):
    assert run("record_models", "--only", "llama", "lama", "--out", tmp_path / "out.jsonl")[0] == 2
    assert run.stderr.strip() == "record_models: --only lama: transformers has no such causal or multimodal LM"


def test_a_step_on_pages_that_errs_a_little_is_wrong(monkeypatch):
    (gemma,) = cases("gemma3_text")
    decode = Sdpa.decode
    monkeypatch.setattr(Sdpa, "decode", lambda *args, **kwargs: decode(*args, **kwargs) + 0.01)
    found = trial.run(gemma, "auto")
    assert found["status"] == "wrong"
    assert re.fullmatch(r"other tokens|logits differ by .* of the largest", found["reason"])


def test_what_fails_only_when_patched_is_wrong(monkeypatch):
    (llama,) = cases("llama")

    def fails(*_):
        raise ValueError("two\nlines")

    monkeypatch.setattr(Sdpa, "decode", fails)
    assert trial.run(llama, "auto") == {"status": "wrong", "reason": "cannot be run patched: ValueError: two lines"}


def test_a_model_that_unpatch_leaves_changed_is_wrong(monkeypatch):
    (llama,) = cases("llama")
    unpatch = pkv_hf.unpatch
    monkeypatch.setattr(pkv_hf, "unpatch", lambda model: unpatch(model).lm_head.weight.neg_())
    assert trial.run(llama, "auto")["reason"] == "after unpatch(): other tokens"


def test_what_differs_from_run_to_run_is_nobodys_fault(monkeypatch):
    (llama,) = cases("llama")
    drawn = iter(range(9))
    monkeypatch.setattr(trial, "prompts", lambda *lengths: {"input_ids": torch.tensor([[next(drawn) + 9]] * 2)})
    found = trial.run(llama, "auto")
    assert found["status"] == "own error"
    assert found["reason"].startswith("cannot be run unpatched: ValueError: a second run gives other tokens")


def test_a_process_that_hangs_or_dies_ends_its_case_and_no_other():
    def run(case, route, say):
        if case.model_type == "mamba":
            time.sleep(60)
        say("patched")
        if case.model_type == "gpt_oss":
            os._exit(3)
        return {"status": "pages", "reason": route}

    began = time.monotonic()
    names = ("llama", "gemma3_text", "mamba", "gpt_oss", "blip")
    found = {case.model_type: result for case, result in run_all(cases(*names), "auto", 2, limit_s=2, run=run)}
    assert time.monotonic() - began < 20
    assert found.pop("mamba") == {"status": "own error", "reason": "cannot be built: it takes longer than 2 s"}
    assert found.pop("gpt_oss") == {"status": "wrong", "reason": "cannot be patched: its process ended with 3"}
    assert found == {name: {"status": "pages", "reason": "auto"} for name in ("llama", "gemma3_text", "blip")}


def test_a_trial_says_where_its_process_ended(monkeypatch):
    monkeypatch.setattr(trial, "_generate", lambda _: os._exit(4))
    ((_, found),) = run_all(cases("llama"), "auto", 1)
    assert found == {"status": "own error", "reason": "cannot be run unpatched: its process ended with 4"}


def test_a_model_of_which_some_calls_are_left_is_left(monkeypatch):
    (llama,) = cases("llama")
    generate, calls = trial._generate, []

    def generated(model):
        found = generate(model)
        if STATE in vars(model):
            calls.append(model(torch.tensor([[5]])))  # without a cache of pages
        return found

    monkeypatch.setattr(trial, "_generate", generated)
    assert trial.run(llama, "auto")["status"] == "left"
    assert len(calls) == 1


def test_every_kind_of_layer_of_a_default_configuration_is_in_the_tiny_one():
    config = shrink(CONFIG_MAPPING["gemma3"], {}).text_config
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert config.num_hidden_layers == len(config.layer_types) <= 8
    assert max(prompts(12, 7)["attention_mask"].shape) > config.sliding_window == 8


def record(**fields):
    place = {"gpu": "none (x86_64 CPU)", "torch": "2", "transformers": "5", "commit": "abc", "route": "auto"}
    plain = {"class": "A", "variant": "", "status": "pages", "reason": "", "split_rejected": None}
    steps = {"layers": 2, "fused": 2, "not_fused": {}, "eager": "", "not_captured": "", "not_run_ahead": ""}
    return {**place, **plain, **steps, "of": 2, **fields}


def test_the_page_shows_the_newest_run_of_all_models(run, tmp_path, monkeypatch):
    page = run.load("pages/models")
    readme = run.load("pages/readme")
    monkeypatch.setattr("pages.RESULTS", tmp_path)
    assert (
        page.summary() == readme.models_short() == readme.models_refused() == "No run of all models is committed yet.\n"
    )
    assert page.modes() == "The committed run compared none.\n"
    lines = [
        record(date="1", model_type="old"), record(date="1", model_type="older"),
        record(date="2", model_type="b", split_rejected="Triton kernels need a GPU, it is on cpu",
               modes={"beams": "on pages", "prompt lookup": "refused", "forward": "by transformers"}),
        record(date="2", model_type="a", status="raises", reason="no layer of A was patched: B is latent attention: b"),
        record(date="3", model_type="a", route="split"), record(date="3", model_type="b", route="split"),
        record(date="4", model_type="part"),
    ]  # fmt: skip
    (tmp_path / "models.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert page.every_model().splitlines()[2:] == [
        "| a | A | refused | latent attention | - |",
        "| b | A | on pages | fused | all but prompt lookup |",
    ]
    assert page.modes().splitlines()[2:] == [
        "| mode | the same, on pages | the same, by transformers | transformers refuses it |",
        "| --- | ---: | ---: | ---: |",
        "| beams | 1 | 0 | 0 |", "| prompt lookup | 0 | 0 | 1 |", "| forward | 0 | 1 | 0 |",
    ]  # fmt: skip
    assert readme.models_refused() == "latent attention (a).\n"
    assert page.reasons().splitlines()[2:] == ["| latent attention | refused | 1 | a |"]
    assert page.summary().startswith("1 of 2 models of transformers 5 run on pages.")
    assert "| on pages | 1 | 0 |" in page.summary()
    assert "| all | 2 | 0 |" in page.summary()
    assert readme.models_short().startswith("Of the 2 models in transformers 5, 1 run on pages. Of 1 of them")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "fused"),
        ({"not_fused": {"their Experts is called as it is": 2, "their A is called as it is": 1}},
         "fused but for Experts, A"),
        ({"fused": 1, "not_fused": {"a B is given what its layer computes": 1}},
         "fused 1 of 2 layers (parts of layers that are not understood)"),
        ({"fused": 0, "not_fused": {"its norms stand where no description has them": 2}},
         "its own layers: layers of another form"),
        ({"eager": "its decoder is given per_layer_inputs"},
         "its own layers: its decoder is given, or returns, more than tokens"),
        ({"not_captured": "the model reads the length of its cache on the host"},
         "fused; not captured: it reads the length of its cache on the host"),
        ({"not_run_ahead": "its positions do not go on by one a step"},
         "fused; not run ahead: positions that the model counts"),
        ({"split_rejected": "head_dim 24 is not a multiple of 16 up to 512"},
         "its own layers, attention by torch: heads of a size that our kernels do not take"),
    ],
)  # fmt: skip
def test_the_page_says_how_steps_run(run, fields, says):
    assert run.load("pages/models").why(record(model_type="a", **fields)) == says


def test_tables_name_first_what_many_know(run):
    assert run.load("pages/models").such_as(["aria", "fuyu", "gemma3", "idefics2", "aria"]) == "gemma3, aria, fuyu, ..."


def test_reasons_of_the_committed_run_are_few(run):
    page = run.load("pages/models")
    committed = [r for r in page.newest_run() if r["status"] != "pages"]
    assert len(committed) > 80
    assert len({shared(r["reason"]) for r in committed}) < 25
    assert not [r["reason"] for r in committed if shared(r["reason"]) == r["reason"]]


def test_the_page_is_what_the_records_say(run):
    page = run.load("pages/models")
    assert write(page.TABLES, [page.PAGE], check=True) == 0
