"""Every mode of generate(), with each family: what a patched model returns is what the model returns without."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import CompileConfig, DynamicCache

import pkv_hf
from pkv_hf import PagedCache
from tiny import left_padded, tiny

FAMILIES = ("llama", "mistral", "qwen2", "qwen2-windows", "qwen3")
ONE, EQUAL, PADDED = (50,), (50, 50), (50, 31, 1)

MODES = {
    "greedy": (PADDED, {}),
    "sampling": (PADDED, {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.3}),
    "beams": (PADDED, {"num_beams": 3}),
    "beams that end": (PADDED, {"num_beams": 3, "eos_token_id": [5, 17, 40], "early_stopping": True}),
    "beams in chunks": (EQUAL, {"num_beams": 3, "prefill_chunk_size": 16}),
    "sampled beams": (PADDED, {"num_beams": 3, "do_sample": True}),
    "several beams returned": (PADDED, {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0}),
    "several samples returned": (PADDED, {"do_sample": True, "num_return_sequences": 3}),
    "repetition penalty": (PADDED, {"repetition_penalty": 1.3}),
    "an end": (PADDED, {"eos_token_id": [5, 17, 40], "min_new_tokens": 4}),
    "chunked prefill": (EQUAL, {"prefill_chunk_size": 16}),
    "no cache": (PADDED, {"use_cache": False}),
    "compile settings": (EQUAL, {"compile_config": CompileConfig()}),
    "no compilation": (EQUAL, {"disable_compile": True}),
    "scores": (EQUAL, {"output_scores": True, "output_logits": True, "output_hidden_states": True}),
    "scores of beams": (EQUAL, {"num_beams": 2, "output_scores": True, "output_hidden_states": True}),
    "prompt lookup": (ONE, {"prompt_lookup_num_tokens": 4}),
    "sampled prompt lookup": (ONE, {"prompt_lookup_num_tokens": 4, "do_sample": True}),
    "assistant": (ONE, {"assistant_model": "patched"}),
    "unpatched assistant": (ONE, {"assistant_model": "unpatched"}),
    "sampling assistant": (ONE, {"assistant_model": "patched", "do_sample": True}),
}
NEWEST = ("sampling assistant",)  # the oldest transformers' own sliding caches fail at it
LEFT = {
    "attention weights": (EQUAL, {"output_attentions": True}, "output_attentions"),
    "attention weights of beams": (EQUAL, {"output_attentions": True, "num_beams": 2}, "output_attentions"),
    "static cache": (PADDED, {"cache_implementation": "static"}, "cache_implementation='static'"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny(request.param)


@pytest.fixture(scope="module")
def draft(model):
    """An assistant that is right often, and wrong often."""
    twin = copy.deepcopy(model)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.004)
    return twin


def generate(model, inputs, **settings):
    torch.manual_seed(1)
    defaults = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True, "suppress_tokens": [0]}
    return model.generate(**inputs, **{**defaults, **settings})


def assert_same(ours, theirs) -> None:
    """All that generate() returned is equal, or close where it is no token."""
    assert type(ours) is type(theirs)
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in set(theirs.keys()) - {"sequences", "past_key_values"}:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-4)
    if theirs.past_key_values is not None:
        assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()


@pytest.mark.parametrize("mode", [pytest.param(m, marks=[] if m in NEWEST else [pytest.mark.contract]) for m in MODES])
def test_served(model, draft, mode):
    lengths, settings = MODES[mode]
    inputs, helper = left_padded(*lengths), settings.get("assistant_model")
    if helper:
        settings = {**settings, "assistant_model": draft}
    expected = generate(model, inputs, **settings)
    assert len(set(expected.sequences[0, 50:].tolist())) > 3  # tokens wander, so that a wrong one shows
    with pkv_hf.patched(model):
        if helper == "patched":
            with pkv_hf.patched(draft):
                output = generate(model, inputs, **settings)
        else:
            output = generate(model, inputs, **settings)
        assert not pkv_hf.report(model).left
    assert_same(output, expected)
    assert isinstance(output.past_key_values, PagedCache) == settings.get("use_cache", True)


@pytest.mark.contract
@pytest.mark.parametrize("mode", LEFT)
def test_left_to_transformers(model, mode):
    lengths, settings, reason = LEFT[mode]
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the others return no weights
    inputs = left_padded(*lengths)
    expected = generate(model, inputs, **settings)
    with pkv_hf.patched(model):
        output = generate(model, inputs, **settings)
        assert reason in " | ".join(pkv_hf.report(model).left)
    model.set_attn_implementation(implementation)
    assert_same(output, expected)


@pytest.mark.contract
def test_a_patched_assistant_of_an_unpatched_model(model, draft):
    inputs = left_padded(*ONE)
    expected = generate(model, inputs, assistant_model=draft)
    with pkv_hf.patched(draft):
        assert_same(generate(model, inputs, assistant_model=draft), expected)
        assert pkv_hf.report(draft).route == "sdpa"


@pytest.mark.contract
def test_inputs_embeds(model):
    inputs = left_padded(*PADDED)
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs.pop("input_ids")), **inputs}
    for settings in ({}, {"num_beams": 3}):
        expected = generate(model, embedded, **settings)
        with pkv_hf.patched(model):
            output = generate(model, embedded, **settings)
            assert not pkv_hf.report(model).left
        assert_same(output, expected)


@pytest.mark.contract
@pytest.mark.parametrize("lengths", [ONE, PADDED])
@pytest.mark.parametrize("inside", [False, True], ids=["", "padding inside"])
def test_turns(model, lengths, inside):
    """Three turns on one cache, whose later ones may have padding of their own between the turns."""
    inputs, turns = left_padded(*lengths), [torch.randint(2, 128, (len(lengths), 7)) for _ in range(2)]

    def conversation(cache):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        for turn in (*turns, None):
            out = generate(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache, max_new_tokens=9)
            if turn is not None:
                ids = torch.cat([out.sequences, turn], dim=1)
                mask = torch.cat([mask, torch.ones(len(ids), 16, dtype=torch.long)], dim=1)
                mask[0, -7:-4] = 0 if inside else 1
        return out

    expected = conversation(DynamicCache(config=model.config))
    with pkv_hf.patched(model):
        output = conversation(PagedCache(model.config))
        left = " | ".join(pkv_hf.report(model).left)
    assert_same(output, expected)
    assert ("holes" in left) == inside
    if not inside:
        cache = output.past_key_values
        real = cache.get_seq_length() - cache.pads
        assert cache.memory().pages_in_use <= len(cache.tables) * (real // 16 + 2).sum()  # a turn grows by a step


@pytest.mark.contract
@pytest.mark.parametrize("route", ["split", "workqueue"])
def test_triton_routes_read_shared_pages(route):
    pytest.importorskip("triton")
    model, inputs = tiny("mistral", num_hidden_layers=1), left_padded(20)
    settings = {"num_beams": 2, "max_new_tokens": 4}
    expected = generate(model, inputs, **settings)
    with pkv_hf.patched(model, route=route):
        assert_same(generate(model, inputs, **settings), expected)
