"""Known by structure: what runs a family's own functions is of the family, whatever its names are."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel, Qwen3ForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama import modeling_llama as llama

import pkv_hf
from pkv_hf.compat import CACHE
from pkv_hf.patches.families import FAMILIES
from pkv_hf.replaced import STATE
from tiny import COMMON, assert_on_pages, left_padded, randomized, tiny

pytestmark = pytest.mark.contract

INPUTS = left_padded(12, 7)
NEW_TOKENS = 4
ONE_LAYER = {**COMMON, "num_hidden_layers": 1}
OF_THE_FAMILIES = sorted(
    model_type
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    if name in {f"{family.prefix}ForCausalLM" for family in FAMILIES} and model_type not in {f.folder for f in FAMILIES}
)
"""Model types under which transformers has a family's class again: older releases have none."""


def generate(model):
    return model.generate(**INPUTS, max_new_tokens=NEW_TOKENS, do_sample=False)


def assert_fused(model) -> None:
    """Every step but the prompt's runs by the family's decode forward, also under the run-ahead loop."""
    pytest.importorskip("triton")
    expected = generate(model)
    pkv_hf.patch(model, route="split")
    assert torch.equal(generate(model), expected)
    assert pkv_hf.report(model).steps.static == NEW_TOKENS - 1
    assert not pkv_hf.report(model).generic
    assert_on_pages(model)
    look = getattr(model, STATE).known.look()
    assert (look.layers, look.attention, look.loop, look.foreign) == ("", "", "", "")


@pytest.mark.parametrize("model_type", OF_THE_FAMILIES)
def test_every_model_type_of_a_familys_class_is_fused(model_type):
    config = CONFIG_MAPPING[model_type](**ONE_LAYER)
    with torch.device("meta"):
        of_class = type(AutoModelForCausalLM.from_config(config))
    assert_fused(randomized(of_class, config))


class NewConfig(LlamaConfig):
    model_type = "new"


class NewAttention(llama.LlamaAttention):
    """A docstring and data change nothing; what __init__ puts there is looked at itself."""

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


def test_classes_that_change_no_function_are_fused(monkeypatch):
    model = randomized(NewForCausalLM, NewConfig(**ONE_LAYER))
    assert_fused(model)
    monkeypatch.setattr(llama, "apply_rotary_pos_emb", lambda q, k, *_: (q, k))  # no class of the model lies beside it
    assert getattr(model, STATE).known.look().attention == "apply_rotary_pos_emb is not transformers' own"


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_model_type_that_nobody_knows_changes_nothing(name):
    model = tiny(name, num_hidden_layers=1)
    model.config.__class__ = type("Renamed", (type(model.config),), {"model_type": "renamed"})
    assert_fused(model)
    assert pkv_hf.report(model).family == "renamed"


def with_property(of_class):
    return type(of_class.__name__, (of_class,), {"q_proj": property(lambda self: self.k_proj)})


def with_call(of_class):
    return type(of_class.__name__, (of_class,), {"__call__": lambda self, *args, **kwargs: None})


def with_module(of_class):
    return type(of_class.__name__, (of_class,), {"o_proj": torch.nn.Identity()})


def with_mixin(of_class):
    return type(of_class.__name__, (type("Mixin", (), {"__getattr__": lambda self, name: 1}), of_class), {})


@pytest.mark.parametrize("changed", [with_property, with_call, with_module, with_mixin])
def test_a_class_that_may_run_other_code_is_no_familys(changed):
    (family,) = [each for each in FAMILIES if each.prefix == "Llama"]
    assert family.runs(llama.LlamaAttention, "Attention")
    assert not family.runs(changed(llama.LlamaAttention), "Attention")
    assert not family.runs(type("LlamaAttention", (torch.nn.Module,), {"forward": llama.LlamaMLP.forward}), "Attention")


def test_families_are_told_apart_by_their_files():
    runs = {family.prefix: family.runs(Qwen3ForCausalLM, "ForCausalLM") for family in FAMILIES}
    assert runs == {"Llama": False, "Mistral": False, "Qwen2": False, "Qwen3": True}
    assert all(family.runs(getattr(transformers, f"{family.prefix}Model"), "Model") for family in FAMILIES)


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
