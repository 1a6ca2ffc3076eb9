"""Layers are fused where they compute the same as by their own code: what is wrong is found out, and runs as it is."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP

pytest.importorskip("triton")

import pkv_hf
from pkv_hf.bench.alterations import ALTERATIONS, altered
from pkv_hf.errors import LayerNotServed
from pkv_hf.kernels import elementwise
from pkv_hf.patches import check
from pkv_hf.patches.description import Layer
from pkv_hf.replaced import STATE
from pkv_hf.routes.base import Rotary
from pkv_hf.routes.registry import ROUTES
from pkv_hf.routes.triton import Split
from pkv_hf.runtime.fusion import Fusion
from tiny import assert_on_pages, left_padded, tiny

OUTCOMES = {
    "norm offset": (0, "3 layers: what its modules give is not added to the residual stream alone"),
    "rotary half": (3, "3 layers: their LlamaAttention is called as it is"),
    "activation": (3, "3 layers: their LlamaMLP is called as it is"),
    "multiplier": (0, "3 layers: what its modules give is not added to the residual stream alone"),
    "bias": (3, ""),
    "one layer": (3, ""),
}
"""How many layers are fused, and what `report` says of the others: odd projections are called, and rightly so."""


def logits(model) -> torch.Tensor:
    settings = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return torch.stack(model.generate(**left_padded(9), **settings).logits)


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", ALTERATIONS)
def test_a_model_that_is_altered_between_calls_is_found_out(name):
    model, other = pkv_hf.patch(tiny("llama"), route="split"), tiny("llama")
    before = logits(model)
    assert (pkv_hf.report(model).fused, pkv_hf.report(model).not_fused) == (3, "")
    with altered(model, name):
        ALTERATIONS[name](other)
        expected = logits(other)
        assert not torch.allclose(expected, before, rtol=1e-2, atol=1e-2)
        assert_equal(logits(model), expected)
        assert (pkv_hf.report(model).fused, pkv_hf.report(model).not_fused) == OUTCOMES[name]
        assert_on_pages(model)


def test_what_layers_say_of_themselves_is_followed():
    model = tiny("llama", num_hidden_layers=3)
    before, (first, _, third) = logits(model), model.model.layers
    first.self_attn.scaling *= 2  # a setting alone tells the first two apart
    third.input_layernorm = GemmaRMSNorm(64, 1e-3)
    nn.init.normal_(third.input_layernorm.weight)
    third.mlp.act_fn = nn.GELU("tanh")
    third.self_attn.k_proj.bias = nn.Parameter(torch.randn(32))
    expected = logits(model)
    assert not torch.allclose(expected, before, rtol=1e-2, atol=1e-2)
    with pkv_hf.patched(model, route="split"):
        assert_equal(logits(model), expected)
        assert (pkv_hf.report(model).fused, pkv_hf.report(model).not_fused) == (3, "")


def fusion_of(model) -> Fusion:
    state = getattr(pkv_hf.patch(model, route="split"), STATE)
    return state.fusing(state.known.decoder, state.known.kinds, ROUTES["split"])


def changed(layer: Layer, i: int, **fields: object) -> Layer:
    """A description with other fields of a branch, or of its body where that has them."""
    branch = layer.branches[i]
    of_branch = {name: value for name, value in fields.items() if hasattr(branch, name)}
    body = replace(branch.body, **{name: value for name, value in fields.items() if name not in of_branch})
    branches = [*layer.branches]
    branches[i] = replace(branch, **{"body": body, **of_branch})
    return replace(layer, branches=tuple(branches))


def scores(layer: Layer, factor: float) -> Layer:
    given = layer.branches[0].body.scores
    return changed(layer, 0, scores=given._replace(scale=factor * given.scale))


FALSE = {
    "scale of scores": lambda layer: scores(layer, 1.01),
    "rotation": lambda layer: changed(layer, 0, rotary=Rotary(None, interleaved=True)),
    "no rotation": lambda layer: changed(layer, 0, rotary=Rotary(0)),
    "offset": lambda layer: changed(layer, 1, before=replace(layer.branches[1].before, offset=1.0)),
    "epsilon": lambda layer: changed(layer, 0, before=replace(layer.branches[0].before, eps=1e-3)),
    "no norm": lambda layer: changed(layer, 1, before=None),
    "activation": lambda layer: changed(layer, 1, activation="gelu"),
    "gate": lambda layer: changed(layer, 1, gate=layer.branches[1].body.up, up=layer.branches[1].body.gate),
    "multiplier": lambda layer: changed(layer, 1, scale=1.01),
    "side by side": lambda layer: changed(layer, 1, of_input=True),
    "fewer": lambda layer: replace(layer, branches=layer.branches[:1]),
}
"""Descriptions of a Llama's layer that are wrong."""


