"""Which experts the kernels run, and what keeps them from others: with a reason, and with transformers' own tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from served import EXPERTS, SERVED, build, generate

import pkv_hf
from pkv_hf.compat import decoder_of
from pkv_hf.kernels.experts import experts as module
from pkv_hf.kernels.experts.reference import Form
from pkv_hf.patches.experts import served
from pkv_hf.patches.experts.described import DOWN, holds_experts, read, stacked
from pkv_hf.patches.experts.served import Believed, _call
from tiny import left_padded

ONE_LAYER = {"num_hidden_layers": 1}


def mixture(name: str = "qwen3-moe", **settings):
    config, model, own = SERVED[name]
    own = {key: value for key, value in own.items() if key not in ("layer_types", "no_rope_layers")}
    return build(config, model, {**own, **ONE_LAYER, **settings})


def experts_of(model) -> nn.Module:
    return next(each for each in decoder_of(model).modules() if holds_experts(each))


def why_own(model) -> str:
    mixtures = Believed()(decoder_of(model))
    assert not mixtures.forms
    (why,) = mixtures.own
    return why


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_steps_run_by_the_kernels_and_prompts_as_is_set(implementation, monkeypatch):
    rows, plain = [], module.experts
    monkeypatch.setattr(module, "experts", lambda x, *rest: rows.append(len(x)) or plain(x, *rest))
    model, inputs = mixture(), left_padded(9, 5)
    model.set_experts_implementation(implementation)
    expected = generate(model, inputs, 3).sequences
    with pkv_hf.patched(model, route="split"):
        pkv_hf.patch(model, route="split")
        generate(model, inputs, 3)
        rows.clear()
        assert torch.equal(generate(model, inputs, 3).sequences, expected)
    assert set(rows) == {2}


def test_adapters_on_experts_run_as_peft_has_them():
    peft = pytest.importorskip("peft")
    model, inputs = mixture(), left_padded(9, 5)
    settings = peft.LoraConfig(target_parameters=[f"mlp.experts.{name}" for name in ("gate_up_proj", DOWN)], r=4)
    adapted = peft.get_peft_model(model, settings).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    expected = generate(adapted, inputs, 3).sequences
    with adapted.disable_adapter():
        plain = generate(adapted, inputs, 3).sequences
    assert not torch.equal(plain, expected)
    with pkv_hf.patched(adapted, route="split"):
        assert torch.equal(generate(adapted, inputs, 3).sequences, expected)
        report = pkv_hf.report(adapted)
        assert (report.experts, report.not_experts) == (0, {"a Qwen3MoeExperts has adapters": 1})
        assert "of 1 by their own forward: a Qwen3MoeExperts has adapters" in str(report)
        with adapted.disable_adapter():
            assert torch.equal(generate(adapted, inputs, 3).sequences, plain)
            assert pkv_hf.report(adapted).experts == 1
        assert torch.equal(generate(adapted, inputs, 3).sequences, expected)
    with pkv_hf.patched(adapted.merge_and_unload(), route="split") as merged:
        assert torch.equal(generate(merged, inputs, 3).sequences, expected)
        assert pkv_hf.report(merged).experts == 1


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_weights_that_are_made_at_each_call_are_not_read():
    model = mixture()
    nn.utils.parametrize.register_parametrization(experts_of(model), DOWN, Doubled())
    assert why_own(model) == (
        "a ParametrizedQwen3MoeExperts makes its weights anew at each call (quantised weights, adapters)"
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda each: setattr(each, "scale", nn.Parameter(torch.ones(4))), "keeps its weights in another form: down_"),
        (lambda each: each.register_buffer("scale", torch.ones(4)), "keeps its weights in another form: down_"),
        (lambda each: setattr(each, "norm", nn.LayerNorm(64)), "has more modules with weights"),
        (lambda each: setattr(each, "act_fn", nn.Hardtanh()), "does something else with its weights"),
        (lambda each: setattr(each, "_is_expert_parallel", True), "has experts on several devices"),
        (lambda each: setattr(each, DOWN, nn.Parameter(each.down_proj.half())), "has gate_up_proj in torch.float32"),
        (lambda each: setattr(each, DOWN, nn.Parameter(each.down_proj[:, 1:].clone())), "has weights of other shapes"),
    ],
)
@torch.no_grad()
def test_other_modules_are_not_read(change, why):
    model = mixture()
    change(experts_of(model))
    assert why in why_own(model)


def test_experts_that_are_given_all_rows_for_each(monkeypatch):
    """Llama 4's: rows that did not choose an expert are zero."""
    given, plain = [], module.experts
    monkeypatch.setattr(module, "experts", lambda x, index, *rest: given.append(index) or plain(x, index, *rest))
    model, inputs = mixture("llama4", num_experts_per_tok=2), left_padded(9, 5)
    expected = generate(model, inputs, 3).sequences
    with pkv_hf.patched(model, route="split"):
        assert torch.equal(generate(model, inputs, 3).sequences, expected)
        report = pkv_hf.report(model)
        monkeypatch.setattr(module, "MAX_ROWS", 7)
        assert pkv_hf.report(model).not_experts == {"8 rows are more than 7": 1}
    assert (report.experts, report.routers, report.not_experts) == (1, 0, {})
    of_steps = [index for index in given if index.shape == (8, 1)]
    assert of_steps
    assert all(int((index >= 0).sum()) == 4 for index in of_steps)  # two choices of two rows


