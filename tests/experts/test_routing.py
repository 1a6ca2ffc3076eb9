"""Which experts rows choose: the kernel beside torch, and beside torch's own top-k."""

from __future__ import annotations

import secrets

import pytest
import torch

pytest.importorskip("triton")

from pkv_hf.kernels.checks.attention import poisoned_scratch, rms
from pkv_hf.kernels.checks.layers import Draw
from pkv_hf.kernels.experts import reference
from pkv_hf.kernels.experts.reference import Routing
from pkv_hf.kernels.experts.routing import route

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {
    "one of one": (1, Routing(1, "softmax", False, False)),
    "softmax": (60, Routing(4, "softmax", False, False)),
    "softmax, normalised": (128, Routing(8, "softmax", False, True)),
    "softmax, corrected": (64, Routing(6, "softmax", True, True)),
    "sigmoid, corrected": (160, Routing(8, "sigmoid", True, True, 2.5)),
    "groups": (64, Routing(5, "sigmoid", True, True, 2.5, groups=8, kept=3)),
    "groups of two": (8, Routing(2, "softmax", False, False, 16.0, groups=4, kept=1)),
    "all": (7, Routing(7, "sigmoid", False, False)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_weights_and_choices_are_those_of_torch(name, dtype):
    experts, of = CASES[name]
    draw = Draw(secrets.randbits(31), dtype, secrets.randbits(1) == 1, DEVICE)
    logits, correction = draw(9, experts, scale=2.0), draw(experts, dtype=torch.float32) if of.corrected else None
    with poisoned_scratch():
        weights, index = route(logits, of, correction, torch.float32)
    wide = None if correction is None else correction.double()
    exact, chosen = reference.route(logits.double(), of, wide)
    assert torch.equal(index, chosen)  # equal logits too: the first
    assert weights.dtype == torch.float32
    assert rms(weights - exact) <= 1e-6 * rms(exact)
    assert torch.equal(route(logits, of, correction)[0], weights.to(dtype))


def test_the_choice_is_that_of_torchs_own_top_k():
    logits = torch.randn(20, 128, device=DEVICE)
    weights, index = route(logits, Routing(8, "softmax", False, True))
    own, chosen = torch.topk(logits.softmax(-1), 8)
    assert torch.equal(index, chosen)
    torch.testing.assert_close(weights, own / own.sum(-1, keepdim=True))


def test_the_softmax_of_the_chosen_is_the_softmax_normalised():
    logits = 20 * torch.randn(20, 32, device=DEVICE)
    weights, index = route(logits, Routing(4, "softmax", False, True))
    torch.testing.assert_close(weights, logits.gather(1, index).softmax(-1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scores", reference.SCORES)
def test_whatever_logits_are_only_experts_are_chosen(scores, value):
    logits = torch.full((3, 12), value, device=DEVICE)
    logits[1, 5] = logits[2] = 0.0
    _, index = route(logits, Routing(4, scores, False, False))
    assert int(index.min()) >= 0
    assert int(index.max()) < 12


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"choices": 9}, "choices=9 of 8 experts"),
        ({"scores": "top"}, "scores='top' is not one of softmax"),
        ({"groups": 8, "kept": 1}, "groups=8, kept=1 of 8 experts"),
        ({"groups": 2, "kept": 3}, "groups=2, kept=3 of 8 experts"),
        ({"corrected": True}, "correction is missing"),
    ],
)
def test_bad_arguments_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        route(torch.zeros(1, 8), Routing(2, "softmax", False, False)._replace(**change))
