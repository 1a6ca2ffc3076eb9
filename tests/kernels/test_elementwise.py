"""Norms and activations of a decoder layer, beside transformers' own modules and float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P

from pkv_hf.kernels import reference
from pkv_hf.kernels.checks.attention import DTYPES, poisoned_scratch, rms
from pkv_hf.kernels.elementwise import act, act_mul, add_norms, layer_norm, rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 0.1  # one that shows
ROWS = 64  # all of a row's errors are alike: those of a few may happen to be small, or large


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def same(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal, but for the few elements where another exponential or order of a sum is rounded the other way."""
    return float((ours != expected).double().mean()) < 0.005


def judge(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    assert torch.isfinite(ours).all()
    assert rms(ours - exact) <= 2 * rms(theirs - exact)
    assert ours.dtype == torch.float32 or same(ours, theirs)


def wide(value):
    return value.double() if isinstance(value, torch.Tensor) else value


def randomised(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "residual"), [(96, True), (1100, False)])
@pytest.mark.parametrize("of", [LlamaRMSNorm, Gemma3RMSNorm, CohereLayerNorm, nn.LayerNorm])
@torch.no_grad()
def test_norms_are_those_of_transformers(of, width, residual, dtype):
    """Of columns of a wider tensor where there is no residual."""
    module = randomised(of(width, eps=EPS), dtype)
    x = drawn(ROWS, 2 * width, dtype=dtype)[:, :width]
    other, bias = drawn(ROWS, width, dtype=dtype) if residual else None, getattr(module, "bias", None)
    offset = float(of is Gemma3RMSNorm)
    centered = "LayerNorm" in of.__name__
    with poisoned_scratch():
        if centered:
            ours, total = layer_norm(x, module.weight, bias, EPS, other)
        else:
            ours, total = rms_norm(x, module.weight, EPS, other, offset=offset)
    expected = x if other is None else x + other
    assert torch.equal(total, expected)
    weight = module.weight.double()
    if centered:
        exact = reference.layer_norm(expected.double(), weight, wide(bias), EPS)
    else:
        exact = reference.rms_norm(expected.double(), weight, EPS, offset)
    judge(ours, module(expected), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_a_layer_norm_of_weights_less_one(dtype):
    """transformers rounds the sum of weight and 1, the kernel does not."""
    module, x = randomised(NemotronLayerNorm1P(96, eps=EPS), dtype), drawn(ROWS, 96, dtype=dtype)
    ours, _ = layer_norm(x, module.weight, module.bias, EPS, offset=1.0)
    exact = reference.layer_norm(x.double(), module.weight.double(), module.bias.double(), EPS, 1.0)
    assert rms(ours - exact) <= 2 * rms(module(x) - exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_without_weights(dtype):
    x = drawn(ROWS, 96, dtype=dtype)
    judge(rms_norm(x, None, EPS)[0], reference.rms_norm(x, None, EPS), reference.rms_norm(x.double(), None, EPS))
    ours, _ = layer_norm(x, None, None, EPS)
    judge(ours, nn.functional.layer_norm(x, (96,), eps=EPS), reference.layer_norm(x.double(), None, None, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("offset", "after", "before", "scale", "gain"),
    [
        (1.0, True, True, 1.0, False),
        (0.0, True, True, 1.0, False),
        (0.0, True, False, 1.0, False),
        (0.0, False, True, 0.22, False),
        (0.0, True, True, 1.0, True),
    ],
    ids=["Gemma 3", "GLM-4", "OLMo 2", "Granite", "Gemma 4"],
)
def test_norm_residual_and_norm(offset, after, before, scale, gain, dtype):
    by = drawn(1, dtype=dtype) if gain else None
    y, residual = (drawn(ROWS, 96, dtype=dtype) for _ in range(2))
    weights = [drawn(96, dtype=dtype) for _ in range(2)]

    def norms(dtype):
        of = [(weight.to(dtype), eps, offset) for weight, eps in zip(weights, (EPS, 0.3))]
        return of[0] if after else None, of[1] if before else None

    with poisoned_scratch():
        ours = add_norms(y, residual, *norms(dtype), scale=scale, gain=by)
    theirs = reference.add_norms(y, residual, *norms(dtype), scale, by)
    exact_by = by if by is None else by.double()
    exact = reference.add_norms(y.double(), residual.double(), *norms(torch.float64), scale, exact_by)
    for of_ours, of_theirs, of_exact in zip(ours, theirs, exact):
        judge(of_ours, of_theirs, of_exact)
    assert before or ours[1] is ours[0]


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("strided", [False, True])
def test_activations(strided, activation, dtype):
    """Of the halves of one tensor, too."""
    both = 3 * drawn(3, 2 * 1100, dtype=dtype)
    x, up = (half if strided else half.contiguous() for half in both.chunk(2, dim=1))
    with poisoned_scratch():
        ours, alone = act_mul(x, up, activation), act(x, activation)
    theirs, rounded, exact = (reference.activation(each, activation) for each in (x, x.float(), x.double()))
    for of_ours, of_theirs, of_exact in ((alone, theirs, exact), (ours, theirs * up, exact * up.double())):
        assert rms(of_ours - of_exact) <= 2 * rms(of_theirs - of_exact)
    if dtype != torch.float32:
        large = x > -1  # GELU of less is the small difference of rounded numbers
        rounded = rounded.to(dtype)
        assert same(alone[large], rounded[large])
        assert same(ours[large], (rounded * up)[large])


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations_keep_nan_and_bear_the_largest(activation):
    x = torch.tensor([float("nan"), 1e30, -1e30], device=DEVICE)
    torch.testing.assert_close(act(x, activation), reference.activation(x, activation), rtol=0, atol=0, equal_nan=True)


def test_bad_arguments_are_named():
    x = torch.zeros(4, 6)
    with pytest.raises(ValueError, match="activation='mish' is not one of silu"):
        act(x, "mish")
    with pytest.raises(ValueError, match=r"x is \[6, 4\] with strides \(1, 6\)"):
        rms_norm(x.T, x[0, :4], EPS)
    with pytest.raises(ValueError, match=r"up is \[6, 4\]"):
        act_mul(torch.zeros(6, 4), x.T, "silu")
