"""The error of logits that benchmarks record: against exact arithmetic, of weights that come back as they were."""

from __future__ import annotations

import copy

import pytest
import torch

import pkv_hf
from pkv_hf.bench import logits
from pkv_hf.bench.inputs.weights import quantised
from tiny import left_padded, tiny


def states(model):
    return {name: (parameter.data_ptr(), parameter.dtype) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_expected_is_the_forward_of_a_wider_model(dtype, tied, monkeypatch):
    monkeypatch.setattr(logits, "CHUNK", 8)
    model, inputs = tiny("llama", tie_word_embeddings=tied).to(dtype), left_padded(20, 13)
    before = states(model)
    tokens, found = logits.first_step(model, inputs, 4)
    assert tokens.shape == (2, 21)
    exact = logits.expected(model, tokens, inputs["attention_mask"])
    assert states(model) == before
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    for row, length in enumerate((20, 13)):
        with torch.no_grad():
            own = copy.deepcopy(model).to(wide)(tokens[row : row + 1, 20 - length :]).logits[0, -1]
        torch.testing.assert_close(exact[row], own, rtol=1e-4, atol=1e-4)
    error = logits.error(found, exact)
    assert 0 < error < (1e-5 if dtype == torch.float32 else 0.05)
    assert logits.error(2 * exact, exact) == pytest.approx(1)


def test_a_patched_models_step_is_judged_by_the_unpatched_model():
    model, inputs = tiny("llama").to(torch.bfloat16), left_padded(40)
    with pkv_hf.patched(model):
        tokens, found = logits.first_step(model, inputs, 4)
    theirs = logits.first_step(model, inputs, 4)
    exact = logits.expected(model, tokens, inputs["attention_mask"])
    assert logits.error(found, exact) <= 2 * logits.error(theirs[1], exact)


def test_weights_come_back_where_the_forward_fails(monkeypatch):
    model, inputs = tiny("llama").to(torch.bfloat16), left_padded(9)
    before = states(model)

    def fail(*_, **__):
        raise RuntimeError("in between")

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", fail)
    with pytest.raises(RuntimeError, match="in between"):
        logits.expected(model, torch.ones(1, 10, dtype=torch.long), inputs["attention_mask"])
    assert states(model) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_judged_is_known(monkeypatch):
    model, mask = tiny("llama").to(torch.bfloat16), left_padded(9)["attention_mask"]
    assert logits.can_be_judged(model, mask)
    monkeypatch.setattr(logits, "MOST_TOKENS", 8)
    assert not logits.can_be_judged(model, mask)
    monkeypatch.undo()
    pytest.importorskip("bitsandbytes")
    assert not logits.can_be_judged(quantised(model, "nf4", "cpu"), mask)
