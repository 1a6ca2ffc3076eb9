"""The prefix cache in use: real weights, lm-eval, the script that measures it."""

from __future__ import annotations

import json

import pytest
import torch

import pkv_hf
from jsonl import records
from tiny import one, padded, prefix_use


def test_questions_on_a_document_by_real_weights(smollm2, pydoc_ids):
    text = pydoc_ids[0].tolist()
    questions = [text[:100] + text[300 + 9 * n : 305 + 12 * n] for n in range(3)]
    asked = {"max_new_tokens": 4, "do_sample": False}
    prompts = [*map(one, questions), padded(*questions)]
    expected = [smollm2.generate(**prompt, **asked) for prompt in prompts]
    with pkv_hf.patched(smollm2, prefix_cache="64MiB"):
        for prompt, tokens in zip(prompts, expected):
            assert torch.equal(smollm2.generate(**prompt, **asked), tokens)
        use = prefix_use(smollm2)
        assert (use.prompts, use.hits, use.not_cached) == (6, 5, ())
        assert use.tokens_saved > 4 * 96  # shorter rows compute some of it again


def test_the_script_measures_what_a_prefix_cache_saves(run, tmp_path, small_folder):
    pytest.importorskip("lm_eval")
    out = tmp_path / "prefix.jsonl"
    sizes = ("--document", 100, "--questions", 3, "--turns", 3, "--turn", 20, "--new-tokens", 3, "--shots", 2)
    status, lines = run("benchmark_prefix", "--model", small_folder, *sizes, "--out", out)
    assert status == 0
    assert json.loads(lines[-1]) == {"records": 6, "same_answers": 1.0}
    found = records(out)
    assert [(r["case"], r["engine"]) for r in found] == [
        (case, engine) for case in ("document", "chat", "few-shot") for engine in ("patched", "prefix-cache")
    ]
    for before, after in zip(found[::2], found[1::2]):
        assert after["tokens_saved"] > 0
        assert after["held_bytes"] > 0
        assert "tokens_saved" not in before
        assert before["left"] == after["left"] == []
    document, chat, few_shot = found[1::2]
    assert document["tokens_saved"] == 2 * 96
    assert chat["tokens_saved"] == 16 + 32  # 20, 43 and 66 tokens: whole pages of what came before
    assert few_shot["hits"] > 20
    page = run.load("make_pages").TABLES["prefix"]
    assert "| ---" in page() or "No record" in page()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--document", 9000], "--document 9000, with a question and its answer, exceeds the model's 8192 positions"),
        (["--turns", 4000], "--turns 4000, with their answers, exceeds"),
        (["--cases", "chat", "--prefix-cache", "much"], "prefix_cache='much' is no size"),
    ],
)
def test_the_script_refuses_what_does_not_fit(run, tmp_path, small_folder, arguments, says):
    assert run("benchmark_prefix", "--model", small_folder, "--out", tmp_path / "x.jsonl", *arguments)[0] == 2
    assert says in run.stderr
