"""Layers whose weights libraries keep in evenly spaced values of 4 bits, through our products."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn
from torch.library import Library
from weights import packed4
from weights.packed4 import QuantLinear, gptq, plain, quantised, tinygemm, unpacked_tiles, words_of

from tiny import decode_logits, left_padded, tiny

pytest.importorskip("triton")

import pkv_hf
from pkv_hf.bench import logits
from pkv_hf.bench.inputs.weights import WEIGHTS
from pkv_hf.kernels.checks.attention import rms
from pkv_hf.kernels.quantized import linear4
from pkv_hf.memory.weights import step_weight_bytes, weight_bytes
from pkv_hf.patches.projections.base import Normed
from pkv_hf.patches.projections.gptq4 import GPTQ4
from pkv_hf.patches.projections.module import Own
from pkv_hf.patches.projections.registry import Kinds, in_float32
from pkv_hf.patches.projections.torchao4 import TorchAO4
from pkv_hf.patches.reading import alike
from pkv_hf.runtime.captured.watch import Watch

GROUP = 32


@pytest.fixture
def _of_a_known_library(monkeypatch):
    """GPTQModel is not here: the file with the stand-in for its layer has its place."""
    monkeypatch.setitem(sys.modules, "gptqmodel", packed4)


def gptq4(module: nn.Linear, less: int = 1, symmetric: bool = False, group: int = GROUP) -> QuantLinear:
    values, zero, scale = quantised(module.weight.detach(), group, symmetric)
    outputs, inputs = values.shape
    made = QuantLinear(inputs, outputs, less)
    made.register_buffer("qweight", gptq(values))
    made.register_buffer("qzeros", words_of((zero - less).unflatten(1, (-1, 8))))
    made.register_buffer("scales", scale)
    made.register_buffer("g_idx", torch.arange(inputs, dtype=torch.int32) // group)
    made.register_buffer("bias", None if module.bias is None else module.bias.detach())
    return made.eval()


@pytest.fixture
def _kernels_of_gpus():
    """What torch and torchao's library of kernels have for GPUs alone, by dequantised weights."""

    def tiles(x, packed, group, pairs):
        scale, shift = (each.repeat_interleave(group, 0).T for each in pairs.unbind(2))
        return x @ ((unpacked_tiles(packed) - 8).to(x.dtype) * scale + shift).T

    def rows(x, packed, scale, shift):
        bytes_ = packed.view(torch.uint8).int()
        values = torch.stack([bytes_ & 15, bytes_ >> 4], 2).flatten(1)
        group = values.shape[1] // len(scale)
        scale, shift = (each.repeat_interleave(group, 0).T for each in (scale, shift))
        return x @ (((values ^ 8) - 8).to(x.dtype) * scale + shift).T

    of_torch, of_kernels = Library("aten", "IMPL"), Library("mslk", "FRAGMENT")
    of_torch.impl("_weight_int4pack_mm", tiles, "CPU")
    of_kernels.define("bf16i4bf16_rowwise(Tensor x, Tensor w, Tensor scale, Tensor zero) -> Tensor")
    of_kernels.impl("bf16i4bf16_rowwise", rows, "CPU")
    yield
    of_torch._destroy()
    of_kernels._destroy()


def torchao4(module: nn.Linear, layout: str = "tiles", group: int = GROUP, **settings) -> nn.Linear:
    quantization = pytest.importorskip("torchao.quantization")
    values, zero, scale = quantised(module.weight.detach(), group)
    shape, shift = tuple(values.shape), (8 - zero).to(scale.dtype) * scale
    if layout == "tiles":
        weight = quantization.Int4TilePackedTo4dTensor(*tinygemm(values, scale, shift), [1, group], shape, **settings)
    else:
        weight = quantization.Int4Tensor(plain(values - 8), scale, shift, [1, group], shape, **settings)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module.eval()


def model_of(make, dtype, biases):
    settings = {"attention_bias": biases, "mlp_bias": biases, "intermediate_size": 128, "rms_norm_eps": 0.1}
    model = tiny("llama", num_hidden_layers=1, **settings).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    for name, module in [*model.model.layers.named_modules()]:
        if type(module) is nn.Linear:
            model.model.layers.set_submodule(name, make(module))
    return model


def judged(model, lengths, monkeypatch):
    """Logits of steps by our products, which are looked for, and by the modules', beside float64."""
    wide, inputs = copy.deepcopy(model), left_padded(*lengths)
    in_float32(wide)
    assert type(wide.model.layers[0].self_attn.q_proj.weight) is nn.Parameter
    exact, theirs = decode_logits(wide.double(), inputs), decode_logits(model, inputs)
    launches = []
    for launcher in ("_linear4", "_gated4"):
        run = getattr(linear4, launcher)
        monkeypatch.setattr(
            linear4, launcher, lambda *given, run=run, by=launcher, **rest: launches.append(by) or run(*given, **rest)
        )
    with pkv_hf.patched(model, route="split"):
        ours = decode_logits(model, inputs)
        report = pkv_hf.report(model)
    assert (report.steps.static, report.not_fused) == (len(ours), "")
    assert launches.count("_linear4") >= 3 * len(ours)
    assert launches.count("_gated4") >= len(ours)
    assert report.multiplied == {"int4": 7}
    assert rms(ours - exact) <= 2 * rms(theirs - exact)


