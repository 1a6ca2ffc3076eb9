"""What others put around a patched model, or make of one: it is right, and goes as it came."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from transformers import AttentionInterface, AttentionMaskInterface, FalconConfig, FalconForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import pkv_hf
from pkv_hf.cache.paged import PagedCache
from pkv_hf.compat import CACHE
from tiny import assert_on_pages, left_padded, randomized, tiny

INPUTS = left_padded(12, 7)


def generate(model, **settings):
    return model.generate(**INPUTS, **{"max_new_tokens": 4, "do_sample": False, **settings})


def attributes(model) -> dict:
    return {(name, key): id(value) for name, module in model.named_modules() for key, value in vars(module).items()}


def wrapped_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_layer(model):
    model.model.layers[0].mlp.compile(backend="eager")
    return model


COMPILED = {
    "forward": wrapped_forward,
    "in place": compiled_in_place,
    "a part": compiled_layer,
    "around": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.parametrize("way", COMPILED)
@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled_models_generate_right(way, when):
    expected = generate(tiny("llama"))
    torch._dynamo.reset()
    if when == "before":
        model = pkv_hf.patch(COMPILED[way](tiny("llama")))
    else:
        model = COMPILED[way](pkv_hf.patch(tiny("llama")))
    assert torch.equal(generate(model), expected)
    said = pkv_hf.report(model)
    if way == "around":  # its generate() is the model's own, which nothing compiles
        assert_on_pages(model)
    else:
        assert said.left[0] == "the model, or a part of it, is compiled by torch"
        assert said.calls.pages == 0


@torch.no_grad()
def test_a_compiled_forward_without_a_cache_is_whole():
    model, ids = tiny("llama"), INPUTS["input_ids"]
    expected = model(ids, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(pkv_hf.patch(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)


@torch.no_grad()
def test_an_exported_model_is_as_unpatched():
    model, ids = tiny("llama"), INPUTS["input_ids"]
    expected = model(ids, use_cache=False).logits
    exported = torch.export.export(pkv_hf.patch(model), (ids,), {"use_cache": False})
    torch.testing.assert_close(exported.module()(ids, use_cache=False).logits, expected)


@torch.no_grad()
def test_a_static_cache_is_transformers_own():
    settings = {"cache_implementation": "static", "max_new_tokens": 4}
    expected = generate(tiny("llama"), **settings)
    model = pkv_hf.patch(tiny("llama"))
    assert torch.equal(generate(model, **settings), expected)
    assert pkv_hf.report(model).calls.pages == 0


def replica(model):
    """What nn.DataParallel makes for another device: here, one of halved weights."""
    modules = list(model.modules())
    place = {module: i for i, module in enumerate(modules)}
    copies = [module._replicate_for_data_parallel() for module in modules]
    for module, twin in zip(modules, copies):
        for name, child in module._modules.items():
            setattr(twin, name, copies[place[child]])
        for name, parameter in module._parameters.items():
            setattr(twin, name, None if parameter is None else (parameter * 0.5).detach())
    return copies[0]


@torch.no_grad()
def test_replicas_compute_with_their_own_weights():
    model = tiny("llama")
    expected = replica(model)(**INPUTS, use_cache=False).logits
    patched = replica(pkv_hf.patch(model))
    assert torch.equal(patched(**INPUTS, use_cache=False).logits, expected)
    generate(model)
    assert_on_pages(model)


def test_unpatch_leaves_what_came_later():
    model, expected = tiny("llama"), generate(tiny("llama"))
    before = attributes(model)
    pkv_hf.patch(model)
    add_hook_to_module(model.model, ModelHook())
    assert torch.equal(generate(model), expected)
    pkv_hf.unpatch(model)
    assert "forward" in vars(model.model)
    assert torch.equal(generate(model), expected)
    pkv_hf.patch(model)
    assert torch.equal(generate(model), expected)
    pkv_hf.unpatch(model)
    remove_hook_from_module(model.model)
    assert torch.equal(generate(model), expected)
    assert not pkv_hf.patch(model).model._pkv_hf_state.known.look().foreign  # of what the first patch left behind
    pkv_hf.unpatch(model)
    vars(model.model).pop("forward")  # accelerate leaves the forward that it found
    assert attributes(model) == before


def test_a_patch_that_fails_changes_nothing(monkeypatch):
    model, expected = pkv_hf.patch(tiny("llama"), page_size=32), generate(tiny("llama"))
    before = attributes(model)
    AttentionInterface.register("of the user", lambda *args, **kwargs: sdpa_attention_forward(*args, **kwargs))
    AttentionMaskInterface.register("of the user", sdpa_mask)
    model.set_attn_implementation("of the user")
    plain = model.model.forward
    model.model.forward = around = lambda *args, **kwargs: plain(*args, **kwargs)
    with pytest.raises(pkv_hf.UnsupportedModelError, match="of the user"):
        pkv_hf.patch(model, page_size=64)
    assert vars(model.model)["forward"] is around
    model.model.forward = plain
    assert attributes(model) == before
    assert torch.equal(generate(model), expected)
    (left,) = pkv_hf.report(model).left
    assert "the attention function of attn_implementation='of the user' is not transformers' own" in left
    model.set_attn_implementation("sdpa")
    output = generate(model, return_dict_in_generate=True)
    assert type(output[CACHE]) is PagedCache
    assert output[CACHE].page_size == 32


def test_an_attention_function_that_is_registered_anew_runs():
    def colder(module, query, key, value, attention_mask, scaling=None, **kwargs):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling * 0.5, **kwargs)

    models, expected = [tiny("llama"), pkv_hf.patch(tiny("llama"), route="split")], generate(tiny("llama"))
    AttentionInterface.register("sdpa", colder)
    try:
        tokens = [generate(model) for model in models]
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)
    assert torch.equal(*tokens)
    assert not torch.equal(tokens[0], expected)
    assert torch.equal(generate(models[1]), expected)
    assert pkv_hf.report(models[1]).steps.static == 3


def test_a_kept_cache_keeps_no_weights_alive():
    model = pkv_hf.patch(tiny("llama", num_hidden_layers=1), route="split")
    cache = generate(model, return_dict_in_generate=True)[CACHE]
    assert cache.static_steps
    alive = weakref.ref(model.lm_head), weakref.ref(model.model)
    del model
    gc.collect()
    assert [each() for each in alive] == [None, None]
    assert cache.get_seq_length() == 15


@pytest.mark.parametrize("cached", [False, True])
def test_a_patched_model_called_inside_anothers_step(cached):
    inner, outer = pkv_hf.patch(tiny("llama", seed=1)), pkv_hf.patch(tiny("llama"))
    ids, named = INPUTS["input_ids"], set()
    with torch.no_grad():
        expected, seen = tiny("llama", seed=1)(ids).logits, []

    def calls(*_):
        named.add((outer.model.config._attn_implementation, inner.model.config._attn_implementation))
        cache = {CACHE: PagedCache(inner.config)} if cached else {}
        seen.append(inner(ids, **cache).logits)

    plain = generate(tiny("llama"))
    outer.model.layers[1].register_forward_hook(calls)
    assert torch.equal(generate(outer), plain)
    assert len(seen) == 4
    assert named == {("pkv_hf", "sdpa")}
    for logits in seen:
        torch.testing.assert_close(logits, expected)
    assert_on_pages(outer)


def test_a_model_called_inside_its_own_step():
    model, other = pkv_hf.patch(tiny("llama")), tiny("llama")
    calls = []

    def again(layer, args, output):
        if len(calls) < 3:
            calls.append(len(calls))
            calls.append(owner(INPUTS["input_ids"]).logits)

    for owner in (other, model):
        owner.model.layers[1].register_forward_hook(again)
        tokens, seen = generate(owner), [each for each in calls if isinstance(each, torch.Tensor)]
        calls.clear()
        if owner is other:
            expected = tokens, seen
    assert torch.equal(tokens, expected[0])
    for ours, theirs in zip(seen, expected[1]):
        torch.testing.assert_close(ours, theirs)


def test_what_branches_on_its_attention_implementation_is_transformers_own():
    config = FalconConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, eos_token_id=None)
    model = randomized(FalconForCausalLM, config)
    ids = INPUTS["input_ids"][:1]
    with torch.no_grad():
        expected = model(ids).logits
    tokens = generate(model)
    try:
        pkv_hf.patch(model)
    except pkv_hf.UnsupportedModelError:
        return
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(generate(model), tokens)


def test_a_copy_shares_its_configuration_as_the_model_does():
    twin = copy.deepcopy(pkv_hf.patch(tiny("llama")))
    twin.config.num_hidden_layers = 2
    assert twin.model.config.num_hidden_layers == 2
    assert twin.model.config._attn_implementation == "sdpa"
    generate(twin)
    assert_on_pages(twin)


def test_the_configuration_of_a_patched_decoder_is_one_like_others():
    model = pkv_hf.patch(tiny("llama"))
    ours = model.model.config
    assert ours == model.config
    assert model.config == ours
    for other in (
        copy.copy(ours),
        copy.deepcopy(ours),
        type(ours)(num_hidden_layers=1),
        ours.from_dict(ours.to_dict()),
    ):
        other.num_hidden_layers = 1
        assert other != ours
    assert model.config.num_hidden_layers == ours.num_hidden_layers == 3


def test_wrappers_of_a_methods_function_are_right_before_and_after():
    """compressed-tensors wraps the functions of all forwards at the first one, and calls them with their modules."""
    model = tiny("llama")
    expected = generate(model)
    pkv_hf.patch(model)
    for module in model.modules():
        module._original_forward = module.forward.__func__

        def forward(self, *args, **kwargs):
            return self._original_forward(self, *args, **kwargs)

        module.forward = forward.__get__(module)
    assert torch.equal(generate(model), expected)
    assert pkv_hf.report(model).steps.eager > 0
    other = copy.deepcopy(model)
    pkv_hf.unpatch(model)
    assert torch.equal(generate(model), expected)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(generate(other), expected)
