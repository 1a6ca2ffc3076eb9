"""Adapters beside products: in parts and in one, of any rank, and what is refused. Random cases: test_layer_fuzz.py."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton")

from pkv_hf.kernels import linear as linear_module
from pkv_hf.kernels import reference
from pkv_hf.kernels.checks.attention import poisoned_scratch, rms
from pkv_hf.kernels.elementwise import add_norms
from pkv_hf.kernels.linear import gated, in_parts, linear
from pkv_hf.kernels.products import adapters as adapters_module
from pkv_hf.kernels.products.adapters import Adapter, Adapters, expand, shrink
from pkv_hf.kernels.products.blocks import Block

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANKS = ((16, 5), (), (40,))


def drawn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def drawn_adapters(inputs: int, outputs: int, ranks: tuple[int, ...], dtype: torch.dtype) -> list[Adapter]:
    return [
        Adapter(
            drawn(rank, inputs, dtype=dtype, scale=inputs**-0.5),
            drawn(outputs, rank, dtype=dtype, scale=rank**-0.5),
            float(torch.rand(()) + 0.5),
        )
        for rank in ranks
    ]


def by_peft(x, weight, bias, adapters, dtype):
    if dtype == torch.float64:
        adapters = [(a.double(), b.double(), scaling) for a, b, scaling in adapters]
    y = functional.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return reference.adapted(y, x.to(dtype), adapters)


def judge(ours, by_torch):
    exact = by_torch(torch.float64)
    assert torch.isfinite(ours).all()
    assert rms(ours - exact) <= 2 * rms(by_torch(ours.dtype) - exact)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("rows", "lora"), [(2, torch.float32), (17, torch.bfloat16), (80, torch.float16)], ids=str)
def test_products_of_several_rows_in_parts_and_in_one(rows, lora, parts, monkeypatch):
    """Ragged sizes; three weights, one of them without adapters; gate and up; parts that a norm's launch adds up."""
    monkeypatch.setattr(linear_module, "choose_block", lambda *_: Block(32, 64, 2, parts=parts))
    dtype, inputs, outputs = torch.bfloat16, 5 * 64 + 7, (41, 9, 33)
    x, residual = drawn(rows, inputs, dtype=dtype), drawn(rows, 41, dtype=dtype)
    weights = [drawn(count, inputs, dtype=dtype, scale=inputs**-0.5) for count in (*outputs, 41)]
    biases = [drawn(len(weight), dtype=dtype) for weight in weights]
    adapters = [drawn_adapters(inputs, len(w), ranks, lora) for w, ranks in zip(weights, (*RANKS, (33,)))]

    def single(i, dtype):
        return by_peft(x, weights[i], biases[i], adapters[i], dtype)

    of_first, of_pair = Adapters(adapters[:1]), Adapters([adapters[0], adapters[3]])
    with poisoned_scratch():
        three = linear(x, weights[:3], biases[:3], adapters=Adapters(adapters[:3]))
        summed = linear(x, weights[:1], biases[:1], residual=residual, adapters=of_first)
        pair = {"bias_gate": biases[0], "bias_up": biases[3], "adapters": of_pair}
        mlp = gated(x, weights[0], weights[3], **pair)
        left = in_parts(x, weights[0], biases[0], of_first)
        assert (left is None) == (parts == 1)
        if left is not None:
            assert torch.equal(add_norms(left, residual, None, None)[0], summed)
    judge(three, lambda dtype: torch.cat([single(i, dtype) for i in range(3)], dim=1))
    judge(summed, lambda dtype: single(0, dtype) + residual.to(dtype))
    judge(mlp, lambda dtype: functional.silu(single(0, dtype)) * single(3, dtype))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("rank", [1, 256])
