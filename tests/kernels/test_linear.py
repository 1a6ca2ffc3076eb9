"""Linear layers on few rows, RMSNorm and SwiGLU kernels, beside torch's own and float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton")

from pkv_hf.kernels import reference
from pkv_hf.kernels.checks.attention import poisoned_scratch, rms
from pkv_hf.kernels.elementwise import rms_norm, silu_mul
from pkv_hf.kernels.linear import choose_block, linear, swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.float16, torch.bfloat16)
EPS = 0.1  # one that shows


def drawn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def judge(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    assert torch.isfinite(ours).all()
    assert rms(ours - exact) <= 2 * rms(theirs - exact)


def same(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal, but for the few elements where another exponential or order of a sum is rounded the other way."""
    return float((ours != expected).double().mean()) < 0.005


def double(tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [tensor if tensor is None else tensor.double() for tensor in tensors]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 16])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(96, (40, 24, 24)), (640, (100, 100, 100)), (4096, (9,)), (576, (70,))]
)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(rows, inputs, outputs, bias, dtype):
    x = drawn(rows, inputs, dtype=dtype)
    weights = [drawn(count, inputs, dtype=dtype, scale=inputs**-0.5) for count in outputs]
    biases = [drawn(count, dtype=dtype) if bias else None for count in outputs]
    norm = drawn(inputs, dtype=dtype) if rows == 1 else None
    residual = drawn(rows, outputs[0], dtype=dtype) if len(outputs) == 1 else None

    def by_torch(x, norm, residual, weights, biases):
        x = x if norm is None else reference.rms_norm(x, norm, EPS)
        y = torch.cat([functional.linear(x, w, b) for w, b in zip(weights, biases)], dim=1)
        return y if residual is None else y + residual

    with poisoned_scratch():
        ours = linear(x, weights, biases, norm=norm, eps=EPS, residual=residual)
    theirs = by_torch(x, norm, residual, weights, biases)
    exact = by_torch(*double([x, norm, residual]), double(weights), double(biases))
    judge(ours, theirs, exact)


def whole(*shape: int, dtype: torch.dtype, unit: float) -> torch.Tensor:
    """Multiples of a power of two: float32 holds sums of their products exactly, in any order."""
    return torch.randint(-64, 65, shape, device=DEVICE).to(dtype) * unit


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_products_are_rounded_as_transformers_rounds_them(rows, dtype):
    """Before a residual is added, before SiLU and after, and before gate and up are multiplied."""
    x, residual = whole(rows, 96, dtype=dtype, unit=2**-10), whole(rows, 400, dtype=dtype, unit=2**-6)
    weight, up = (whole(400, 96, dtype=dtype, unit=2**-3) for _ in range(2))
    bias = whole(400, dtype=dtype, unit=2**-6)
    exact = functional.linear(x.double(), weight.double(), bias.double())
    expected = exact.to(dtype) + residual
    assert not torch.equal(expected, (exact + residual).to(dtype)), "rounding once was to differ"
    assert torch.equal(linear(x, [weight], [bias], residual=residual), expected)
    gated, upper = (functional.linear(x.double(), each.double()).to(dtype) for each in (weight, up))
    assert same(swiglu(x, weight, up), functional.silu(gated) * upper)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 40), (640, 130), (1100, 4100)])
def test_swiglu(rows, inputs, outputs, dtype):
    x = drawn(rows, inputs, dtype=dtype)
    gate, up = (drawn(outputs, inputs, dtype=dtype, scale=inputs**-0.5) for _ in range(2))
    norm = drawn(inputs, dtype=dtype) if rows == 1 else None

    def by_torch(x, norm, gate, up):
        x = x if norm is None else reference.rms_norm(x, norm, EPS)
        return functional.silu(functional.linear(x, gate)) * functional.linear(x, up)

    with poisoned_scratch():
        ours = swiglu(x, gate, up, norm=norm, eps=EPS)
    judge(ours, by_torch(x, norm, gate, up), by_torch(*double([x, norm, gate, up])))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("width", [64, 96, 4096])
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(width, residual, dtype):
    rows = 64  # all of a row's errors are alike: those of a few may happen to be small, or large
    x, weight = drawn(rows, width, dtype=dtype), drawn(width, dtype=dtype)
    other = drawn(rows, width, dtype=dtype) if residual else None
    with poisoned_scratch():
        ours, total = rms_norm(x, weight, EPS, other)
    expected = x if other is None else x + other
    assert torch.equal(total, expected)
    judge(ours, reference.rms_norm(expected, weight, EPS), reference.rms_norm(expected.double(), weight.double(), EPS))
    assert dtype == torch.float32 or same(ours, reference.rms_norm(expected, weight, EPS))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_silu_mul(dtype):
    gate, up = drawn(3, 1100, dtype=dtype), drawn(3, 1100, dtype=dtype)
    with poisoned_scratch():
        ours = silu_mul(gate, up)
    judge(ours, functional.silu(gate) * up, functional.silu(gate.double()) * up.double())
    assert dtype == torch.float32 or same(ours, functional.silu(gate) * up)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(2, 64)}, "float32"),
        ({"x": torch.zeros(17, 64, dtype=torch.float16)}, "1 to 16"),
        ({"x": torch.zeros(2, 32, dtype=torch.float16)}, r"weights\[0\]"),
        ({"weights": [torch.zeros(8, 64)]}, r"weights\[0\] is torch.float32"),
        ({"weights": [torch.zeros(8, 64, dtype=torch.float16)] * 2}, "2 weights"),
        ({"norm": torch.zeros(64, dtype=torch.float16)}, "norm with 2 rows"),
        ({"residual": torch.zeros(2, 8)}, "residual is torch.float32"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_bad_arguments_are_named(change, named):
    arguments = {"x": torch.zeros(2, 64, dtype=torch.float16), "weights": [torch.zeros(8, 64, dtype=torch.float16)]}
    with pytest.raises(ValueError, match=named):
        linear(**{**arguments, **change})


@pytest.mark.parametrize("shared_kib", [64, 99, 163, 227])
@pytest.mark.parametrize("weights", [1, 2])
@pytest.mark.parametrize("outputs", [512, 28672])
def test_blocks_fit_shared_memory(outputs, weights, shared_kib):
    block = choose_block(8, 4096, outputs, weights, shared_kib * 1024)
    assert block.num_stages * (weights * block.outputs + 16) * block.inputs * 2 <= shared_kib * 1024
