"""Mixtures of many families: tokens are transformers' own, and the steps' experts ran by our kernels."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from served import EXPERTS, SERVED, build, generate

import pkv_hf
from pkv_hf.compat import decoder_of
from pkv_hf.kernels.checks.attention import poisoned_scratch, rms
from pkv_hf.kernels.experts import experts as module
from pkv_hf.kernels.experts import routing
from pkv_hf.kernels.experts.reference import Form
from pkv_hf.patches.experts.described import DOWN, few, holds_experts, stacked
from pkv_hf.patches.experts.served import Believed
from tiny import assert_on_pages, left_padded

pytestmark = pytest.mark.contract

EIGHT = {"num_local_experts": 8, "num_experts_per_tok": 2}
FULL = ["full_attention"]
MIXTURES: dict[str, tuple[str, str, dict]] = {
    **{name: SERVED[name] for name in ("qwen2-moe", "qwen3-moe", "mixtral")},
    "gpt-oss": (*SERVED["gpt-oss"][:2], {**SERVED["gpt-oss"][2], "layer_types": FULL}),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {"num_experts": 8, "num_experts_per_tok": 3}),
    "phimoe": ("PhimoeConfig", "PhimoeForCausalLM", EIGHT),
    "granite-moe": ("GraniteMoeConfig", "GraniteMoeForCausalLM", EIGHT),
    "glm-4.5": (
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        {
            "head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
            "moe_intermediate_size": 48, "first_k_dense_replace": 1,
        },
    ),
    "minimax-m2": ("MiniMaxM2Config", "MiniMaxM2ForCausalLM", {**EIGHT, "head_dim": 16}),
    "ernie-4.5": (
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeForCausalLM",
        {
            "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 40, "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            **EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4,
            "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "gemma-4-26b": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "head_dim": 16, "global_head_dim": 16, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
            "moe_intermediate_size": 32, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 128, "layer_types": FULL,
        },
    ),
}  # fmt: skip
OWN_ROUTERS = ("phimoe", "gemma-4-26b")
"""Whose choice is of another form."""
LAYERS = {"glm-4.5": 2, "ernie-4.5": 2, "qwen3-next": 2}
"""Where they are more than one."""
DENSE = {"glm-4.5": 1, "ernie-4.5": 1}
"""Of them without experts."""
CLAMPED = Form(True, "interleaved", "silu", limit=7.0, alpha=1.702, shift=1.0)
FORMS = {"gpt-oss": CLAMPED, "gemma-4-26b": Form(False, "halves", "gelu_tanh")}


def mixture(name: str, dtype: torch.dtype = torch.float32, **settings):
    config, model, own = MIXTURES[name]
    return build(config, model, {**own, "num_hidden_layers": LAYERS.get(name, 1), **settings}).to(dtype)


def experts_in(model) -> list[nn.Module]:
    return [each for each in decoder_of(model).modules() if holds_experts(each)]


def counted(monkeypatch, module, name) -> Counter:
    """How often a module's function ran, by rows; on scratch that holds NaN."""
    counts: Counter = Counter()
    plain = getattr(module, name)

    def counting(x, *rest, **settings):
        counts[len(x)] += 1
        with poisoned_scratch():
            return plain(x, *rest, **settings)

    monkeypatch.setattr(module, name, counting)
    return counts


@pytest.fixture
def ran(monkeypatch) -> Counter:
    return counted(monkeypatch, module, "experts")


@pytest.fixture
def chose(monkeypatch) -> Counter:
    return counted(monkeypatch, routing, "route")


@pytest.mark.parametrize("name", MIXTURES)
def test_tokens_are_transformers_own(name, ran, chose):
    model, inputs = mixture(name), left_padded(9, 5)
    expected = generate(model, inputs, 4).sequences
    assert len(set(expected[:, -4:].flatten().tolist())) > 2  # tokens wander, so that a wrong one shows
    with pkv_hf.patched(model, route="split"):
        output = generate(model, inputs, 4).sequences
        report = pkv_hf.report(model)
        assert_on_pages(model)
    assert torch.equal(output, expected)
    count = LAYERS.get(name, 1) - DENSE.get(name, 0)
    assert (report.experts, report.not_experts) == (count, {})
    routers = 0 if name in OWN_ROUTERS else count
    assert report.routers == routers
    assert f"of {count} mixtures by our kernels, with {routers} routers" in str(report)
    assert chose[2] >= 2 * routers
    assert ran[2] >= 2 * count  # of three steps the first may show what the layers bring
    assert not any("forward" in vars(each) for each in experts_in(model))  # what was patched is as before


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, torch.bfloat16) for name in MIXTURES] + [("gpt-oss", torch.float16)]
)
def test_half_precision_errs_no_more_than_twice_the_modules_own_code(name, dtype):
    model = mixture(name, dtype)
    mixtures = Believed()(decoder_of(model))
    assert not mixtures.own
    modules = experts_in(model)
    assert [*mixtures.forms] == modules
    assert set(mixtures.forms.values()) == {FORMS.get(name, Form(False, "halves", "silu"))}
    chosen = torch.arange(len(modules[0]._parameters[DOWN]))
    own, exact = (few(modules[0], chosen, each) for each in (dtype, torch.float64))
    of = stacked(modules[0], mixtures.forms[modules[0]])
    x = torch.randn(30, of.hidden).to(dtype)
    index = torch.rand(30, len(chosen)).argsort(1)[:, :2]
    weights = torch.rand(30, 2).to(dtype)
    expected = exact(x.double(), index, weights.double())
    ours = module.experts(x, index.contiguous(), weights, of)
    assert rms(ours - expected) <= 2 * rms(own(x, index, weights) - expected)
