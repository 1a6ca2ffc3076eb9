"""Log-probabilities by every way to score, the metric over them, and the windows that a text is cut into."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import pkv_hf
from pkv_hf import PagedCache
from pkv_hf.bench import compare, measure, metric, perplexity
from pkv_hf.bench.inputs import texts
from pkv_hf.bench.metric import PagedPerplexity
from pkv_hf.bench.perplexity import by_chunks, by_forward, by_generate
from pkv_hf.replaced import STATE
from tiny import COMMON, assert_on_pages, byte_tokenizer, randomized, tiny

LENGTH = 90


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(measure, "gc", SimpleNamespace(collect=lambda: None))  # most of the time here


def window(length=LENGTH, seed=0):
    return torch.randint(2, COMMON["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed))


def expected(model, ids):
    """Of the tokens after the first, by transformers' own forward and one log_softmax in float64."""
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0].double()
    return logits.log_softmax(dim=-1)[torch.arange(len(ids) - 1), ids[1:]].numpy()


def capped():
    sizes = {key: COMMON[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = transformers.Gemma2Config(**sizes, **heads, final_logit_softcapping=2.0, pad_token_id=0)
    return randomized(transformers.Gemma2ForCausalLM, config)


@pytest.mark.parametrize("make", [lambda: tiny("llama"), lambda: tiny("qwen2-windows"), capped])
def test_one_forward_scores_in_blocks_what_the_models_own_logits_say(make, monkeypatch):
    model, ids = make(), window()
    right = expected(model, ids)
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    monkeypatch.setattr(perplexity, "BLOCK_ELEMENTS", 16 * COMMON["vocab_size"] + 5)
    np.testing.assert_allclose(by_forward(model, ids)["log_probs"], right, atol=2e-5)
    assert max(rows) == 16
    assert sum(rows) == LENGTH - 1
    np.testing.assert_allclose(by_forward(model, ids, first=60)["log_probs"], right[59:], atol=2e-5)
    assert "forward" not in model.base_model.__dict__
    np.testing.assert_allclose(expected(model, ids), right)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_chunks_over_pages_and_generate_on_pages_say_the_same(name):
    model, ids = tiny(name), window()
    right = expected(model, ids)
    np.testing.assert_allclose(by_chunks(model, ids, 7)["log_probs"], right, atol=5e-5)
    with pkv_hf.patched(model):
        for chunk in (1, 7, 64, 200):
            cache = PagedCache(model.config)
            np.testing.assert_allclose(by_chunks(model, ids, chunk, cache)["log_probs"], right, atol=5e-5)
            assert cache.get_seq_length() == LENGTH - 1
        scores = by_generate(model, ids, 20)
        np.testing.assert_allclose(scores["log_probs"], right[-20:], atol=5e-5)
        assert_on_pages(model)
    assert len(scores["step_s"]) == 19
    assert scores["seconds"] == pytest.approx(scores["first_token_s"] + sum(scores["step_s"]))


def test_generation_settings_of_the_model_do_not_change_its_scores():
    model, ids = tiny("llama"), window()
    settings = transformers.GenerationConfig(eos_token_id=int(ids[-5]), repetition_penalty=1.7, do_sample=True)
    model.generation_config = settings
    scores = by_generate(model, ids, 12)["log_probs"]
    np.testing.assert_allclose(scores, expected(model, ids)[-12:], atol=5e-5)
    assert model.generation_config is settings


@pytest.fixture(scope="module")
def loaded():
    return tiny("llama", vocab_size=260), byte_tokenizer()


TEXTS = ["The first text, of two.", "And then a second one, which is a little longer than the first one was."]


@pytest.mark.parametrize("mode", ["chunk", "decode"])
def test_the_metric_compares_pages_with_transformers(loaded, mode):
    model, tokenizer = loaded
    found = PagedPerplexity().compute(
        model=model, tokenizer=tokenizer, texts=TEXTS, context=40, mode=mode, chunk=8, decode_tokens=10
    )
    ids = torch.tensor(tokenizer("\n\n".join(TEXTS)).input_ids)
    scored = slice(None) if mode == "chunk" else slice(-10, None)
    right = np.array([expected(model, ids[begin : begin + 40])[scored] for begin in (0, 40)])
    assert (found["windows"], found["tokens"]) == (2, right.size)
    for engine in ("", "_unpatched", "_forward"):
        assert found[f"perplexity{engine}"] == pytest.approx(np.exp(-right.mean()), rel=1e-5)
        assert found[f"tokens_per_s{engine}"] > 0
        assert found[f"peak_bytes{engine}"] >= 0
    assert abs(found["difference_percent"]) < 1e-3
    assert found["largest_log_prob_difference"] < 5e-5
    assert (found["route"], found["left"]) == ("sdpa", [])
    assert found["positions"][-1] == 40
    spans = np.array_split(np.arange(right.shape[1]), len(found["positions"]))
    assert found["positions"] == [40 - right.shape[1] + span[-1] + 1 for span in spans]
    for key in ("perplexity_by_position", "perplexity_by_position_forward"):
        np.testing.assert_allclose(found[key], [np.exp(-right[:, span].mean()) for span in spans], rtol=1e-4)
    with pytest.raises(ValueError, match="not patched"):
        pkv_hf.report(model)


@pytest.mark.parametrize("mode", ["chunk", "decode"])
def test_the_metric_sees_a_page_that_is_read_wrongly(loaded, mode, monkeypatch):
    from pkv_hf.runtime.step import Step

    attend = Step.attend

    def wrong(self, *args):
        output = attend(self, *args)
        return output if self.bounds.begin < 30 else output * 1.01

    monkeypatch.setattr(Step, "attend", wrong)
    model, tokenizer = loaded
    found = PagedPerplexity().compute(
        model=model, tokenizer=tokenizer, texts=TEXTS, context=40, mode=mode, chunk=8, decode_tokens=5
    )
    assert found["largest_log_prob_difference"] > 1e-3
    assert abs(found["difference_percent"]) > 1e-3
    assert found["difference_error_percent"] > 1e-3 > found["difference_error_percent_unpatched"] > 0
    assert found["largest_log_prob_difference_unpatched"] < 5e-5


def test_the_metric_takes_token_ids_and_leaves_a_patched_model_with_its_settings(loaded):
    model, tokenizer = loaded
    settings = {"model": model, "tokenizer": tokenizer, "context": 40, "chunk": 16, "max_windows": 1}
    of_texts = PagedPerplexity().compute(texts=TEXTS, **settings)
    ids = texts.token_ids(tokenizer, TEXTS)
    with pkv_hf.patched(model, route="sdpa", page_size=64):
        of_ids = PagedPerplexity().compute(texts=[ids[:30].tolist(), ids[30:].tolist()], **settings)
        assert (pkv_hf.report(model).page_size, pkv_hf.report(model).asked) == (64, "sdpa")
    assert of_ids["perplexity_forward"] == of_texts["perplexity_forward"]
    assert of_ids["perplexity"] == pytest.approx(of_texts["perplexity"], rel=1e-6)
    assert of_ids["windows"] == 1


@pytest.mark.parametrize("mode", ["chunk", "decode"])
def test_the_metric_shows_what_quantised_pages_cost(loaded, mode):
    model, tokenizer = loaded
    with pkv_hf.patched(model, kv_dtype="int8"):
        found = PagedPerplexity().compute(
            model=model, tokenizer=tokenizer, texts=TEXTS, context=40, mode=mode, chunk=8, decode_tokens=10
        )
    assert 1e-3 < found["largest_log_prob_difference"] < 1
    assert found["largest_log_prob_difference_unpatched"] < 5e-5


def test_a_call_that_pages_cannot_serve_is_said(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(metric, "_paged_cache", lambda model, length: transformers.DynamicCache(config=model.config))
    found = PagedPerplexity().compute(model=model, tokenizer=tokenizer, texts=TEXTS, context=40)
    assert found["left"] == ["the cache is a DynamicCache, not a PagedCache"]


def test_windows_begin_as_the_tokenizer_begins_a_text():
    tokenizer = byte_tokenizer(bos_token="<s>")
    cut = metric.windows(tokenizer, ["abcdefgh"], context=4, max_windows=None)
    assert [tokenizer.decode(ids) for ids in cut] == ["<s>abc", "<s>def"]
    assert [tokenizer.decode(ids) for ids in metric.windows(tokenizer, ["abcdefgh"], 4, 1)] == ["<s>abc"]
    assert [len(ids) for ids in metric.windows(byte_tokenizer(), ["abcdefgh"], 4, None)] == [4, 4]


def test_of_many_texts_as_many_are_read_as_are_needed(smollm2_tokenizer):
    read = []

    def endless():
        while len(read) < 10_000:
            read.append(f"Text number {len(read)}, of no end.")
            yield read[-1]

    ids = texts.token_ids(smollm2_tokenizer, endless(), needed=500)
    assert len(read) < 200
    whole = smollm2_tokenizer("\n\n".join([*read, "And more."])).input_ids
    assert ids.tolist() == whole[:500]


def test_smollm2_on_real_text(smollm2, smollm2_tokenizer, pydoc_ids):
    settings = {"model": smollm2, "tokenizer": smollm2_tokenizer, "texts": [pydoc_ids[0, :256].tolist()]}
    for mode in ("chunk", "decode"):
        found = PagedPerplexity().compute(**settings, context=256, mode=mode, decode_tokens=4, chunk=64)
        assert abs(found["difference_percent"]) < 0.01  # 1e-4 relative
        assert found["largest_log_prob_difference"] < 1e-3


def test_engines_take_turns_at_the_windows():
    model, done = tiny("llama"), []

    def engine(name, on_pages):
        def part(index):
            return lambda: done.append((name, index, hasattr(model, STATE))) or {"index": index}

        parts = [(f"{name}-{index}", part(index)) for index in range(3)]
        return compare.Engine(on_pages, parts, lambda: done.append((name, "warm-up")))

    found = compare.run(model, {"a": engine("a", False), "b": engine("b", True)}, None, "windows", progress=False)
    assert [turn[:2] for turn in done] == [
        ("a", "warm-up"), ("a", 0), ("b", "warm-up"), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2),
    ]  # fmt: skip
    assert all(turn[2] == (turn[0] == "b") for turn in done if len(turn) == 3)
    assert [result["index"] for result in found["a"]] == [0, 1, 2]
    assert all(result["left"] == [] for result in found["b"])
    assert not hasattr(model, STATE)
