"""Models of a known family whose classes, configuration or caches are not what transformers made of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from transformers import DynamicCache, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import pkv_hf
from pkv_hf.cache.paged import PagedCache
from pkv_hf.compat import CACHE
from tiny import assert_on_pages, left_padded, randomized, tiny

INPUTS = left_padded(12, 7)


def generate(model, **settings):
    return model.generate(**INPUTS, **{"max_new_tokens": 4, "do_sample": False, **settings})


def own_class(module, change):
    """The module, of a class whose forward returns something else."""

    class Own(type(module)):
        def forward(self, *args, **kwargs):
            return change(super().forward(*args, **kwargs))

    module.__class__ = Own


def halved(output):
    if isinstance(output, torch.Tensor):
        return output * -0.5
    output.last_hidden_state = output.last_hidden_state * -0.5
    return output


class LlamaAttention(modeling_llama.LlamaAttention):
    """Of the name of transformers' own."""

    def forward(self, hidden_states, *args, **kwargs):
        assert self.config._attn_implementation  # as code that looks its attention function up
        return super().forward(hidden_states.flip(-1), *args, **kwargs)


CHANGES = {
    "MLP": lambda m: own_class(m.model.layers[0].mlp, halved),
    "norm": lambda m: own_class(m.model.layers[1].input_layernorm, halved),
    "layer": lambda m: own_class(m.model.layers[1], halved),
    "last norm": lambda m: own_class(m.model.norm, halved),
    "decoder": lambda m: own_class(m.model, halved),
    "batch": lambda m: own_class(m.model.layers[0].mlp, lambda out: out * len(out)),
    "no MLP": lambda m: setattr(m.model.layers[1], "mlp", torch.nn.Identity()),
    "LayerNorm": lambda m: setattr(m.model, "norm", torch.nn.LayerNorm(64)),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_modules_of_other_classes_run_as_they_are(change, when):
    model, other = tiny("llama"), tiny("llama")
    CHANGES[change](other)
    expected = generate(other)
    assert not torch.equal(expected, generate(model))
    pkv_hf.patch(model, route="split")
    if when == "after":
        generate(model)
    CHANGES[change](model)
    assert torch.equal(generate(model), expected)
    (left,) = pkv_hf.report(model).left
    assert "is in the place of transformers' Llama" in left


def test_attention_of_another_class_runs_as_it_is():
    model, other = tiny("llama"), tiny("llama")
    for layer in other.model.layers:
        layer.self_attn.__class__ = LlamaAttention
    expected = generate(other)
    assert not torch.equal(expected, generate(model))
    pkv_hf.patch(other)
    assert pkv_hf.report(other).generic
    output = generate(other, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert type(output[CACHE]) is PagedCache


class Scaled(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = -output.logits
        return output


class Generating(LlamaForCausalLM):
    def generate(self, *given, **settings):
        return super().generate(*given, **settings)


@pytest.mark.parametrize("of_class", [Scaled, Generating])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=str)
def test_models_of_other_classes_generate_as_they_do(of_class, settings):
    model = randomized(of_class, tiny("llama").config)
    config = transformers.GenerationConfig(max_new_tokens=4, pad_token_id=0, **settings)
    expected = [generate(model, **settings), model.generate(**INPUTS, generation_config=config)]
    pkv_hf.patch(model, route="split")
    found = [generate(model, **settings), model.generate(**INPUTS, generation_config=config)]
    assert all(torch.equal(*pair) for pair in zip(found, expected))


@pytest.mark.parametrize("order", ["decoder first", "decoder last"])
def test_a_decoder_and_its_model_are_not_patched_twice(order):
    model = tiny("llama")
    before, expected = dict(vars(model.model)), generate(model)
    for part in (model.model, model)[:: 1 if order == "decoder first" else -1]:
        pkv_hf.patch(part)
        assert torch.equal(generate(model), expected)
    pkv_hf.unpatch(model)
    assert vars(model.model) == before
    assert torch.equal(generate(model), expected)


def half_filled(model):
    cache = PagedCache(model.config)
    cache.update(torch.zeros(2, 2, 5, 16), torch.zeros(2, 2, 5, 16), 1)
    return cache


CACHES = {
    "more layers": lambda _: PagedCache(tiny("llama", num_hidden_layers=4).config),
    "windows": lambda _: PagedCache(tiny("mistral").config),
    "half filled": half_filled,
}


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_that_is_not_the_models_costs_no_later_call_its_pages(cache):
    model = tiny("llama")
    expected = model(INPUTS["input_ids"], **{CACHE: CACHES[cache](model)}).logits
    pkv_hf.patch(model)
    assert torch.equal(model(INPUTS["input_ids"], **{CACHE: CACHES[cache](model)}).logits, expected)
    (left,) = pkv_hf.report(model).left
    assert "the PagedCache" in left
    output = generate(model, return_dict_in_generate=True)
    assert type(output[CACHE]) is PagedCache


def test_a_reason_with_numbers_is_said_once():
    model, ids = pkv_hf.patch(tiny("llama")), INPUTS["input_ids"][:1]
    cache = PagedCache(model.config)
    with torch.no_grad():
        model(ids, **{CACHE: cache})
        for _ in range(5):
            model(ids[:, :1], attention_mask=torch.ones(1, 1, dtype=torch.long), **{CACHE: cache})
    assert pkv_hf.report(model).left == ("attention_mask is [1, 1], not [1, 13]",)


def test_settings_of_the_configuration_are_followed():
    model = pkv_hf.patch(tiny("llama"))
    with torch.no_grad():
        assert model(**INPUTS).hidden_states is None
        model.config.output_hidden_states = True
        assert len(model(**INPUTS).hidden_states) == 4
        model.config.use_cache = False
        assert model(**INPUTS).get(CACHE) is None


def test_a_window_that_is_set_later_is_followed():
    models = tiny("mistral"), pkv_hf.patch(tiny("mistral"))
    found = []
    for model in models:
        generate(model)
        model.config.sliding_window = 5
        found.append(generate(model))
    assert torch.equal(*found)
    model.config.sliding_window = 24
    output = generate(model, return_dict_in_generate=True)
    assert type(output[CACHE]) is PagedCache
    assert pkv_hf.report(model).left == ("the PagedCache has other windows than the model's layers, or more layers",)


def test_a_decoder_that_is_saved_alone_is_as_without_the_patch(tmp_path):
    models = tiny("llama"), pkv_hf.patch(tiny("llama"))
    models[1].config.rms_norm_eps = models[0].config.rms_norm_eps = 1e-3
    for model, twin in zip(models, ("plain", "patched")):
        generate(model)
        copy.deepcopy(pickle.loads(pickle.dumps(model))).model.save_pretrained(tmp_path / twin)
    plain, patched = ((tmp_path / twin / "config.json").read_text() for twin in ("plain", "patched"))
    assert plain == patched


def test_prefix_tuning():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        tiny("llama"), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ).eval()
    expected = generate(model)
    with pkv_hf.patched(model):
        assert torch.equal(generate(model), expected)


def test_a_pickled_cache_holds_no_model():
    model = pkv_hf.patch(tiny("llama"), route="split")
    cache = PagedCache(model.config)
    generate(model, **{CACHE: cache})
    assert cache.static_steps
    twin = pickle.loads(pickle.dumps(cache))
    assert not twin.static_steps
    for ours, theirs in zip(twin.layers, cache.layers):
        assert torch.equal(ours.keys, theirs.keys)


def test_stop_strings_stay_on_pages():
    from tiny import byte_tokenizer

    model, tokenizer = tiny("llama"), byte_tokenizer()
    model.resize_token_embeddings(256)
    expected = generate(model, stop_strings=["q"], tokenizer=tokenizer, max_new_tokens=12)
    pkv_hf.patch(model)
    output = generate(model, stop_strings=["q"], tokenizer=tokenizer, max_new_tokens=12, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert type(output[CACHE]) is PagedCache
    assert_on_pages(model)
    assert type(generate(pkv_hf.unpatch(model), return_dict_in_generate=True)[CACHE]) is DynamicCache