@torch.no_grad()
@pytest.mark.usefixtures("_of_a_known_library")
@pytest.mark.parametrize(
    ("less", "symmetric", "dtype", "lengths"),
    [(1, False, torch.float16, (20, 9)), (0, False, torch.bfloat16, (20,)), (1, True, torch.bfloat16, (20, 9))],
)
def test_gptq_is_as_exact_as_its_own_forward(less, symmetric, dtype, lengths, monkeypatch):
    model = model_of(lambda module: gptq4(module, less, symmetric), dtype, len(lengths) > 1)
    judged(model, lengths, monkeypatch)


@torch.no_grad()
@pytest.mark.usefixtures("_kernels_of_gpus")
@pytest.mark.parametrize(("layout", "lengths"), [("tiles", (20, 9)), ("rows", (20,))])
def test_torchao_is_as_exact_as_its_own_forward(layout, lengths, monkeypatch):
    judged(model_of(lambda module: torchao4(module, layout), torch.bfloat16, len(lengths) > 1), lengths, monkeypatch)


@torch.no_grad()
@pytest.mark.usefixtures("_of_a_known_library")
@pytest.mark.parametrize("less", [0, 1])
def test_tokens_in_float32_are_those_of_the_layers_own_forward(less):
    model, inputs = model_of(lambda module: gptq4(module, less), torch.float32, False), left_padded(20, 9)
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    with pkv_hf.patched(model, route="split"):
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), expected)
        assert "products with 4 bits are of fp16 and bf16" in str(pkv_hf.report(model).not_multiplied)
    with pkv_hf.patched(model, kv_dtype="fp8"):  # which asks where attention is, and that has buffers alone
        assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == 22


def layer(inputs=128, outputs=48, bias=True, dtype=torch.bfloat16):
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype)


def changed(module, **tensors):
    for name, value in tensors.items():
        setattr(module, name, value)
    return module


def of_awq(module):
    """AWQ's words are of 8 outputs."""
    return changed(module, qweight=torch.zeros(module.in_features, module.out_features // 8, dtype=torch.int32))


def own_forward(module):
    module.forward = lambda x: type(module).forward(module, x) + 1
    return module


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: changed(gptq4(layer()), bits=8), "has weights of 8 bits"),
        (lambda: of_awq(gptq4(layer())), "not in words of 8 inputs"),
        (lambda: changed(gptq4(layer()), g_idx=torch.arange(127, -1, -1).int() // GROUP), "desc_act"),
        (lambda: own_forward(gptq4(layer())), "has no packed weights of GPTQ"),
        (lambda: changed(gptq4(layer()), less=2), "multiplies by something else than its weight is stored as"),
        (lambda: changed(gptq4(layer()), qzeros=torch.zeros(3, 6).int()), "stored otherwise: zero is torch.int32"),
        (lambda: changed(gptq4(layer()), scales=torch.zeros(4, 48).char()), "stored otherwise: scale is torch.int8"),
        (lambda: gptq4(layer(), group=16), "of 128 inputs has blocks of 16, no multiple of 32"),
        (lambda: changed(gptq4(layer()), bias=torch.zeros(48)), "a bias of torch.float32"),
        (lambda: changed(gptq4(layer()), scales=gptq4(layer()).scales.to("meta")), "scales elsewhere"),
        (lambda: changed(gptq4(layer()), g_idx=torch.zeros(0).int()), "does not run by itself: RuntimeError"),
    ],
)  # fmt: skip
def test_what_is_not_taken_runs_its_own_forward(made, reason):
    modules, kinds, x = (made(),), Kinds(), torch.zeros(1, 128, dtype=torch.bfloat16)
    assert type(kinds(modules, x)) is Own
    assert any(reason in why for why in kinds.why_own(modules, x)), kinds.why_own(modules, x)


@pytest.mark.usefixtures("_kernels_of_gpus")
def test_tensors_of_torchao_that_do_more_run_their_own_forward():
    quantization, x = pytest.importorskip("torchao.quantization"), torch.zeros(1, 128, dtype=torch.bfloat16)
    held = torchao4(layer()).weight
    others = {
        "its inputs by torchao": torchao4(layer(), act_pre_scale=torch.ones(128)),
        "quantises or scales": torchao4(layer(), "rows", activation_dtype=torch.float8_e4m3fn),
        "in an order that no kernel": changed(
            layer(), weight=nn.Parameter(
                quantization.Int4PlainInt32Tensor(held.qdata, held.scale_and_zero, held.qdata, [1, 32], (48, 128)),
                requires_grad=False,
            )),
    }  # fmt: skip
    for reason, module in others.items():
        assert any(reason in why for why in Kinds().why_own((module,), x)), reason
    for layout in ("tiles", "rows"):
        assert type(Kinds()((torchao4(layer(), layout),), x)) is TorchAO4


@torch.no_grad()
@pytest.mark.usefixtures("_kernels_of_gpus")
def test_adapters_over_torchao_are_part_of_the_product():
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"proj": torchao4(layer())})
    settings = peft.LoraConfig(target_modules=["proj"], r=8, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, settings, autocast_adapter_dtype=False).eval()
    proj, x = wrapped.base_model.model["proj"], torch.randn(3, 128, dtype=torch.bfloat16)
    kind = Kinds()((proj,), x)
    assert type(kind) is TorchAO4
    wide = nn.Sequential(copy.deepcopy(proj.base_layer))
    in_float32(wide)
    a, b = (getattr(proj, name)["default"].weight.double() for name in ("lora_A", "lora_B"))
    exact = wide.double()(x.double()) + proj.scaling["default"] * x.double() @ a.T @ b.T
    torch.testing.assert_close(kind.linear(Normed(x)).double(), exact, atol=0.02, rtol=0.02)


