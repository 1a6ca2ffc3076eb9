"""Models of a known family whose classes, configuration or caches are not what transformers made of them."""

from __future__ import annotations

import copy
import functools
import pickle
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.nn.modules.module import register_module_forward_hook
from transformers import DynamicCache, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama

import pkv_hf
from pkv_hf.cache.paged import PagedCache
from pkv_hf.compat import CACHE
from pkv_hf.origins import of_a_library
from pkv_hf.replaced import Replacement
from tiny import assert_on_pages, left_padded, randomized, tiny

INPUTS = left_padded(12, 7)


def generate(model, **settings):
    return model.generate(**INPUTS, **{"max_new_tokens": 4, "do_sample": False, **settings})


def own_class(module, change):
    """The module, of a class whose forward returns something else. Returns how to undo it."""
    of_class = type(module)

    class Own(of_class):
        def forward(self, *args, **kwargs):
            return change(super().forward(*args, **kwargs))

    module.__class__ = Own
    return lambda: setattr(module, "__class__", of_class)


def on_instance(module, change, name="forward"):
    """The module, with a method of its own around that of its class."""
    run = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: change(run(*args, **kwargs)))
    return lambda: vars(module).update({name: run}) if isinstance(run, Replacement) else delattr(module, name)


def everywhere(owner, name, change):
    """A function of a class or a file, replaced for all that use it."""
    run = getattr(owner, name)
    setattr(owner, name, functools.wraps(run)(lambda *args, **kwargs: change(run(*args, **kwargs))))
    return lambda: setattr(owner, name, run)


def replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


def halved(output):
    if isinstance(output, torch.Tensor):
        return output * -0.5
    if isinstance(output, tuple):
        return (output[0] * -0.5, *output[1:])
    for name in ("last_hidden_state", "logits"):
        if name in output:
            output[name] = output[name] * -0.5
    return output


class LlamaAttention(modeling_llama.LlamaAttention):
    """Of the name of transformers' own."""

    def forward(self, hidden_states, *args, **kwargs):
        assert self.config._attn_implementation  # as code that looks its attention function up
        return super().forward(hidden_states.flip(-1), *args, **kwargs)


def replaced_hooks(model):
    mlp = model.model.layers[0].mlp
    undo = replaced(mlp, "_forward_hooks", OrderedDict())
    mlp.register_forward_hook(lambda _, args, out: halved(out))
    return undo


CHANGES = {
    "MLP of a class": lambda m: own_class(m.model.layers[0].mlp, halved),
    "norm of a class": lambda m: own_class(m.model.layers[0].input_layernorm, halved),
    "layer of a class": lambda m: own_class(m.model.layers[0], halved),
    "last norm of a class": lambda m: own_class(m.model.norm, halved),
    "decoder of a class": lambda m: own_class(m.model, halved),
    "rows looked at": lambda m: own_class(m.model.layers[0].mlp, lambda out: out * len(out)),
    "projection of a class": lambda m: own_class(m.model.layers[0].self_attn.q_proj, halved),
    "no MLP": lambda m: replaced(m.model.layers[0], "mlp", torch.nn.Identity()),
    "LayerNorm": lambda m: replaced(m.model, "norm", torch.nn.LayerNorm(64)),
    "other head": lambda m: replaced(m, "lm_head", torch.nn.Linear(64, 128)),
    "attention's forward": lambda m: on_instance(m.model.layers[0].self_attn, halved),
    "MLP's forward": lambda m: on_instance(m.model.layers[0].mlp, halved),
    "rotary's forward": lambda m: on_instance(m.model.rotary_emb, halved),
    "projection's forward": lambda m: on_instance(m.model.layers[0].mlp.up_proj, halved),
    "decoder's forward": lambda m: on_instance(m.model, halved),
    "model's forward": lambda m: on_instance(m, halved),
    "head's forward": lambda m: on_instance(m.lm_head, halved),
    "inputs' preparation": lambda m: on_instance(m, inputs_shifted, "prepare_inputs_for_generation"),
    "attention's class": lambda m: everywhere(modeling_llama.LlamaAttention, "forward", halved),
    "MLP's class": lambda m: everywhere(modeling_llama.LlamaMLP, "forward", halved),
    "norm's class": lambda m: everywhere(modeling_llama.LlamaRMSNorm, "forward", halved),
    "layer's class": lambda m: everywhere(modeling_llama.LlamaDecoderLayer, "forward", halved),
    "layer's call": lambda m: everywhere(modeling_llama.LlamaDecoderLayer, "__call__", halved),
    "decoder's class": lambda m: everywhere(modeling_llama.LlamaModel, "forward", halved),
    "model's class": lambda m: everywhere(LlamaForCausalLM, "forward", halved),
    "rotary's class": lambda m: everywhere(modeling_llama.LlamaRotaryEmbedding, "forward", halved),
    "activation's class": lambda m: everywhere(type(m.model.layers[0].mlp.act_fn), "forward", halved),
    "Linear": lambda m: everywhere(torch.nn.Linear, "forward", halved),
    "RoPE": lambda m: everywhere(modeling_llama, "apply_rotary_pos_emb", lambda qk: (qk[0] * 0.1, qk[1])),
    "RoPE's half": lambda m: everywhere(modeling_llama, "rotate_half", halved),
    "scale": lambda m: replaced(m.model.layers[0].self_attn, "scaling", 1.0),
    "epsilon": lambda m: replaced(m.model.layers[0].input_layernorm, "variance_epsilon", 10.0),
    "hook": lambda m: m.model.layers[0].mlp.register_forward_hook(lambda _, args, out: halved(out)).remove,
    "global hook": lambda m: (
        register_module_forward_hook(
            lambda module, args, out: halved(out) if module is m.model.layers[0].mlp else None
        ).remove
    ),
    "hooks' dictionary": replaced_hooks,
    "loop": lambda m: everywhere(LlamaForCausalLM, "_sample", lambda out: out.flip(1)),
}


