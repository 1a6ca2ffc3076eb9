"""Steps of linear-attention modules by our kernels: what is read from modules, and what is believed."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("triton")

from families.models import HYBRIDS, family_model
from pkv_hf.cache.linear import LinearLayer
from pkv_hf.patches.mixer_check import STEPS, _cache, _run, agrees
from pkv_hf.patches.mixers import DeltaNet, Mamba2, Mixer, ShortConvolution, read

pytestmark = pytest.mark.contract

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {
    "qwen3.5": DeltaNet, "qwen3-next": DeltaNet, "olmo-hybrid": DeltaNet, "granite-4": Mamba2, "nemotron-h": Mamba2,
    "bamba": Mamba2, "falcon-h1": Mamba2, "zamba2": Mamba2, "lfm2": ShortConvolution, "lfm2-moe": ShortConvolution,
}  # fmt: skip
OTHERS = {"jamba", "zaya", "recurrent-gemma"}
"""Which keep states by other means."""


def drawn(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with fresh random weights, biases and norms."""
    module = copy.deepcopy(module).to(DEVICE, dtype)
    for parameter in module.parameters():
        scale = 0.5 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        parameter.data = torch.randn_like(parameter) * scale + (parameter.ndim < 2)
    return module


@functools.cache
def mixers(name: str) -> list[tuple[int, nn.Module]]:
    """The modules of a family's layers that can be read, and their layers."""
    layers = family_model(name).get_decoder().layers
    return [(i, part) for i, layer in enumerate(layers) for part in layer.modules() if read(part) is not None]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in KINDS]
    + [("qwen3-next", torch.bfloat16), ("olmo-hybrid", torch.float16), ("bamba", torch.bfloat16)]
    + [("lfm2", torch.float16)],
)
def test_modules_are_read_and_believed(name, dtype):
    found = mixers(name)
    kinds = {type(read(module)) for _, module in found}
    assert kinds == {KINDS[name]}
    assert len({read(module) for _, module in found}) == 1  # whatever their weights are
    layer_idx, module = found[-1]
    module = drawn(module, dtype)
    assert agrees(read(module), module, layer_idx)


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_other_modules_are_not_read(name):
    assert not mixers(name)


def test_every_hybrid_family_is_looked_at():
    assert set(HYBRIDS) - set(KINDS) - OTHERS == {"qwen3.5-moe", "lfm3"}  # whose modules are those of others


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3-next", "olmo-hybrid", "falcon-h1", "lfm2"])
def test_steps_of_several_rows_are_those_of_the_module(name):
    layer_idx, module = mixers(name)[0]
    module = drawn(module, torch.float32)
    caches = [_cache(layer_idx) for _ in range(2)]
    width = next(each.shape[1] for each in module.parameters() if each.ndim == 2)
    prompt = torch.randn(3, 5, width, device=DEVICE)
    expected = [_run(module, prompt, cache) for cache in caches]
    layer: LinearLayer = caches[0].layers[layer_idx]
    places = [tensor.data_ptr() for tensor in layer.tensors]
    for _ in range(3):
        x = torch.randn(3, 1, width, device=DEVICE)
        ours, expected = read(module).step(x, layer), _run(module, x, caches[1])
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    for held, other in zip(layer.tensors, caches[1].layers[layer_idx].tensors, strict=True):
        torch.testing.assert_close(held, other, atol=1e-5, rtol=1e-5)
    assert [tensor.data_ptr() for tensor in layer.tensors] == places


def changed(module: nn.Module, after=lambda module, out: out, **while_it_runs: float) -> None:
    """Has a module of a class of its own, whose forward is another; parameters are so much more while it runs."""
    plain = type(module).forward

    @functools.wraps(plain)
    def forward(self, *args, **kwargs):
        kept = {name: getattr(self, name).data for name in while_it_runs}
        for name, more in while_it_runs.items():
            getattr(self, name).data = kept[name] + more
        try:
            return after(self, plain(self, *args, **kwargs))
        finally:
            for name, data in kept.items():
                getattr(self, name).data = data

    module.__class__ = type("Changed", (type(module),), {"forward": forward})


def a_bias(module, out):
    return out + functional.one_hot(torch.tensor(3, device=out.device), out.shape[-1]) / 4


CHANGES = {
    "a norm's offset": lambda module: changed(module.norm, weight=1.0),
    "an epsilon": lambda module: changed(module.norm, lambda norm, out: out * (1 - 2e-2)),
    "a multiplier": lambda module: changed(module, lambda module, out: out * 1.02),
    "a bias": lambda module: changed(module, a_bias),
    "a decay": lambda module: changed(module, A_log=0.1),
    "a time step": lambda module: changed(module, dt_bias=0.1),
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "change", "dtype"),
    [(name, change, torch.float32) for name in ("qwen3.5", "bamba") for change in CHANGES]
    + [("qwen3.5", "a norm's offset", torch.bfloat16), ("lfm2", "a multiplier", torch.float16)],
)
def test_modules_that_do_something_else_are_found_out(name, change, dtype):
    layer_idx, module = mixers(name)[0]
    module = drawn(module, dtype)
    CHANGES[change](module)
    assert not agrees(read(module), module, layer_idx)


class Forgetful(ShortConvolution):
    """Returns what it should, and loses the states at its last token."""

    def step(self, x, layer):
        out = super().step(x, layer)
        layer.steps = getattr(layer, "steps", 0) + 1
        if layer.steps == STEPS:
            layer.conv_states[0].zero_()
        return out


def test_states_that_are_left_are_compared_too():
    layer_idx, module = mixers("lfm2")[0]
    assert agrees(ShortConvolution(module), module, layer_idx)
    assert not agrees(Forgetful(module), module, layer_idx)


def test_a_forward_of_the_caller_s_own_is_not_read():
    module = copy.deepcopy(mixers("lfm2")[0][1])
    module.out_proj.forward = lambda x: x
    assert read(module) is None


REMADE = {
    "activation": lambda module: setattr(module, "activation", "gelu"),
    "one part more": lambda module: module.register_module("other", nn.Identity()),
    "one weight more": lambda module: module.register_parameter("scale", nn.Parameter(torch.ones(1))),
    "one buffer more": lambda module: module.register_buffer("scale", torch.ones(1)),
    "a dilated convolution": lambda module: setattr(module.conv1d, "dilation", (2,)),
    "a norm with a bias": lambda module: module.norm.register_parameter("bias", nn.Parameter(torch.ones(1))),
    "a number that is none": lambda module: setattr(module, NUMBERS[type(read(module))], 2.0),
}
NUMBERS: dict[type[Mixer], str] = {DeltaNet: "num_k_heads", Mamba2: "n_groups"}


@pytest.mark.parametrize("name", ["qwen3.5", "bamba"])
@pytest.mark.parametrize("remade", REMADE)
def test_modules_of_other_parts_are_not_read(remade, name):
    module = copy.deepcopy(mixers(name)[0][1])
    REMADE[remade](module)
    assert read(module) is None
