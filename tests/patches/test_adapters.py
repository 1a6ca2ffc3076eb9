"""PEFT's adapters, not merged: in the launches of their base layers, beside other modules, or by PEFT's own forward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("triton")
pytest.importorskip("peft")

import peft

import pkv_hf
from pkv_hf.kernels import linear
from pkv_hf.kernels.checks.attention import rms
from pkv_hf.kernels.products import adapters as products
from pkv_hf.patches import check
from pkv_hf.patches.projections import registry
from pkv_hf.patches.projections.base import Normed
from pkv_hf.patches.projections.bnb4 import Linear4
from pkv_hf.patches.projections.lora import Beside
from pkv_hf.patches.projections.module import Own
from pkv_hf.patches.projections.plain import Plain
from pkv_hf.patches.projections.registry import Kinds
from pkv_hf.runtime.step import current_step
from tiny import decode_logits, left_padded, tiny

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_adapters(model, targets, **settings):
    """A model with two active adapters of random weights, float32 as PEFT makes them over any base."""
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, **{"r": 5, **settings})
    model = peft.get_peft_model(model, config).eval()
    model.add_adapter("other", peft.LoraConfig(r=17, lora_alpha=9, target_modules=targets[:2], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    return model


@torch.no_grad()
def judge(model, inputs):
    exact, theirs = decode_logits(copy.deepcopy(model).double(), inputs), decode_logits(model, inputs)
    with pkv_hf.patched(model, route="split"):
        ours = decode_logits(model, inputs)
        report = pkv_hf.report(model)
        assert (report.steps.static, report.not_fused) == (len(ours), "")
    assert rms(ours - exact) <= 2 * rms(theirs - exact)
    return len(ours)


def llama(**settings):
    settings = {"num_hidden_layers": 1, "rms_norm_eps": 0.1, **settings}  # an epsilon that shows
    return with_adapters(tiny("llama", **settings).to(torch.bfloat16), ALL).get_base_model()


@pytest.fixture
def launches(monkeypatch):
    """The rows of launches of `shrink`."""
    rows, shrink = [], products.shrink
    monkeypatch.setattr(linear, "shrink", lambda *args: rows.append(len(args[0])) or shrink(*args))
    return rows


def test_adapters_of_all_projections_are_as_exact_as_peft(launches):
    """One launch more for each input that projections share."""
    steps = judge(llama(), left_padded(20, 9, 3))
    assert launches.count(3) == 4 * steps


@torch.no_grad()
def test_another_scaling_in_the_next_call_is_seen(launches, monkeypatch):
    monkeypatch.setattr(check, "_disagrees", lambda *_: "")  # which takes long
    reads, read = [], registry._read
    monkeypatch.setattr(registry, "_read", lambda modules: reads.append(current_step()) or read(modules))
    model, inputs = llama(), left_padded(20, 9)
    scaling = model.model.layers[0].mlp.up_proj.scaling
    exact = []
    for factor in (1, -3):
        scaling["default"] *= factor
        exact.append(decode_logits(copy.deepcopy(model).double(), inputs))
    assert rms(exact[0] - exact[1]) > 0.2 * rms(exact[0]), "scaling was to show"
    with pkv_hf.patched(model, route="split"):
        for logits, factor in ((exact[1], 1), (exact[0], -1 / 3)):
            scaling["default"] *= factor
            assert rms(decode_logits(model, inputs) - logits) < 0.1 * rms(logits)
    assert launches == [2] * 8 * len(logits)
    assert reads == [None] * 8, "the first step may be a capture, in which nothing can be read"


def layer(dtype=torch.bfloat16, bias=False, **settings):
    """A wrapped layer of 64 inputs and 48 outputs, with one adapter."""
    torch.manual_seed(torch.seed() % 2**31)
    model = nn.ModuleDict({"proj": nn.Linear(64, 48, bias=bias)}).to(dtype)
    config = peft.LoraConfig(target_modules=["proj"], **{"init_lora_weights": False, **settings})
    return peft.get_peft_model(model, config).eval().base_model.model["proj"]


def change_forward(module):
    module.forward = type(module).forward.__get__(module)


OWN = {
    "dropout": (lambda: layer(lora_dropout=0.5).train(), "drops out in training mode"),
    "dora": (lambda: layer(use_dora=True), "is a variant of LoRA"),
    "bias": (lambda: layer(bias=True, lora_bias=True), "has a bias"),
    "forward": (layer, "is no adapter of LoRA's"),
    "scaling": (layer, "is scaled by a Tensor"),
    "mixed dtypes": (layer, "want torch.float32"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", OWN)
def test_what_else_peft_does_is_its_own_forward(name):
    make, why = OWN[name]
    module, kinds, x = make(), Kinds(), torch.randn(3, 64).bfloat16()
    if name == "forward":
        change_forward(module)
    elif name == "scaling":
        module.scaling["default"] = torch.tensor(2.0)
    elif name == "mixed dtypes":
        module.lora_B["default"].bfloat16()
    assert type(kinds((module,), x)) is Own
    assert any(why in reason for reason in kinds.why_own((module,), x)), kinds.why_own((module,), x)
    assert kinds((module,), x).modules == (module,)


@torch.no_grad()
@pytest.mark.parametrize(("merged", "disabled"), [(True, False), (False, True)])
def test_merged_and_disabled_adapters_are_the_base_layer_alone(merged, disabled):
    module, x = layer(), torch.randn(1, 64).bfloat16()
    if merged:
        module.merge()
    module.enable_adapters(not disabled)
    kind = Kinds()((module,), x)
    assert (type(kind), kind.modules, kind.adapters) == (Plain, (module.base_layer,), None)
    if merged:
        module.enable_adapters(False)  # PEFT takes the adapter out again at the next call
        assert type(Kinds()((module,), x)) is Own


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
def test_a_packed_gate_and_up_have_adapters_together(rows):
    module, x = layer(), torch.randn(rows, 64).bfloat16()
    gate, up = module(x).chunk(2, dim=1)
    exact_gate, exact_up = copy.deepcopy(module).double()(x.double()).chunk(2, dim=1)
    kind = Kinds()((module,), x)
    assert type(kind) is Plain
    exact = functional.silu(exact_gate) * exact_up
    assert rms(kind.gated(Normed(x), "silu") - exact) <= 2 * rms(functional.silu(gate) * up - exact)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
def test_adapters_beside_layers_that_are_called(rows):
    """Of three that share x, one without; one base layer is no plain one."""
    modules = layer(), nn.Linear(64, 30).bfloat16(), layer(r=40, lora_alpha=70)
    x = torch.randn(rows, 64).bfloat16()
    modules[2].base_layer.forward = lambda x: x[:, :48] - 1
    modules[2].base_layer.__class__ = type("Odd", (nn.Linear,), {})
    kind = Kinds()(modules, x)
    assert type(kind) is Beside
    given, theirs = copy.deepcopy(modules), [module(x) for module in modules]
    exact = torch.cat([module.double()(x.double()) for module in given], dim=1)
    error = rms(torch.cat(theirs, dim=1) - exact)
    assert 0 < rms(kind.linear(Normed(x)) - exact) <= 2 * error
    wide = torch.randn(81, 64).bfloat16()
    assert type(Kinds()(modules, wide)) is Own
    assert type(Kinds()(modules, x.float())) is Own


def test_the_base_layer_alone_is_no_adapter():
    module = nn.Linear(64, 48).bfloat16()
    kind = Kinds()((module,), torch.zeros(1, 64).bfloat16())
    assert (type(kind), kind.adapters) == (Plain, None)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
def test_adapters_of_4_bit_layers_are_in_their_launch(rows):
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.ModuleDict({"proj": bnb.nn.Linear4bit(64, 64, compute_dtype=torch.bfloat16, quant_type="nf4")})
    model["proj"].bias.data = torch.randn(64).bfloat16()
    model["proj"].to("cpu").support_avx512bf16_for_cpu = False  # where a CPU has that, weights are in another order
    model.is_loaded_in_4bit = True
    settings = peft.LoraConfig(target_modules=["proj"], init_lora_weights=False)
    module = peft.get_peft_model(model, settings).eval().base_model.model["proj"]
    x = torch.randn(rows, 64).bfloat16()
    kind = Kinds()((module,), x)
    assert type(kind) is Linear4
    assert kind.adapters is not None
    base = module.base_layer
    weight = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    a, b = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
    exact = functional.linear(x.double(), weight.double() + module.scaling["default"] * b @ a, base.bias.double())
    assert rms(module(x) - exact) > 0
    assert rms(kind.linear(Normed(x)) - exact) <= 2 * rms(module(x) - exact)