def inputs_shifted(inputs):
    inputs["input_ids"] = (inputs["input_ids"] + 1) % 128
    return inputs


class Named:
    """Of somebody else, with all that a wrapper of a library's has."""

    func = __wrapped__ = staticmethod(sdpa_attention_forward)

    def __call__(self, *args, **kwargs):
        return sdpa_attention_forward(*args, **kwargs)


@functools.wraps(sdpa_attention_forward)
def wrapped(*args, **kwargs):
    return sdpa_attention_forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("function", "known"),
    [
        (sdpa_attention_forward, True),
        (functools.partial(sdpa_attention_forward), True),
        (torch.no_grad()(sdpa_attention_forward), True),
        (modeling_llama.LlamaModel.forward, True),
        (tiny("llama", num_hidden_layers=1).forward, True),
        (torch.nn.SiLU(), True),
        (functools.partial(sdpa_attention_forward, is_causal=False), False),
        (Named(), False),
        (wrapped, False),
        (torch.no_grad()(wrapped), False),
        (lambda *args: None, False),
        (torch.compile(sdpa_attention_forward), False),
    ],
)
def test_what_is_of_a_library(function, known):
    assert of_a_library(function) == known


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_transformers_own_runs_as_it_is(change):
    model, other = (tiny("llama", num_hidden_layers=1) for _ in range(2))
    plain = generate(other)
    torch.manual_seed(0)
    undo = CHANGES[change](other)
    try:
        expected = generate(other)
    finally:
        undo()
    assert not torch.equal(expected, plain)
    pkv_hf.patch(model, route="split")
    assert torch.equal(generate(model), plain)
    torch.manual_seed(0)
    undo = CHANGES[change](model)
    try:
        assert torch.equal(generate(model), expected)
    finally:
        undo()
    static = pkv_hf.report(model).steps.static
    assert torch.equal(generate(model), plain)
    assert pkv_hf.report(model).steps.static == static + 3, "it is served again as before"


def test_attention_of_another_class_runs_as_it_is():
    model, other = tiny("llama"), tiny("llama")
    for layer in other.model.layers:
        layer.self_attn.__class__ = LlamaAttention
    expected = generate(other)
    assert not torch.equal(expected, generate(model))
    pkv_hf.patch(other)
    output = generate(other, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert type(output[CACHE]) is PagedCache


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_arguments_by_position_are_those_of_transformers_attention(dropout, monkeypatch):
    plain = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface

    def get_interface(*args):
        function = plain(*args)
        return lambda *states, scaling, **kwargs: function(*states, dropout, scaling, **without(kwargs, "dropout"))

    def call():
        torch.manual_seed(0)
        return generate(model, max_new_tokens=6)

    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.4  # not what a missing one stands for
    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", SimpleNamespace(get_interface=get_interface))
    expected = call()
    pkv_hf.patch(model)
    assert torch.equal(call(), expected)
    if dropout:
        assert pkv_hf.report(model).left == ("LlamaAttention asks attention for dropout=0.5",)
    else:
        assert_on_pages(model)


def without(settings, name):
    return {key: value for key, value in settings.items() if key != name}


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
