"""Layers whose weights are of 8 bits with scales, through our products, beside their own and float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.integrations import finegrained_fp8

pytest.importorskip("triton")

import pkv_hf
from pkv_hf.kernels import launch, linear
from pkv_hf.kernels.checks.attention import rms
from pkv_hf.kernels.products.scales import BLOCK, dequantized
from pkv_hf.patches.projections.base import Normed
from pkv_hf.patches.projections.bnb8 import Linear8
from pkv_hf.patches.projections.fp8 import FP8
from pkv_hf.patches.projections.module import Own
from pkv_hf.patches.projections.registry import Kinds, in_float32
from pkv_hf.patches.projections.torchao8 import TorchAO8
from pkv_hf.runtime.captured.watch import Watch
from tiny import decode_logits, left_padded, tiny


def dense(x, weight, scales, block_size=None, bias=None, *_, **__):
    """fp8's product where there are no kernels from a hub: by the weight as x's dtype has it."""
    return nn.functional.linear(x, dequantized(weight, scales, 1.0, torch.float32).to(x.dtype), bias)


@pytest.fixture(autouse=True)
def _without_a_hub(monkeypatch):
    monkeypatch.setattr(finegrained_fp8, "fp8_linear", dense)


def fp8(module: nn.Linear, **settings) -> nn.Module:
    outputs, inputs = module.weight.shape
    settings = {"block_size": (BLOCK, BLOCK), "has_bias": module.bias is not None, **settings}
    made = finegrained_fp8.FP8Linear(inputs, outputs, **settings)
    scales = torch.rand(-(-outputs // BLOCK), -(-inputs // BLOCK)).mul_(0.01).add_(0.001)
    values = module.weight.float() / dequantized(torch.ones(outputs, inputs), scales, 1.0, torch.float32)
    made.weight = nn.Parameter(values.clamp(-448, 448).to(torch.float8_e4m3fn), requires_grad=False)
    if made.weight_scale_inv.ndim:
        made.weight_scale_inv = nn.Parameter(scales, requires_grad=False)
    made.bias = module.bias
    return made.eval()


def bnb8(module: nn.Linear, **settings) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    outputs, inputs = module.weight.shape
    settings = {"bias": module.bias is not None, "has_fp16_weights": False, **settings}
    made = bnb.nn.Linear8bitLt(inputs, outputs, **settings)
    made.load_state_dict(module.state_dict())
    return made.to("cpu", module.weight.dtype).eval()


def torchao8(module: nn.Linear, **settings) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(module, quantization.Int8WeightOnlyConfig(**settings))
    return module.eval()


KINDS = {
    "bitsandbytes, then fp8": (bnb8, fp8, torch.bfloat16, (20, 9)),
    "torchao": (torchao8, torchao8, torch.float16, (20,)),
}
"""What attention's layers become and what those of the MLP, in which dtype, and the lengths of prompts."""


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_8_bits_are_as_exact_as_their_own_forward(name, monkeypatch):
    *quantise, dtype, lengths = KINDS[name]
    biases = len(lengths) > 1
    settings = {"attention_bias": biases, "mlp_bias": biases, "intermediate_size": 128, "rms_norm_eps": 0.1}
    model = tiny("llama", num_hidden_layers=1, **settings).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    quantised, inputs = copy.deepcopy(model), left_padded(*lengths)
    of_attention, of_mlp = [], []
    for place, made, by in (("self_attn", of_attention, quantise[0]), ("mlp", of_mlp, quantise[1])):
        inner = quantised.model.layers[0].get_submodule(place)
        for child, module in [*inner.named_children()]:
            if type(module) is nn.Linear:
                made.append(by(module))
                setattr(inner, child, made[-1])
    wide = copy.deepcopy(quantised)
    in_float32(wide)
    assert {type(module.q_proj) for module in wide.modules() if hasattr(module, "q_proj")} == {nn.Linear}
    exact = decode_logits(wide.double(), inputs)
    theirs = decode_logits(quantised, inputs)
    launches = []
    for launcher in ("_linear", "_gated"):
        run = getattr(linear, launcher)
        monkeypatch.setattr(
            linear, launcher,
            lambda kind, grid, tensors, *given, run=run, by=launcher, **rest: (
                launches.append((by, tensors[1].dtype)), run(kind, grid, tensors, *given, **rest)
            ),
        )  # fmt: skip
    with pkv_hf.patched(quantised, route="split"):
        ours = decode_logits(quantised, inputs)
        report = pkv_hf.report(quantised)
    assert (report.steps.static, report.not_fused) == (len(ours), "")
    held = [getattr(of[0].weight, "qdata", of[0].weight).dtype for of in (of_attention, of_mlp)]
    assert launches.count(("_linear", held[0])) >= 2 * len(ours)
    assert launches.count(("_linear", held[1])) >= len(ours)
    assert launches.count(("_gated", held[1])) >= len(ours)
    assert rms(ours - exact) <= 2 * rms(theirs - exact)


def layer(inputs=160, outputs=48, bias=True, dtype=torch.bfloat16):
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype)