def test_any_rank_beside_a_module_that_is_called(rank, rows, monkeypatch):
    """`expand` adds to what another module gave; it and a product of ours are of the same adapters. h is in parts."""
    monkeypatch.setattr(adapters_module, "device_limits", lambda _: (132, 227 * 1024))
    dtype, inputs = torch.float16, 1100
    x, weight = drawn(rows, inputs, dtype=dtype), drawn(130, inputs, dtype=dtype, scale=inputs**-0.5)
    adapters = drawn_adapters(inputs, 130, (rank,), torch.float32)
    both = Adapters([[], adapters])
    with poisoned_scratch():
        shrunk = shrink(x, both, [7, 130])
        assert len(shrunk.h) > 1
        ours = expand(functional.linear(x, weight), shrunk, 1)
        product = linear(x, [weight], adapters=Adapters([adapters]))
    for result in (ours, product):
        judge(result, lambda dtype: by_peft(x, weight, None, adapters, dtype))


def whole(*shape: int, dtype: torch.dtype, unit: float) -> torch.Tensor:
    """Multiples of a power of two: float32 holds sums of their products exactly, in any order."""
    return torch.randint(-8, 9, shape, device=DEVICE).to(dtype) * unit


@pytest.mark.parametrize("rows", [1, 3])
def test_a_product_and_its_adapters_are_rounded_once(rows):
    dtype = torch.bfloat16
    x, weight = whole(rows, 96, dtype=dtype, unit=2**-6), whole(200, 96, dtype=dtype, unit=2**-3)
    adapter = Adapter(whole(4, 96, dtype=dtype, unit=2**-5), whole(200, 4, dtype=dtype, unit=2**-3), 0.5)
    base = functional.linear(x.double(), weight.double())
    exact = reference.adapted(base, x.double(), [(adapter.a.double(), adapter.b.double(), 0.5)])
    assert not torch.equal((base.to(dtype) + (exact - base)).to(dtype), exact.to(dtype)), "rounding twice was to differ"
    assert torch.equal(linear(x, [weight], adapters=Adapters([[adapter]])), exact.to(dtype))


def test_weights_of_adapters_may_change_in_place():
    x, weight = drawn(1, 64, dtype=torch.float16), drawn(9, 64, dtype=torch.float16)
    adapter = drawn_adapters(64, 9, (3,), torch.float32)[0]
    adapters = Adapters([[adapter]])
    before = linear(x, [weight], adapters=adapters)
    adapter.b.zero_()
    assert not torch.equal(before, linear(x, [weight]))
    assert torch.equal(linear(x, [weight], adapters=adapters), linear(x, [weight]))


A, B = torch.zeros(4, 64), torch.zeros(9, 4)


@pytest.mark.parametrize(
    ("of_weights", "named"),
    [
        ([[]], "0 adapters of 1 weights"),
        ([[Adapter(A, B, 1.0)]] * 4, "4 adapters of 4 weights"),
        ([[Adapter(A, B[:, :3], 1.0)]], r"weight 0 has A \[4, 64\] and B \[9, 3\]"),
        ([[Adapter(A, B, 1.0)], [Adapter(A[:, :32], B, 1.0)]], r"weight 1 has A \[4, 32\]"),
        ([[Adapter(A, B, 1.0), Adapter(A, B[:8], 1.0)]], r"B \[8, 4\]: want .* and \[9, rank\]"),
        ([[Adapter(A, B.half(), 1.0)]], "torch.float16 on cpu: want torch.float32"),
        ([[Adapter(A.double(), B.double(), 1.0)]], "torch.float64 on cpu"),
        ([[Adapter(torch.zeros(64, 4).T, B, 1.0)]], "strides"),
    ],
    ids=range(8),
)
def test_adapters_that_launches_cannot_read_are_named(of_weights, named):
    with pytest.raises(ValueError, match=named):
        Adapters(of_weights)


@pytest.mark.parametrize(("inputs", "outputs", "weights"), [(32, 9, 1), (64, 8, 1), (64, 9, 3)])
def test_adapters_of_other_weights_are_refused(inputs, outputs, weights):
    x, weight = (torch.zeros(count, inputs, dtype=torch.float16) for count in (1, outputs))
    with pytest.raises(ValueError, match=r"adapters are of 64 inputs and \[9\] outputs"):
        linear(x, [weight] * weights, adapters=Adapters([[Adapter(A, B, 1.0)]]))
