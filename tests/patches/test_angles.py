"""The angles of RoPE are taken by the kernel where that computes the same."""

from __future__ import annotations

import pytest
import torch
import transformers

pytest.importorskip("triton")

import pkv_hf
from pkv_hf.compat import decoder_of
from pkv_hf.kernels import queries
from pkv_hf.patches.around import angles
from pkv_hf.runtime.fusion import Fusion
from pkv_hf.runtime.step import Step
from tiny import COMMON, randomized, tiny

YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
FORMS = {"Llama": "halves", "Cohere": "pairs", "GptOss": "once"}


def built(name, **settings):
    return randomized(
        getattr(transformers, f"{name}ForCausalLM"), getattr(transformers, f"{name}Config")(**{**COMMON, **settings})
    )


def gemma3():
    """Windows of its layers turn by other frequencies than full attention."""
    config = transformers.Gemma3TextConfig(**COMMON, head_dim=16, sliding_window=24, sliding_window_pattern=2)
    return randomized(transformers.Gemma3ForCausalLM, config)


def found_in(model) -> dict:
    pkv_hf.patch(model, route="split")
    with torch.no_grad():
        return angles.fused_angles(decoder_of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_their_form_is_read_and_they_are_those_of_the_module(name, dtype):
    model = built(name).to(dtype)
    ((module, kinds),) = found_in(model).items()
    assert kinds[""].form == FORMS[name]
    x, positions = torch.empty(3, 5, 1, dtype=dtype), torch.randint(120, (3, 5))
    for ours, own in zip(kinds[""](x, positions), type(module).forward(module, x, positions)):
        torch.testing.assert_close(ours, own, atol=1e-6 if dtype == torch.float32 else 1 / 256, rtol=0)


def test_a_factor_and_kinds_of_layers_are_read():
    ((_, kinds),) = found_in(built("Llama", rope_parameters=YARN)).items()
    assert kinds[""].factor == pytest.approx(1.1386, abs=1e-3)
    ((_, kinds),) = found_in(gemma3()).items()
    assert set(kinds) == {"sliding_attention", "full_attention"}


def test_what_follows_the_length_or_is_another_function_runs_as_it_is(monkeypatch):
    assert not found_in(built("Llama", rope_parameters=DYNAMIC))
    model = built("Llama")
    rotary = type(model.model.rotary_emb)
    own = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda self, *args: tuple(1.01 * each for each in own(self, *args)))
    assert not found_in(model)


def test_the_forward_takes_the_kernel_in_a_step_alone(monkeypatch):
    model = tiny("llama", num_hidden_layers=1)
    rotary, found, taken = model.model.rotary_emb, found_in(model), []
    plain = queries.angles
    monkeypatch.setattr(queries, "angles", lambda *args: taken.append(args[0].shape) or plain(*args))
    x, positions = torch.empty(2, 1, 64), torch.tensor([[5], [90]])
    expected = rotary(x, position_ids=positions)
    assert not taken
    step = object.__new__(Step)
    step.fusion = Fusion(angles=found)
    monkeypatch.setattr(angles, "current_step", lambda: step)
    for call in (lambda: rotary(x, positions), lambda: rotary(x, position_ids=positions)):
        torch.testing.assert_close(call(), expected)
    assert taken == [(2, 1)] * 2
    planes = positions.expand(3, 2, 1)
    torch.testing.assert_close(rotary(x, planes), tuple(each.expand(3, *each.shape) for each in expected))
    step.fusion = Fusion()
    torch.testing.assert_close(rotary(x, positions), expected)
    assert len(taken) == 2


@pytest.mark.parametrize(("model", "kinds"), [(gemma3, 2), (lambda: tiny("llama"), 1)], ids=["gemma3", "llama"])
def test_a_generation_takes_them_once_a_step_and_kind(model, kinds, monkeypatch):
    model, inputs, calls = model(), {"input_ids": torch.randint(2, 100, (1, 9))}, []
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    plain = queries.angles
    with pkv_hf.patched(model, route="split"):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        monkeypatch.setattr(queries, "angles", lambda *args: calls.append(args[3]) or plain(*args))
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), expected)
        static = pkv_hf.report(model).steps.static
    assert static > 5
    assert calls == ["halves"] * (5 * kinds)


def test_each_kind_of_layers_is_given_its_own(monkeypatch):
    model = gemma3()
    rotary, found = model.model.rotary_emb, found_in(model)
    step = object.__new__(Step)
    step.fusion = Fusion(angles=found)
    x, positions = torch.empty(1, 1, 64), torch.tensor([[90]])
    own = {kind: type(rotary).forward(rotary, x, positions, kind) for kind in found[rotary]}
    assert not torch.allclose(*(cos for cos, _ in own.values()))
    monkeypatch.setattr(angles, "current_step", lambda: step)
    for kind, expected in own.items():
        torch.testing.assert_close(rotary(x, positions, kind), expected)
        torch.testing.assert_close(rotary(x, positions, layer_type=kind), expected)
