"""Layers whose weights bitsandbytes keeps in 4 bits, through our products, beside its own and float64."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import BitsAndBytesConfig

pytest.importorskip("triton")
pytest.importorskip("bitsandbytes")

import bitsandbytes as bnb

import pkv_hf
from pkv_hf.kernels.checks.attention import rms
from pkv_hf.kernels.quantized import linear4
from pkv_hf.patches import check
from pkv_hf.patches.projections.base import Normed
from pkv_hf.patches.projections.bnb4 import Linear4
from pkv_hf.patches.projections.module import Own
from pkv_hf.patches.projections.plain import Plain
from pkv_hf.patches.projections.registry import Kinds
from pkv_hf.runtime.captured.watch import Watch
from tiny import decode_logits, left_padded, tiny

QUANTISED = {
    "nf4": ("nf4", False, torch.bfloat16, (20,), False),
    "nf4, nested": ("nf4", True, torch.bfloat16, (20, 9), True),
    "fp4": ("fp4", False, torch.float16, (20, 9, 3), False),
    "fp4, nested": ("fp4", True, torch.bfloat16, (20,), True),
}


def in_4bit(model, quant_type: str, nested: bool):
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=model.dtype,
    )
    quantised = type(model).from_pretrained(
        None, config=copy.deepcopy(model.config), state_dict=model.state_dict(), dtype=model.dtype, device_map="cpu",
        quantization_config=settings,
    ).eval()  # fmt: skip
    for module in quantised.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # where a CPU has that, weights are stored in another order
    return quantised


def dequantised(model, quantised):
    """A float64 model whose linear layers are what the quantised ones stand for."""
    exact = copy.deepcopy(model).double()
    for name, module in quantised.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = copy.copy(module.weight.quant_state)
            state.dtype = torch.float32
            weight = bnb.functional.dequantize_4bit(module.weight.data, state)
            exact.get_submodule(name).weight.data = weight.double()
    return exact


@torch.no_grad()
@pytest.mark.parametrize("name", QUANTISED)
def test_4_bits_are_as_exact_as_their_own_forward(name, monkeypatch):
    quant_type, nested, dtype, lengths, biases = QUANTISED[name]
    settings = {"attention_bias": biases, "mlp_bias": biases, "intermediate_size": 128, "rms_norm_eps": 0.1}
    model = tiny("llama", num_hidden_layers=1, **settings).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter)
    quantised, inputs = in_4bit(model, quant_type, nested), left_padded(*lengths)
    exact = decode_logits(dequantised(model, quantised), inputs)
    theirs = decode_logits(quantised, inputs)
    launches = []
    for launcher in ("_linear4", "_gated4"):
        run = getattr(linear4, launcher)
        monkeypatch.setattr(
            linear4, launcher, lambda *given, run=run, by=launcher, **rest: launches.append(by) or run(*given, **rest)
        )
    with pkv_hf.patched(quantised, route="split"):
        ours = decode_logits(quantised, inputs)
        report = pkv_hf.report(quantised)
        assert (report.steps.static, report.not_fused) == (len(ours), "")
        assert launches.count("_linear4") >= 3 * len(ours)
        assert launches.count("_gated4") >= len(ours)
    assert rms(ours - exact) <= 2 * rms(theirs - exact)


def layer(inputs=128, outputs=48, quant_type="nf4", compute_dtype=torch.bfloat16, bias=False, **settings):
    module = bnb.nn.Linear4bit(
        inputs, outputs, bias=bias, compute_dtype=compute_dtype, quant_type=quant_type, **settings
    ).to(torch.bfloat16)
    return module.to("cpu").eval()


def offloaded(module):
    module.weight.quant_state.absmax = module.weight.quant_state.absmax.to("meta")
    return module


def own_forward(module):
    module.forward = lambda x: bnb.nn.Linear4bit.forward(module, x) + 1
    return module


def in_order_of_cpus(module):
    module.weight.quant_state.packing_format_for_cpu = True
    return module


def inside_a_word(module):
    held = torch.empty(module.weight.numel() + 1, dtype=torch.uint8)[1:]
    module.weight.data = held.copy_(module.weight.data.flatten()).view_as(module.weight)
    return module


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: layer(compute_dtype=torch.float32), "computes in torch.float32, hidden states are torch.bfloat16"),
        (lambda: layer(quant_storage=torch.bfloat16), "stores its weight as torch.bfloat16"),
        (lambda: layer(inputs=96), "of 96 inputs has blocks of 64"),
        (lambda: offloaded(layer()), "scales elsewhere than its weight"),
        (lambda: own_forward(layer()), "is no 4-bit layer"),
        (lambda: in_order_of_cpus(layer()), "in another order"),
        (lambda: inside_a_word(layer()), "begins inside a word"),
    ],
)
def test_what_is_not_taken_runs_its_own_forward(made, reason):
    modules, kinds, x = (made(),), Kinds(), torch.zeros(1, 128, dtype=torch.bfloat16)
    assert type(kinds(modules, x)) is Own
    assert any(reason in why for why in kinds.why_own(modules, x)), kinds.why_own(modules, x)


@torch.no_grad()
def test_a_report_says_what_multiplied_and_why_modules_did(monkeypatch):
    monkeypatch.setattr(check, "_disagrees", lambda *_: "")  # which takes long
    peft = pytest.importorskip("peft")
    model = in_4bit(tiny("llama", num_hidden_layers=2, intermediate_size=128).bfloat16(), "nf4", False)
    model.model.layers[0].self_attn.q_proj.compute_dtype = torch.float32  # with k and v beside it
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(128, 64, bias=False).bfloat16()
    model.model.layers[1].self_attn.o_proj = type("Odd", (torch.nn.Linear,), {})(64, 64, bias=False).bfloat16()
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"])).eval().get_base_model()
    with pkv_hf.patched(model, route="split"):
        before = pkv_hf.report(model)
        assert (before.multiplied, before.not_multiplied, "weights   " in str(before)) == ({}, {}, False)
        decode_logits(model, left_padded(7), 1)
        report = pkv_hf.report(model)
        assert report.multiplied == {"NF4": 3 + 2, "NF4 with adapters": 2 * 2, "bfloat16": 1}
        mixed, other = report.not_multiplied
        assert report.not_multiplied == {mixed: 3, other: 1}
        assert mixed == "a Linear4bit computes in torch.float32, hidden states are torch.bfloat16"
        assert other.startswith("a Odd is no ")
        (line,) = [line for line in str(report).splitlines() if line.startswith("weights   ")]
        assert "5 linear layers: NF4; " in line
        assert f"; 3 by their own forward: {mixed}; " in line


def test_which_kind_takes_a_layer():
    kinds, x = Kinds(), torch.randn(2, 128, dtype=torch.bfloat16)
    plain, four, other = torch.nn.Linear(128, 48, dtype=torch.bfloat16), layer(), layer(quant_type="fp4")
    for modules, kind in (((plain,), Plain), ((four,), Linear4), ((four, plain), Own), ((four, other, four), Own)):
        assert type(kinds(modules, x)) is kind
        assert bool(kinds.why_own(modules, x)) == (kind is Own)
    assert type(kinds((four,), x.float())) is Own
    assert type(kinds((four,), x.expand(41, 2, 128).flatten(0, 1))) is Own


@torch.no_grad()
def test_one_layer_of_gate_and_up():
    module, x = layer(outputs=96, bias=True), torch.randn(2, 128, dtype=torch.bfloat16)
    torch.nn.init.normal_(module.bias)
    gate, up = module(x).chunk(2, dim=-1)
    found = Kinds()((module,), x).gated(Normed(x), "silu")
    torch.testing.assert_close(found, torch.nn.functional.silu(gate) * up, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("change", ["absmax", "code", "compute_dtype", "nested"])
def test_changes_of_scales_are_noticed(change, nested):
    module = layer(compress_statistics=nested)
    watch = Watch(module, tiny("llama").config)
    assert watch.unchanged()
    state = module.weight.quant_state
    if change == "compute_dtype":
        module.compute_dtype = torch.float16
    elif change == "nested":
        if not nested:
            pytest.skip("no second scales")
        state.state2.absmax = state.state2.absmax.clone()
    else:
        setattr(state, change, getattr(state, change).clone())
    assert not watch.unchanged()
