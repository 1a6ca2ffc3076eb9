"""What is not cached: it runs as without, and `report` says why."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
import transformers
from hybrid import hybrid

import pkv_hf
from pkv_hf.compat import CACHE
from pkv_hf.runtime.admission import Admitted
from pkv_hf.runtime.masks import Expanded
from pkv_hf.runtime.prefix_cache.kept import Rows
from pkv_hf.runtime.prefix_cache.prompts import Prompt, Unlike
from tiny import COMMON, one, padded, prefix_use, randomized, tiny, tokens, with_prefix_cache

OTHERWISE = "the decoder is given something else than the prompt's tokens at their places"
PROMPT = one(tokens(40, 1))


def hooked(model, twin):
    for each in (model, twin):
        each.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    return {}


def of_its_own(model, twin):
    class Changed(type(twin.model.layers[0].mlp)):
        def forward(self, x):
            return super().forward(x + 1)

    for each in (model, twin):
        each.model.layers[0].mlp.__class__ = Changed
    return {}


def embeddings(model, twin):
    return {"inputs_embeds": twin.get_input_embeddings()(PROMPT["input_ids"]).detach()}


def with_holes(model, twin):
    mask = PROMPT["attention_mask"].clone()
    mask[0, 5] = 0
    return {"attention_mask": mask}


CALLS = {
    "hooks": (hooked, "modules have forward hooks"),
    "own code": (of_its_own, "the forward of a Changed is in no file of a known library"),
    "embeddings": (embeddings, "the call has more than tokens and a mask: inputs_embeds"),
    "holes": (with_holes, "attention_mask is more than left padding"),
    "positions": (
        lambda *_: {"position_ids": torch.arange(3, 43)[None]}, "position_ids are the caller's own",
    ),
    "hidden states": (
        lambda *_: {"output_hidden_states": True, "return_dict_in_generate": True},
        "output_hidden_states=True asks for those of the whole prompt",
    ),
    "a mask of no meaning here": (
        lambda *_: {"mm_token_type_ids": torch.zeros(1, 40, dtype=torch.long)},
        "the call has more than tokens and a mask: mm_token_type_ids",
    ),
    "assisted": (
        lambda *_: {"prompt_lookup_num_tokens": 3},
        "prompts of assisted generation and of loops of your own do not come by it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_is_not_cached_is_as_without(call):
    change, reason = CALLS[call]
    model, twin = with_prefix_cache("llama")
    model.generate(**PROMPT, max_new_tokens=1)  # kept, for what comes by
    settings = {**PROMPT, **change(model, twin), "max_new_tokens": 4, "do_sample": False}
    if call == "a mask of no meaning here":  # which the forward of a model of text does not take
        for each in (model, twin):
            each._validate_model_kwargs = lambda _: None
            each.prepare_inputs_for_generation = _without(each, "mm_token_type_ids")
    for _ in range(2):
        expected, given = twin.generate(**settings), model.generate(**settings)
        sequences = [getattr(output, "sequences", output) for output in (expected, given)]
        assert torch.equal(*sequences)
        if call == "hidden states":
            assert [h.shape for h in given.hidden_states[0]] == [h.shape for h in expected.hidden_states[0]]
    assert (prefix_use(model).prompts, prefix_use(model).hits) == (1, 0)
    assert prefix_use(model).not_cached == (reason,)
    assert f"not in the prefix cache: {reason}" in repr(pkv_hf.report(model))


def _without(model, name):
    prepare = model.prepare_inputs_for_generation

    def prepared(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        inputs.pop(name, None)
        return inputs

    return prepared


def rescaled():
    settings = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    return tiny("llama", max_position_embeddings=32, rope_parameters=settings)


MODELS = {
    "a dynamic RoPE": (rescaled, {}, "rope_type 'dynamic' changes with the length"),
    "states": (lambda: hybrid("delta"), {}, "layers keep linear-attention states, which are of all tokens in one"),
    "8 bits": (
        lambda: tiny("llama"), {"kv_dtype": "int8"},
        "pages of torch.int8 hold rounded keys, to which only later tokens attend",
    ),
    "half": (
        lambda: tiny("llama"), {"kv_dtype": torch.bfloat16},
        "pages of torch.bfloat16 hold rounded keys, to which only later tokens attend",
    ),
    "a window": (lambda: tiny("mistral"), {}, "a sliding window of 24 tokens has left behind some of 60"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_is_not_cached_is_as_without(kind):
    build, settings, reason = MODELS[kind]
    twin = build()
    model = pkv_hf.patch(copy.deepcopy(twin), prefix_cache="4MiB", **settings)
    plain = pkv_hf.patch(twin, **settings)
    for _ in range(2):
        prompt = one(tokens(60, 1))
        given, expected = (each.generate(**prompt, max_new_tokens=4, do_sample=False) for each in (model, plain))
        assert torch.equal(given, expected)
    assert prefix_use(model).hits == 0
    assert prefix_use(model).not_cached == (reason,)


def test_a_window_is_no_reason_while_it_holds_the_prompt(same):
    model, twin = with_prefix_cache("mistral")
    same(model, twin, one(tokens(24, 1)))
    same(model, twin, one(tokens(24, 1), tokens(30, 2)))
    same(model, twin, one(tokens(24, 1), tokens(30, 2), tokens(5, 3)))
    assert (prefix_use(model).hits, prefix_use(model).tokens_saved) == (2, 16 + 48)
    assert prefix_use(model).not_cached == ()


def test_a_caller_s_cache_is_its_own():
    model, _ = with_prefix_cache("llama")
    cache = pkv_hf.PagedCache(model.config)
    turn = model.generate(**PROMPT, **{CACHE: cache}, max_new_tokens=3)  # empty: as one that generate() makes
    assert prefix_use(model).not_cached == ()
    model.generate(torch.cat([turn, turn[:, :2]], dim=1), **{CACHE: cache}, max_new_tokens=3)
    assert prefix_use(model).not_cached == ("the call goes on from a cache of its caller's",)


@pytest.mark.parametrize(("what", "by"), [("position_ids", 5), ("input_ids", 1)])
def test_a_model_that_gives_its_decoder_something_else_runs_again_whole(what, by, same):
    """Kept pages are gone on from only where the decoder is given the prompt's tokens at their places: evidence of each
    call, since a model may keep more of earlier ones."""
    model, twin = with_prefix_cache("llama")
    same(model, twin, PROMPT)
    longer = one(tokens(40, 1), tokens(9, 2))
    for each in (model, twin):
        _shift(each, what, by)
    hits = prefix_use(model).hits
    for _ in range(2):
        same(model, twin, longer)
        same(model, twin, longer, prefill_chunk_size=20)
    assert prefix_use(model).hits == hits
    assert prefix_use(model).not_cached == (OTHERWISE,)
    unknown = one(tokens(50, 7))
    same(model, twin, unknown)
    for each in (model, twin):
        each.prepare_inputs_for_generation = each.prepare_inputs_for_generation.__wrapped__
    same(model, twin, unknown)
    assert prefix_use(model).hits == hits


def test_a_call_that_is_left_to_transformers_has_its_whole_prompt_there(same):
    """Where a user's attention function takes the place of transformers', say, which may look at all of it."""
    model, twin = with_prefix_cache("llama")
    same(model, twin, PROMPT)
    before = transformers.AttentionInterface()["sdpa"]

    def by_length(module, query, *args, **kwargs):
        output, weights = before(module, query, *args, **kwargs)
        return output * (1 + query.shape[2] / 8), weights

    transformers.AttentionInterface.register("sdpa", by_length)
    try:
        same(model, twin, PROMPT)
    finally:
        transformers.AttentionInterface.register("sdpa", before)
    assert pkv_hf.report(model).calls.transformers
    assert (prefix_use(model).hits, prefix_use(model).not_cached) == (0, (OTHERWISE,))
    same(model, twin, PROMPT)
    assert prefix_use(model).hits == 1


def _shift(model, what, by):
    """Has the model give its decoder other positions or tokens, in a way that generate() does not know."""
    prepare = model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def shifted(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        inputs[what] = inputs[what] + by if what == "position_ids" else (inputs[what] + by) % 128
        return inputs

    model.prepare_inputs_for_generation = shifted


def test_a_prompt_whose_tokens_see_each_other_is_not_gone_on_from():
    """By the masks that a model made of it."""
    model, _ = with_prefix_cache("llama")
    cache, ids = pkv_hf.PagedCache(model.config), PROMPT["input_ids"]
    rows = Rows(ids.numpy(), np.zeros(1, dtype=np.int64))
    for expanded, whole in ((None, True), (Expanded(None, True, True), True), (Expanded(None, False, True), False)):
        prompt = Prompt(cache, ids, rows, 0)
        call = {"input_ids": ids, "position_ids": torch.arange(40)[None]}
        prompt.see(Admitted(cache, rows.pads, 0, 40, ids.device, torch.float32, "", {}, expanded), call)
        assert prompt.whole is whole
    with pytest.raises(Unlike):
        Prompt(cache, ids, rows, 16).lost()


def test_a_draft_that_exits_early(same):
    model, twin = with_prefix_cache("llama")
    same(model, twin, PROMPT)
    for _ in range(2):
        same(model, twin, one(tokens(40, 1), tokens(9, 2)), assistant_early_exit=1)
    same(model, twin, PROMPT)
    assert prefix_use(model).hits == 1
    assert "a draft that exits early fills the pages of its first layers alone" in prefix_use(model).not_cached


def test_a_model_around_a_decoder_is_cached_where_it_is_given_text_alone(same):
    text = transformers.LlamaConfig(**COMMON)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=127)
    twin = randomized(transformers.LlavaForConditionalGeneration, config)
    model = pkv_hf.patch(copy.deepcopy(twin), prefix_cache="4MiB")
    texts = [[token % 100 for token in tokens(40, seed)] for seed in (1, 2)]
    for n in range(2):
        same(model, twin, one(texts[0], [n]))
        same(model, twin, padded(texts[0] + [n] * 3, texts[0]))
    assert prefix_use(model).hits == 5
    image = one([127] * 4, texts[1])
    image["pixel_values"] = torch.randn(1, 3, 28, 28)
    hits = prefix_use(model).hits
    for _ in range(2):
        same(model, twin, image)
    assert prefix_use(model).hits == hits
    (reason,) = prefix_use(model).not_cached
    assert reason.startswith("the call has more than tokens and a mask: ")
