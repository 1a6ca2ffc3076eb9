"""What is read of routers, and what is believed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from served import SERVED, build, generate

import pkv_hf
from pkv_hf.compat import decoder_of
from pkv_hf.kernels.experts import routing
from pkv_hf.kernels.experts.reference import Routing
from pkv_hf.patches.experts import routers as reading
from pkv_hf.patches.experts.routers import GIVEN, BelievedRouters, _taken, routed, routers_of
from pkv_hf.replaced import REPLACED
from tiny import left_padded

pytestmark = pytest.mark.contract

MANY = {"num_hidden_layers": 1, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 16}
GROUPS = {
    "num_hidden_layers": 1, "head_dim": 16, "n_routed_experts": 32, "num_experts_per_tok": 4, "n_group": 8,
    "topk_group": 3, "moe_intermediate_size": 16, "first_k_dense_replace": 0, "routed_scaling_factor": 2.5,
}  # fmt: skip
ROUTERS: dict[str, tuple[tuple[str, str, dict], Routing, str]] = {
    "qwen3": (
        ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**MANY, "norm_topk_prob": True, "head_dim": 16}),
        Routing(8, "softmax", False, True), "",
    ),
    "qwen2": (
        (*SERVED["qwen2-moe"][:2], {**MANY, "shared_expert_intermediate_size": 16, "norm_topk_prob": False}),
        Routing(8, "softmax", False, False), "",
    ),
    "gpt-oss": (
        (*SERVED["gpt-oss"][:2], {"head_dim": 16, "num_hidden_layers": 1, "num_local_experts": 32}),
        Routing(4, "softmax", False, True), "",
    ),
    "glm-4.5": (
        ("Glm4MoeConfig", "Glm4MoeForCausalLM", GROUPS),
        Routing(4, "sigmoid", True, True, 2.5, 8, 3), "e_score_correction_bias",
    ),
    "minimax-m2": (
        ("MiniMaxM2Config", "MiniMaxM2ForCausalLM",
         {"num_hidden_layers": 1, "head_dim": 16, "num_local_experts": 24, "num_experts_per_tok": 3}),
        Routing(3, "sigmoid", True, True), GIVEN,
    ),
    "ernie-4.5": (
        ("Ernie4_5_MoeConfig", "Ernie4_5_MoeForCausalLM",
         {"num_hidden_layers": 1, "moe_num_experts": 40, "moe_k": 6, "moe_intermediate_size": 16,
          "moe_layer_start_index": 0}),
        Routing(6, "softmax", True, True), "moe_statics.e_score_correction_bias",
    ),
}  # fmt: skip


def decoder_with(name: str, dtype: torch.dtype):
    """The decoder of a patched model, whose routers can be asked for their own forward."""
    return decoder_of(pkv_hf.patch(build(*ROUTERS[name][0]).to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROUTERS)
def test_routers_are_read_and_believed(name, dtype):
    _, of, correction = ROUTERS[name]
    decoder = decoder_with(name, dtype)
    with torch.no_grad():
        (module, router), *others = BelievedRouters()(decoder).items()
        assert not others
        assert (router.routing, router.correction) == (of, correction)
        assert router.bias == ("bias" if name == "gpt-oss" else "")
        given = (torch.zeros(len(module.weight)),) if correction == GIVEN else ()
        x = torch.randn(3, 64).to(dtype)
        own = vars(module)[REPLACED]["forward"].original(x, *given)
        assert router.logits_dtype == own[0].dtype
        assert router.weights_dtype == own[1].dtype
        assert _taken(module, router, (x, *given))
        assert not _taken(module, router, (x,) if given else (x, x))
        assert not _taken(module, router, (x[:, 1:], *given))
        assert _taken(module, router, (x[None], *given)) == router.flattens


@torch.no_grad()
def test_a_router_of_float32_in_a_model_of_bfloat16_computes_in_float32():
    decoder = decoder_with("glm-4.5", torch.bfloat16)
    ((module, _),) = routers_of(decoder)
    module.weight.data = module.weight.data.float()  # as transformers loads it
    ((_, router),) = BelievedRouters()(decoder).items()
    assert router.wide
    x = torch.randn(3, 64).bfloat16()
    own, ours = vars(module)[REPLACED]["forward"].original(x), routed(module, router, x)
    assert [each.dtype for each in ours] == [each.dtype for each in own]
    torch.testing.assert_close(ours[0], own[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda each: setattr(each, "scale", nn.Parameter(torch.ones(3))),
        lambda each: setattr(each, "weight", nn.Parameter(torch.full_like(each.weight, float("nan")))),
    ],
)
@torch.no_grad()
def test_other_routers_are_not_believed(change):
    decoder = decoder_with("qwen3", torch.float32)
    ((module, _),) = routers_of(decoder)
    change(module)
    assert BelievedRouters()(decoder) == {}


@torch.no_grad()
def test_a_choice_that_differs_is_not_believed(monkeypatch):
    plain = routing.route

    def other(logits, of, *rest):
        weights, index = plain(logits, of, *rest)
        index[0] = (index[0] + 1) % logits.shape[1]
        return weights, index

    decoder = decoder_with("qwen3", torch.bfloat16)
    assert len(BelievedRouters()(decoder)) == 1
    monkeypatch.setattr(routing, "route", other)
    assert BelievedRouters()(decoder) == {}


def test_a_router_that_is_called_in_another_way_is_not_counted(monkeypatch):
    model, inputs = build(*ROUTERS["qwen3"][0]), left_padded(9, 5)
    expected = generate(model, inputs, 3).sequences
    monkeypatch.setattr(reading, "_taken", lambda *_: False)
    with pkv_hf.patched(model, route="split"):
        assert torch.equal(generate(model, inputs, 3).sequences, expected)
        report = pkv_hf.report(model)
    assert (report.experts, report.routers) == (1, 0)