@pytest.mark.parametrize("name", FALSE)
def test_a_wrong_description_is_not_believed(name, monkeypatch):
    read = check.read
    monkeypatch.setattr(check, "read", lambda *given: FALSE[name](read(*given)))
    fusion = fusion_of(tiny("llama", num_hidden_layers=1))
    ((reason, count),) = fusion.reasons.items()
    assert (fusion.layers, count) == ({}, 1)
    assert reason.startswith("a LlamaDecoderLayer by its description has ")


def test_in_half_precision_errors_are_those_of_the_dtype(monkeypatch):
    """The layer's own are larger than those of float32; ten percent more is found out."""
    assert not fusion_of(tiny("llama", num_hidden_layers=1).bfloat16()).reasons
    read = check.read
    monkeypatch.setattr(check, "read", lambda *given: changed(read(*given), 1, scale=1.1))
    (reason,) = fusion_of(tiny("llama", num_hidden_layers=1).bfloat16()).reasons
    assert reason.startswith("a LlamaDecoderLayer by its description has ")


def test_one_layer_of_many_runs_as_it_is_where_a_kernel_is_wrong(monkeypatch):
    act_mul = elementwise.act_mul
    monkeypatch.setattr(
        elementwise, "act_mul", lambda gate, up, name: act_mul(gate, up, name) * (1.01 if name == "gelu" else 1)
    )
    model = tiny("llama")
    model.model.layers[1].mlp.act_fn = nn.GELU()
    expected = logits(model)
    pkv_hf.patch(model, route="split")
    assert_equal(logits(model), expected)
    report = pkv_hf.report(model)
    assert (report.fused, report.steps.static, report.last_step) == (2, 2, "static")
    assert report.not_fused.startswith("1 layers: a LlamaDecoderLayer by its description has ")
    assert_on_pages(model)


def raises(q: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda out: out + 0.01 * (len(out) > 1), "has "),
        (lambda out: out * torch.nan, "has nan times"),
        (raises, "fails: RuntimeError: no such kernel"),
    ],
    ids=["several rows", "nan", "raises"],
)
def test_a_route_that_goes_wrong_or_fails_is_found_out(change, says, monkeypatch):
    attend = Split.rope_attend
    monkeypatch.setattr(Split, "rope_attend", lambda *given: change(attend(*given)))
    fusion = fusion_of(tiny("llama", num_hidden_layers=1))
    (reason,) = fusion.reasons
    assert not fusion.layers
    assert reason.startswith(f"a LlamaDecoderLayer by its description {says}")


@pytest.mark.parametrize(("family", "checks"), [("llama", 1), ("qwen2-windows", 2)])
def test_layers_that_are_alike_share_a_check_and_one_is_held_in_float32(family, checks, monkeypatch):
    twins, held, judged, twin_of, disagrees = [], [], [], check.twin_of, check._disagrees

    def twin(layer):
        held.append(sum(each() is not None for each in twins))
        made = twin_of(layer)
        twins.append(weakref.ref(made))
        return made

    monkeypatch.setattr(check, "twin_of", twin)
    monkeypatch.setattr(check, "_disagrees", lambda *given: judged.append(given[0]) or disagrees(*given))
    model, state = tiny(family), torch.get_rng_state()
    weights = [parameter.clone() for parameter in model.parameters()]
    fusion = fusion_of(model)
    assert (len(fusion.layers), fusion.reasons) == (3, {})
    assert (len(judged), held) == (checks, [0] * checks)
    assert fusion.seconds > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(now, before) for now, before in zip(model.parameters(), weights))


class HoldsFunction(LlamaMLP):
    """Whose activation is no module."""

    def forward(self, x):
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


def test_functions_that_modules_hold_tell_layers_apart():
    model = tiny("llama", num_hidden_layers=2)
    for layer, activation in zip(model.model.layers, (functional.silu, functional.relu)):
        layer.mlp.__class__ = HoldsFunction
        layer.mlp.activation = activation
    fusing = getattr(pkv_hf.patch(model), STATE).fusing
    described = fusing._all(model.model, None, None)
    assert [layer.branches[1].body.activation for layer in described] == ["silu", "relu"]
    assert fusing._described
    assert not copy.deepcopy(fusing)._described


@torch.no_grad()
def test_an_argument_that_no_description_knows_is_not_passed_over():
    """Such as one that the layers' own code hands on to attention."""
    fusion = fusion_of(tiny("llama", num_hidden_layers=1))
    (fused,) = fusion.layers.values()
    given = {"position_embeddings": None, "output_attentions": False, "position_bias": torch.zeros(1)}
    with pytest.raises(LayerNotServed, match="layers are given position_bias, which their description does not know"):
        fused(None, torch.zeros(1, 1, 64), given)
