"""What layers ask of attention beyond a causal softmax: what pages give of it, and what is left to transformers."""

from __future__ import annotations

import pytest
import torch
from served import SERVED, build, generate

import pkv_hf
from pkv_hf import PagedCache
from pkv_hf.compat import CACHE, adds_sinks
from tiny import assert_on_pages, left_padded

pytestmark = pytest.mark.contract


@pytest.mark.parametrize("route", ["auto", "split"])
def test_layers_of_different_shapes_are_served(route):
    model, inputs = build(*SERVED["olmo2"]), left_padded(30, 9)
    other = build("Olmo2Config", "Olmo2ForCausalLM", {"num_key_value_heads": 4}).model.layers[1].self_attn
    other.config = model.config
    model.model.layers[1].self_attn = other
    expected = generate(model, inputs).sequences
    with pkv_hf.patched(model, route=route):
        assert torch.equal(generate(model, inputs).sequences, expected)
        assert_on_pages(model)
        shapes = pkv_hf.explain(model).shapes
        assert sorted((shape.layers, shape.kv_heads, shape.group) for shape in shapes) == [(1, 4, 1), (2, 2, 2)]


@torch.no_grad()
def test_a_cap_that_sdpa_does_not_know_is_left_to_it():
    """Some releases of transformers leave it out, others raise."""
    model, ids = build(*SERVED["gemma2"]), left_padded(12)["input_ids"]
    capped = model(ids).logits
    model.config._attn_implementation = "sdpa"

    def outcome(**settings):
        try:
            return model(ids, **settings).logits
        except ValueError as error:
            return torch.tensor([len(str(error))])

    expected = outcome()
    pkv_hf.patch(model)
    torch.testing.assert_close(outcome(**{CACHE: PagedCache(model.config)}), expected)
    assert expected.shape != capped.shape or not torch.allclose(capped, expected, atol=1e-2)


def test_hooks_on_layers_in_chunks_change_no_token():
    """Layers get transformers' masks then, which have to be known as those of chunks."""
    model, inputs = build(*SERVED["llama4"]), left_padded(30, 21, 3)
    expected = generate(model, inputs).sequences
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, *_: seen.append(module))
    with pkv_hf.patched(model):
        assert torch.equal(generate(model, inputs).sequences, expected)
        assert_on_pages(model)
        assert [shape.chunked for shape in pkv_hf.explain(model).shapes] == [False, True]
    assert seen


def sinks_of_two_dimensions(model):
    attention = model.model.layers[1].self_attn
    attention.sinks = torch.nn.Parameter(attention.sinks.detach()[None])


def implementation_without_sinks(model):
    model.config._attn_implementation = "sdpa"


@pytest.mark.parametrize("change", [sinks_of_two_dimensions, implementation_without_sinks])
def test_sinks_that_transformers_would_not_add_so_are_left_to_it(change):
    model, inputs = build(*SERVED["gpt-oss"]), left_padded(20, 9)
    change(model)
    expected = generate(model, inputs, 5).sequences
    pkv_hf.patch(model)
    assert torch.equal(generate(model, inputs, 5).sequences, expected)
    (left,) = pkv_hf.report(model).left
    assert left == "GptOssAttention asks attention for s_aux=a Parameter"


def test_eager_attention_adds_a_modules_own_sinks():
    attention = build(*SERVED["gpt-oss"]).model.layers[0].self_attn
    other = build(*SERVED["olmo2"]).model.layers[0].self_attn
    other.sinks = attention.sinks
    assert adds_sinks("eager", attention, attention.sinks)
    assert not adds_sinks("eager", attention, attention.sinks.clone())
    assert not adds_sinks("eager", other, other.sinks)
    assert adds_sinks("flex_attention", attention, attention.sinks.clone())
    assert not adds_sinks("flash_attention_2", attention, attention.sinks)
    assert not adds_sinks("sdpa", attention, attention.sinks)
