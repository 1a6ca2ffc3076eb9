"""Speculative decoding on pages: verification in one call, pages of rejected tokens, drafts of other kinds."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import pkv_hf
from pkv_hf import PagedCache
from pkv_hf.compat import CACHE
from pkv_hf.routes.registry import ROUTES
from tiny import assert_on_pages, left_padded, tiny


def generate(model, inputs, **settings):
    torch.manual_seed(1)
    settings = {"max_new_tokens": 20, "do_sample": False, "suppress_tokens": [0], **settings}
    return model.generate(**inputs, return_dict_in_generate=True, **settings)


@pytest.mark.contract
def test_drafted_tokens_are_verified_in_one_paged_call(monkeypatch):
    model, draft = tiny("llama"), tiny("llama")  # the same weights: every drafted token is right
    draft.generation_config.update(num_assistant_tokens=5, num_assistant_tokens_schedule="constant")
    draft.generation_config.assistant_confidence_threshold = 0
    lengths = []
    decode = type(ROUTES["sdpa"]).decode
    monkeypatch.setattr(
        type(ROUTES["sdpa"]),
        "decode",
        lambda self, layer, q, *rest: lengths.append(q.shape[2]) or decode(self, layer, q, *rest),
    )
    expected = generate(model, left_padded(30), max_new_tokens=18)
    with pkv_hf.patched(model):
        output = generate(model, left_padded(30), max_new_tokens=18, assistant_model=draft)
    assert torch.equal(output.sequences, expected.sequences)
    assert lengths == 6 * [6]  # two more verifications of five tokens, a call for each of three layers


@pytest.mark.contract
def test_pages_of_rejected_tokens_are_free_again():
    model, draft = (
        tiny("llama", num_hidden_layers=1),
        tiny("llama", seed=5, num_hidden_layers=1),
    )  # nothing that it drafts is right
    cache = PagedCache(model.config)
    draft.generation_config.update(num_assistant_tokens=40, num_assistant_tokens_schedule="constant")
    draft.generation_config.assistant_confidence_threshold = 0
    pkv_hf.patch(model), pkv_hf.patch(draft)
    crop, freed = cache.crop, []

    def counting(count):
        before = cache.memory().pages_in_use
        crop(count)
        freed.append(before - cache.memory().pages_in_use)
        assert cache.memory().pages_in_use == -(-cache.get_seq_length() // 16)

    cache.crop = counting
    generate(model, left_padded(30), max_new_tokens=50, **{CACHE: cache}, assistant_model=draft)
    assert freed[0] == -(-70 // 16) - 2


@pytest.mark.parametrize("route", ["sdpa", "split"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2-windows", "qwen3"])
def test_an_early_exit_leaves_the_later_layers_out(family, route, monkeypatch):
    """Not with the oldest transformers, whose own caches fail at it in families that name their layers' types."""
    pytest.importorskip("triton")
    model, inputs = tiny(family, num_hidden_layers=2, max_window_layers=1), left_padded(20)
    expected = generate(model, inputs, max_new_tokens=6, assistant_early_exit=1)
    ran, decode = [], type(ROUTES[route]).decode
    monkeypatch.setattr(
        type(ROUTES[route]),
        "decode",
        lambda self, layer, *rest: ran.append(layer.layer_idx) or decode(self, layer, *rest),
    )
    with pkv_hf.patched(model, route=route):
        output = generate(model, inputs, max_new_tokens=6, assistant_early_exit=1)
        assert_on_pages(model)
    assert torch.equal(output.sequences, expected.sequences)
    assert ran.count(0) > ran.count(1) > 0


@pytest.fixture
def letters() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes."""
    vocabulary = {"<pad>": 0, **{letter: i + 1 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>", bos_token="<pad>")


@pytest.mark.contract
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_draft_of_another_tokenizer(smollm2, smollm2_tokenizer, letters, do_sample):
    draft, inputs = tiny("llama", vocab_size=len(letters)), smollm2_tokenizer("One, two, three,", return_tensors="pt")
    settings = {"tokenizer": smollm2_tokenizer, "assistant_tokenizer": letters, "assistant_model": draft}
    settings |= {"do_sample": do_sample, "max_new_tokens": 8}
    generate(smollm2, inputs, **settings)  # the first call draws random numbers for a map between the vocabularies
    expected = generate(smollm2, inputs, **settings)
    with pkv_hf.patched(smollm2), pkv_hf.patched(draft):
        output = generate(smollm2, inputs, **settings)
        assert_on_pages(smollm2)
        assert pkv_hf.report(draft).route == "sdpa"
    assert torch.equal(output.sequences, expected.sequences)