def test_the_bench_has_torchao_quantise_in_tiles():
    pytest.importorskip("torchao.quantization")
    config = WEIGHTS["int4"](torch.bfloat16).quant_type
    assert (config.int4_packing_format, config.group_size) == ("tile_packed_to_4d", 128)
    with pytest.raises(ValueError, match=r"int4 with torch\.float16"):
        WEIGHTS["int4"](torch.float16)
    assert not logits.can_be_judged(torchao4(layer()), torch.ones(1, 1))


def test_tensors_of_torchao_without_kernels_run_their_own_forward():
    module = torchao4(layer())  # torch has none for a CPU
    *_, why = Kinds().why_own((module,), torch.zeros(1, 128, dtype=torch.bfloat16))
    assert why.startswith("a Linear does not run by itself: ")


def test_which_kind_takes_layers_side_by_side():
    kinds, x = Kinds(), torch.randn(2, 128, dtype=torch.bfloat16)
    layers = gptq4(layer()), gptq4(layer(), symmetric=True)
    for modules, kind, scaled in (
        (layers[:1], GPTQ4, "zeros from 1"), (layers[1:], GPTQ4, "groups"), (layers, GPTQ4, "zeros from 1"),
        ((layers[0], gptq4(layer(bias=False))), Own, ""), ((layers[0], gptq4(layer(), less=0)), Own, ""),
        ((layers[0], gptq4(layer(), group=64)), Own, ""), ((layers[0], layer()), Own, ""),
    ):  # fmt: skip
        found = kinds(modules, x)
        assert type(found) is kind
        assert [weight.scaled for weight in getattr(found, "weights", ())] == [scaled] * len(modules) * bool(scaled)
    assert type(kinds(layers, x.float())) is Own
    assert type(kinds(layers, x.expand(41, 2, 128).flatten(0, 1))) is Own


def test_layers_whose_modules_know_their_names_arealike():
    layers = [nn.ModuleDict({"proj": nn.ModuleDict({"q": gptq4(layer())})}) for _ in range(3)]
    for i, each in enumerate(layers):
        each["proj"]["q"].name = f"model.layers.{i}.proj.q"
    assert alike(layers[0]) == alike(layers[1])
    layers[1]["proj"]["q"].mode = "fast"
    layers[2]["proj"]["q"].name = "fast"
    assert len({alike(each) for each in layers}) == 3


@torch.no_grad()
def test_one_layer_of_gate_and_up():
    module, x = gptq4(layer(outputs=96)), torch.randn(2, 128, dtype=torch.bfloat16)
    gate, up = module(x).chunk(2, dim=-1)
    found = Kinds()((module,), x).gated(Normed(x), "silu")
    torch.testing.assert_close(found, nn.functional.silu(gate) * up, atol=0.02, rtol=0.02)


def test_changes_are_noticed_and_a_layer_is_judged_anew():
    module, x = gptq4(layer()), torch.zeros(1, 128, dtype=torch.bfloat16)
    watch = Watch(module, tiny("llama").config)
    assert type(Kinds()((module,), x)) is GPTQ4
    assert watch.unchanged()
    module.qzeros = module.qzeros - 0x11111111
    assert not watch.unchanged()
    assert type(Kinds()((module,), x)) is GPTQ4
    module.less = 3
    module.qzeros = module.qzeros.clone()
    assert type(Kinds()((module,), x)) is Own


def test_bytes_of_buffers_count():
    model = model_of(gptq4, torch.bfloat16, False)
    weights = sum(module.in_features * module.out_features for module in model.modules() if hasattr(module, "qweight"))
    stored = weights * (4 + (16 + 4) / GROUP) / 8
    rest = sum(parameter.nbytes for parameter in model.parameters())
    assert weight_bytes(model) == stored + rest
    assert weight_bytes(model) - step_weight_bytes(model) == 2 * 128 * 64
