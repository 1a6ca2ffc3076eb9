"""MLPs beside experts: what is read of them, and that their products are ours."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from served import SERVED, build, generate

import pkv_hf
from pkv_hf.compat import decoder_of
from pkv_hf.kernels.checks.attention import rms
from pkv_hf.patches.experts.beside import BelievedMLPs, mlps_of
from tiny import left_padded

ONE = {"num_hidden_layers": 1}


def shared(dtype: torch.dtype = torch.bfloat16):
    """A patched model with a shared expert."""
    config, model, settings = SERVED["qwen2-moe"]
    return pkv_hf.patch(build(config, model, {**settings, **ONE}).to(dtype), route="split")


def drawn_adapters(model):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["shared_expert.up_proj"], r=4)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    return adapted


@torch.no_grad()
@pytest.mark.parametrize("adapters", [False, True], ids=["plain", "adapters"])
@pytest.mark.parametrize("rows", [1, 5])
def test_shared_experts_err_no_more_than_twice_their_own_code(rows, adapters):
    model = shared()
    decoder = decoder_of(model)
    if adapters:
        drawn_adapters(model)
    ((module, ours),) = BelievedMLPs()(decoder).items()
    assert [*mlps_of(decoder)] == [module]
    assert (ours.mlp.gate, ours.mlp.up, ours.mlp.down) == (module.gate_proj, module.up_proj, module.down_proj)
    x = torch.randn(rows, 1, 64).bfloat16()
    own = module(x)
    exact = copy.deepcopy(module).double()(x.double())
    assert ours(x).shape == own.shape
    assert rms(ours(x) - exact) <= 2 * rms(own - exact)


def test_the_report_counts_their_linear_layers():
    model = shared()
    generate(model, left_padded(9, 5), 3)
    report = pkv_hf.report(model)
    assert report.multiplied == {"bfloat16": 7}  # q, k, v and output; gate, up and down


class Clamped(nn.Module):
    def forward(self, x):
        return nn.functional.silu(x.clamp(max=20))


@torch.no_grad()
@pytest.mark.parametrize("activation", [nn.Hardtanh(), Clamped()], ids=lambda each: type(each).__name__)
def test_other_modules_run_as_they_are(activation):
    model = shared(torch.float32)
    (module,) = mlps_of(decoder_of(model))
    assert len(BelievedMLPs()(decoder_of(model))) == 1
    module.act_fn = activation
    assert BelievedMLPs()(decoder_of(model)) == {}


@torch.no_grad()
def test_products_that_err_are_not_believed(monkeypatch):
    from pkv_hf.patches.experts.beside import Beside

    model, plain = shared(torch.float32), Beside.__call__
    monkeypatch.setattr(Beside, "__call__", lambda self, x: plain(self, x) + 1e-3)
    assert BelievedMLPs()(decoder_of(model)) == {}
