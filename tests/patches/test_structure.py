"""Known by structure: layers are fused by what they compute, whatever their classes and model types are called."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel, LogitsProcessor
from transformers.models.llama import modeling_llama as llama

import pkv_hf
from families.models import family_model
from pkv_hf.compat import CACHE
from pkv_hf.patches.probe import TOKENS, given_to_layers
from pkv_hf.replaced import STATE
from tiny import COMMON, assert_on_pages, left_padded, randomized, tiny

pytestmark = pytest.mark.contract

INPUTS = left_padded(12, 7)
NEW_TOKENS = 4
ONE_LAYER = {**COMMON, "num_hidden_layers": 1}


def generate(model):
    return model.generate(**INPUTS, max_new_tokens=NEW_TOKENS, do_sample=False)


def assert_fused(model) -> None:
    """Every step but the prompt's, which shows what layers are, runs by our kernels."""
    pytest.importorskip("triton")
    expected = generate(model)
    pkv_hf.patch(model, route="split")
    assert torch.equal(generate(model), expected)
    report = pkv_hf.report(model)
    assert (report.steps.static, report.steps.eager) == (NEW_TOKENS - 1, 0)
    assert (report.fused, report.not_fused) == (1, "")
    assert_on_pages(model)


class NewConfig(LlamaConfig):
    model_type = "new"


class NewAttention(llama.LlamaAttention):
    """With a bias that no configuration tells of."""

    rope_kind = "plain"

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.q_proj = torch.nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=True)


class NewMLP(llama.LlamaMLP):
    pass


class NewNorm(llama.LlamaRMSNorm):
    pass


class NewRotary(llama.LlamaRotaryEmbedding):
    pass


class NewLayer(llama.LlamaDecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.self_attn, self.mlp = NewAttention(config, layer_idx), NewMLP(config)
        self.input_layernorm, self.post_attention_layernorm = NewNorm(config.hidden_size), NewNorm(config.hidden_size)


class NewModel(LlamaModel):
    config: NewConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = torch.nn.ModuleList(NewLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm, self.rotary_emb = NewNorm(config.hidden_size), NewRotary(config)


class NewForCausalLM(LlamaForCausalLM):
    config: NewConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = NewModel(config)


def test_classes_of_other_names_are_fused():
    assert_fused(randomized(NewForCausalLM, NewConfig(**ONE_LAYER)))


def test_a_model_type_that_nobody_knows_changes_nothing():
    model = tiny("qwen3", num_hidden_layers=1)
    model.config.__class__ = type("Renamed", (type(model.config),), {"model_type": "renamed"})
    assert_fused(model)
    assert pkv_hf.report(model).family == "renamed"


class Looping(LlamaModel):
    """As transformers' Dory: layers that run twice get copies of their cache's layers."""

    def forward(self, *args, **kwargs):
        cache = kwargs.get(CACHE)
        if cache is not None and len(cache.layers) == len(self.layers):
            cache.layers += [copy.deepcopy(layer) for layer in cache.layers]
        return super().forward(*args, **kwargs)


class LoopingFurther(Looping):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def looping(decoder):
    model = tiny("llama")
    model.model.__class__ = decoder
    return model


def dory():
    of_transformers = pytest.importorskip("transformers.models.dory")
    sections = {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1}
    with torch.device("meta"):
        return of_transformers.DoryForCausalLM(of_transformers.DoryConfig(**COMMON, **sections))


@pytest.mark.parametrize("make", [lambda: looping(Looping), lambda: looping(LoopingFurther), dory])
def test_a_decoder_that_changes_the_layers_of_its_cache_is_refused(make):
    model = make()
    with pytest.raises(pkv_hf.UnsupportedModelError, match=r"the forward of its \w+ changes the layers of its cache"):
        pkv_hf.patch(model)
    assert not any(STATE in vars(module) for module in model.modules())


def test_settings_that_change_while_steps_run_ahead():
    """What a step was made by lives as long as the call, whoever looks at the model meanwhile."""
    pytest.importorskip("triton")
    model = pkv_hf.patch(tiny("llama", num_hidden_layers=1), route="split")

    class Changes(LogitsProcessor):
        def __call__(self, input_ids, scores):
            model.config.noted = input_ids.shape[1]
            getattr(model, STATE).known.look()
            return scores

    out = model.generate(**INPUTS, max_new_tokens=NEW_TOKENS, do_sample=False, logits_processor=[Changes()])
    assert out.shape[1] == INPUTS["input_ids"].shape[1] + NEW_TOKENS
    assert pkv_hf.report(model).steps.static == NEW_TOKENS - 1


def test_layers_that_return_tuples_are_fused():
    """Bamba's: hidden states, and the weights of attention, which are None."""
    pytest.importorskip("triton")
    model, settings = family_model("bamba"), {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    expected = model.generate(**left_padded(12), **settings)
    with pkv_hf.patched(model, route="split"):
        assert torch.equal(model.generate(**left_padded(12), **settings), expected)
        report = pkv_hf.report(model)
    assert report.fused == len(model.model.layers)
    assert (report.steps.static, report.steps.eager) == (NEW_TOKENS - 1, 0)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_decoder_that_takes_the_first_of_a_tuple_is_given_one(layers):
    """Of a tensor it would take the first row."""
    config = FalconConfig(hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, vocab_size=99)
    model = pkv_hf.patch(FalconForCausalLM(config).eval())
    calls = given_to_layers(model.transformer)
    assert [call.hidden.shape for call in calls.values()] == [(1, TOKENS, 64)] * layers


@pytest.mark.parametrize("other", [0.5, "states"], ids=str)
def test_layers_that_return_more_run_as_they_are(other):
    model = family_model("bamba")
    forward = type(model.model.layers[0]).forward

    class More(type(model.model.layers[0])):
        def forward(self, hidden_states, *args, **kwargs):
            states, _ = forward(self, hidden_states, *args, **kwargs)
            return states, states if other == "states" else other

    for layer in model.model.layers:
        layer.__class__ = More
    pkv_hf.patch(model)
    fusion = getattr(model, STATE).fusing.described(model.model)
    assert not fusion.layers
    assert fusion.reasons == {"its layers return more than hidden states": len(model.model.layers)}
