"""Every mode of generate(), with each kind of cache: what a patched model returns is what the model returns without."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CompileConfig, DynamicCache
from transformers.generation import candidate_generator

import pkv_hf
from pkv_hf import PagedCache
from pkv_hf.compat import CACHE
from tiny import assert_on_pages, left_padded, tiny

FAMILIES = ("llama", "mistral", "qwen2-windows")
"""Full attention, windows, and both: with biases or normed keys the layers differ, and nothing in a mode does."""
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


@pytest.fixture(autouse=True)
def one_threshold_for_drafts(monkeypatch):
    """With scikit-learn transformers learns when an assistant is to stop: the oldest's own sliding caches fail then."""
    if Version(transformers.__version__) < Version("5.23"):
        monkeypatch.setattr(candidate_generator, "is_sklearn_available", lambda: False)


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
    for name in set(theirs.keys()) - {"sequences", CACHE}:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-4)
    if theirs.get(CACHE) is not None:
        assert ours[CACHE].get_seq_length() == theirs[CACHE].get_seq_length()


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
        if settings.get("use_cache", True):
            assert_on_pages(model)
            assert isinstance(output[CACHE], PagedCache)
        else:
            calls = pkv_hf.report(model).calls
            assert (calls.pages, calls.transformers) == (0, 24)
    assert_same(output, expected)


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
            assert_on_pages(model)
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
            out = generate(model, {"input_ids": ids, "attention_mask": mask}, **{CACHE: cache}, max_new_tokens=9)
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
        cache = output[CACHE]
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


def diverse_beams(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """Two groups of two beams, the second kept from the first one's tokens: the loop that 5.x fetches from the hub."""
    beams, cache = generation_config.num_beams, kwargs[CACHE]
    totals = torch.tensor([0.0, -1e9]).repeat(len(input_ids) // 2)
    output = model._prefill(input_ids, generation_config, kwargs)
    while True:
        kwargs = model._update_model_kwargs_for_generation(output, kwargs)
        scores = logits_processor(input_ids, output.logits[:, -1].log_softmax(-1))
        picked, tokens = torch.empty(len(input_ids), dtype=torch.long), torch.empty(len(input_ids), dtype=torch.long)
        for row in range(0, len(input_ids), beams):
            taken = torch.zeros(scores.shape[1])
            for first in (row, row + 2):
                group = slice(first, first + 2)
                best = (totals[group, None] + scores[group] - 3.0 * taken).flatten().topk(2)
                totals[group], tokens[group] = best.values, best.indices % scores.shape[1]
                picked[group] = first + best.indices // scores.shape[1]
                taken[tokens[group]] = 1
        input_ids = torch.cat([input_ids[picked], tokens[:, None]], dim=1)
        cache.reorder_cache(picked)
        if input_ids.shape[1] == generation_config.max_length:
            return input_ids
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **kwargs)
        output = model(**inputs, return_dict=True)


def test_diverse_beams(model):
    def call():
        return model.generate(**left_padded(*PADDED), num_beams=4, max_new_tokens=20, custom_generate=diverse_beams)

    expected = call()
    assert len({tuple(row) for row in expected[:4, 50:].tolist()}) == 4
    with pkv_hf.patched(model):
        assert torch.equal(call(), expected)
        assert_on_pages(model)


@pytest.mark.parametrize(
    "settings", [{"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, {"dola_layers": "low"}]
)
def test_modes_that_moved_to_the_hub_are_asked_for_there(settings):
    """With the same words as without the patch, since transformers fetches the loop before anything is ours."""
    errors = []
    for model in (tiny("llama"), pkv_hf.patch(tiny("llama"))):
        with pytest.raises((OSError, ValueError)) as caught:
            generate(model, left_padded(9), **settings)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