@torch.no_grad()
def test_such_experts_with_biases_are_not_read():
    model = mixture("llama4")
    each = experts_of(model)
    each.gate_up_proj_bias, each.down_proj_bias = nn.Parameter(torch.ones(4, 192)), nn.Parameter(torch.ones(4, 64))
    assert "has biases, and all rows for each expert" in why_own(model)


def test_kernels_that_err_are_not_believed(monkeypatch):
    plain = module.experts
    monkeypatch.setattr(module, "experts", lambda *call: plain(*call) + 1e-3)
    assert "a Qwen3MoeExperts by the kernels has" in why_own(mixture())


def test_a_clamp_that_no_small_number_reaches_is_seen():
    class Clamped(nn.Module):
        def forward(self, x):
            return nn.functional.silu(x.clamp(max=20))

    model = mixture()
    experts_of(model).act_fn = Clamped()
    assert "does something else" in why_own(model)
    plain, chosen = experts_of(mixture()), torch.tensor([0, 3])
    assert read(plain, chosen)[1:] == ("halves", "silu", 0.0, 1.0, 0.0)


@torch.no_grad()
def test_calls_of_another_kind_are_the_modules_own():
    each = experts_of(mixture())
    of = stacked(each, Form(False, "halves", "silu"))
    x, index, weights = torch.randn(2, 64), torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2)
    assert _call(each, of, (x, weights, index)) == (x, index, weights)
    others = ((x, index), (x, index, weights[:, :1]), (x[None], index, weights), (x, weights, weights))
    for call in (*others, (x.half(), index, weights), (x[:1], index, weights)):
        assert _call(each, of, call) is None
    each = experts_of(mixture("llama4"))
    of = stacked(each, Form(True, "halves", "silu"))
    for call in ((x, index, weights), (x.repeat(3, 1),), (x.repeat(4, 1).half(),)):
        assert _call(each, of, call) is None


def test_a_call_of_another_kind_is_said(monkeypatch):
    model, inputs = mixture(), left_padded(9, 5)
    expected = generate(model, inputs, 3).sequences
    monkeypatch.setattr(served, "_call", lambda *_: None)
    with pkv_hf.patched(model, route="split"):
        assert torch.equal(generate(model, inputs, 3).sequences, expected)
        report = pkv_hf.report(model)
    why = "a Qwen3MoeExperts is called with more than rows in its dtype and their choices"
    assert (report.experts, report.not_experts) == (0, {why: 1})


def test_more_rows_than_the_kernels_take_are_said(monkeypatch):
    monkeypatch.setattr(module, "MAX_ROWS", 1)
    model, inputs = mixture(), left_padded(9, 5)
    expected = generate(model, inputs, 3).sequences
    with pkv_hf.patched(model, route="split"):
        assert torch.equal(generate(model, inputs, 3).sequences, expected)
        assert pkv_hf.report(model).not_experts == {"2 rows are more than 1": 1}


def test_layers_that_are_alike_share_what_is_known(monkeypatch):
    looked, plain = [], served.read
    monkeypatch.setattr(served, "read", lambda each, chosen: looked.append(each) or plain(each, chosen))
    believed, model = Believed(), mixture(num_hidden_layers=3)
    assert len(believed(decoder_of(model)).forms) == 3
    assert len(believed(decoder_of(mixture(num_hidden_layers=2))).forms) == 2
    assert len(looked) == 1
    believed(decoder_of(mixture(**{**EXPERTS, "num_experts": 5})))
    assert len(looked) == 2
