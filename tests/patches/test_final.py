"""The norm that a decoder ends with is taken by the kernel where that computes the same."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import nn

pytest.importorskip("triton")

import pkv_hf
from pkv_hf.compat import decoder_of
from pkv_hf.patches.around import final
from pkv_hf.patches.judged import ERROR, excess
from pkv_hf.replaced import STATE
from pkv_hf.runtime.fusion import Fusion
from pkv_hf.runtime.step import Step
from tiny import COMMON, randomized, tiny

KINDS = {"Llama": ("rms", 0.0), "Gemma": ("rms", 1.0), "Cohere": ("layer", 0.0)}


def norms_found(model) -> dict:
    pkv_hf.patch(model, route="split")
    with torch.no_grad():
        return final.fused_norms(decoder_of(model))


@pytest.mark.parametrize("name", KINDS)
def test_its_kind_is_read(name):
    model = randomized(getattr(transformers, f"{name}ForCausalLM"), getattr(transformers, f"{name}Config")(**COMMON))
    ((module, norm),) = norms_found(model).items()
    assert (module, norm.module) == (decoder_of(model).norm,) * 2
    assert (norm.kind, norm.offset) == KINDS[name]


def test_its_forward_takes_the_kernel_in_a_step_alone(monkeypatch):
    model = tiny("llama", num_hidden_layers=1)
    norm, x = model.model.norm, torch.randn(2, 1, 64)
    found, taken = norms_found(model), []
    monkeypatch.setattr(final, "take_norm", lambda _, rows: taken.append(rows.shape) or 2 * rows)
    expected = norm(x)
    assert not taken
    step = object.__new__(Step)
    step.fusion = Fusion(norms=found)
    monkeypatch.setattr(final, "current_step", lambda: step)
    torch.testing.assert_close(norm(x), 2 * x)
    assert taken == [(2, 64)]
    step.fusion = Fusion()
    torch.testing.assert_close(norm(x), expected)


def fails(*_):
    raise RuntimeError("no kernel")


@pytest.mark.parametrize("kernel", [lambda norm, x: 1.01 * norm.module(x), lambda norm, x: norm.module(x) / 0, fails])
def test_a_kernel_that_is_wrong_or_fails_leaves_it_as_it_is(kernel, monkeypatch):
    monkeypatch.setattr(final, "take_norm", kernel)
    assert not norms_found(tiny("llama", num_hidden_layers=1))


def test_a_norm_that_came_after_patch_runs_as_it_is():
    model = pkv_hf.patch(tiny("llama", num_hidden_layers=1), route="split")
    model.model.norm = nn.LayerNorm(64)
    known = getattr(model, STATE).known
    assert not final.fused_norms(known.decoder)


def test_errors_are_judged_by_those_of_the_own_code():
    assert excess(2.0, 1.0, 0.0) == 2 / ERROR
    assert excess(1.0, math.inf, 1.0) == math.inf
    assert math.isnan(excess(math.nan, 1.0, 1.0))