def own_forward(module):
    module.forward = lambda x: type(module).forward(module, x) + 1
    return module


def with_float32_bias(module):
    module.bias = nn.Parameter(module.bias.float())
    return module


def without_scales(module):
    module.weight.SCB = None
    return module


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: bnb8(layer(), threshold=6.0), "beyond a threshold of 6 apart"),
        (lambda: bnb8(layer(), has_fp16_weights=True), "keeps its weight as torch.float32"),
        (lambda: own_forward(bnb8(layer())), "is no 8-bit layer"),
        (lambda: without_scales(bnb8(layer())), "a weight that is not quantised"),
        (lambda: with_float32_bias(bnb8(layer())), "a bias of torch.float32, hidden states are torch.bfloat16"),
        (lambda: fp8(layer(), block_size=None), "scales of blocks of None"),
        (lambda: fp8(layer(), activation_scheme="static"), "quantises its inputs by a scale"),
        (lambda: own_forward(fp8(layer())), "is no layer of transformers' fine-grained fp8"),
    ],
)
def test_what_is_not_taken_runs_its_own_forward(made, reason):
    modules, kinds, x = (made(),), Kinds(), torch.zeros(1, 160, dtype=torch.bfloat16)
    assert type(kinds(modules, x)) is Own
    assert any(reason in why for why in kinds.why_own(modules, x)), kinds.why_own(modules, x)


def test_tensors_of_torchao_that_do_more_run_their_own_forward():
    quantization = pytest.importorskip("torchao.quantization")
    x, made = torch.zeros(1, 160, dtype=torch.bfloat16), layer()
    quantization.quantize_(made, quantization.Int8DynamicActivationInt8WeightConfig())
    assert any("its inputs by torchao" in why for why in Kinds().why_own((made,), x))
    of_tensor = torchao8(layer(), granularity=quantization.PerTensor())
    assert any("not of rows" in why for why in Kinds().why_own((of_tensor,), x))
    assert type(Kinds()((torchao8(layer()),), x)) is TorchAO8


@pytest.mark.parametrize(("quantise", "kind"), [(bnb8, Linear8), (fp8, FP8)])
def test_which_kind_takes_a_layer(quantise, kind):
    kinds, x, eight = Kinds(), torch.randn(2, 160, dtype=torch.bfloat16), quantise(layer())
    for modules, taken in (((eight,), True), ((eight, layer()), False), ((eight, quantise(layer(bias=False))), False)):
        assert type(kinds(modules, x)) is (kind if taken else Own)
    for other in (x.float(), x.expand(41, 2, 160).flatten(0, 1)):
        assert type(kinds((eight,), other)) is Own


@pytest.mark.parametrize("quantise", [bnb8, fp8])
@torch.no_grad()
def test_one_layer_of_gate_and_up(quantise):
    module, x = quantise(layer(outputs=96)), torch.randn(2, 160, dtype=torch.bfloat16)
    wide = nn.Sequential(copy.deepcopy(module))
    in_float32(wide)
    gate, up = wide.double()(x.double()).chunk(2, dim=-1)
    found = Kinds()((module,), x).gated(Normed(x), "silu")
    torch.testing.assert_close(found.double(), nn.functional.silu(gate) * up, atol=0.02, rtol=0.02)


def test_gpus_that_convert_no_fp8_multiply_by_the_layers_own_forward(monkeypatch):
    monkeypatch.setattr(launch, "capability", lambda device: (8, 6))
    x = torch.randn(2, 160, dtype=torch.bfloat16)
    assert type(Kinds()((bnb8(layer()),), x)) is Linear8
    modules = (fp8(layer()),)
    assert any("does not convert" in why for why in Kinds().why_own(modules, x))
    kind = FP8.read(modules)
    with pytest.raises(ValueError, match="this GPU does not convert"):
        kind.linear(Normed(x))


@torch.no_grad()
def test_adapters_are_part_of_the_product():
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"proj": bnb8(layer(64, 48))})
    settings = peft.LoraConfig(target_modules=["proj"], r=8, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, settings, autocast_adapter_dtype=False).eval()
    proj = wrapped.base_model.model["proj"]
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    kind = Kinds()((proj,), x)
    assert type(kind) is Linear8
    wide = nn.Sequential(copy.deepcopy(proj.base_layer))
    in_float32(wide)
    a, b = (getattr(proj, name)["default"].weight.double() for name in ("lora_A", "lora_B"))
    exact = wide.double()(x.double()) + proj.scaling["default"] * x.double() @ a.T @ b.T
    torch.testing.assert_close(kind.linear(Normed(x)).double(), exact, atol=0.02, rtol=0.02)


@torch.no_grad()
def test_changes_of_scales_are_noticed_and_the_first_call_is_none():
    module = bnb8(layer())
    watch = Watch(module, tiny("llama").config)
    module(torch.zeros(1, 160, dtype=torch.bfloat16))
    assert module.weight.SCB is None
    assert watch.unchanged()
    held = module.state.SCB
    module.state.SCB = held.clone()
    assert not watch.unchanged()
    module.state.SCB = held
    module.state.threshold = 6.0
    assert not watch.unchanged()
