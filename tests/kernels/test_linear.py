"""Linear layers on few rows, alone and gated, beside torch's own and float64."""

from __future__ import annotations

import secrets

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton")

from pkv_hf.kernels import linear as linear_module
from pkv_hf.kernels import reference
from pkv_hf.kernels.checks.attention import poisoned_scratch, rms
from pkv_hf.kernels.checks.layers import Draw
from pkv_hf.kernels.checks.scaled import drawn_scaled, in_dtype
from pkv_hf.kernels.launch import has_dtypes
from pkv_hf.kernels.linear import gated, linear
from pkv_hf.kernels.products.blocks import Block, choose_block, padded, scratch
from pkv_hf.kernels.products.scales import OF_BLOCKS, OF_ROWS, Scales

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
@pytest.mark.parametrize("rows", [1, 2, 67])
@pytest.mark.parametrize(
    ("inputs", "outputs", "offset", "scale", "activation"),
    [
        (96, (40, 24, 24), 0.0, 1.0, None),
        (640, (100, 100, 100), 1.0, 1.0, None),
        (4096, (9,), 0.0, 1.0, None),
        (576, (70,), 1.0, 0.22, None),
        (96, (70,), 0.0, 1.0, "relu2"),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(rows, inputs, outputs, offset, scale, activation, bias, dtype):
    x = drawn(rows, inputs, dtype=dtype)
    weights = [drawn(count, inputs, dtype=dtype, scale=inputs**-0.5) for count in outputs]
    biases = [drawn(count, dtype=dtype) if bias else None for count in outputs]
    norm = drawn(inputs, dtype=dtype) if rows == 1 else None
    residual = drawn(rows, outputs[0], dtype=dtype) if len(outputs) == 1 and not activation else None

    def by_torch(x, norm, residual, weights, biases):
        x = x if norm is None else reference.rms_norm(x, norm, EPS, offset)
        y = torch.cat([functional.linear(x, w, b) for w, b in zip(weights, biases)], dim=1)
        y = scale * (reference.activation(y, activation) if activation else y)
        return y if residual is None else y + residual

    with poisoned_scratch():
        settings = {"residual": residual, "scale": scale, "activation": activation}
        ours = linear(x, weights, biases, norm=norm, eps=EPS, offset=offset, **settings)
    theirs = by_torch(x, norm, residual, weights, biases)
    exact = by_torch(*double([x, norm, residual]), double(weights), double(biases))
    judge(ours, theirs, exact)


def whole(*shape: int, dtype: torch.dtype, unit: float) -> torch.Tensor:
    """Multiples of a power of two: float32 holds sums of their products exactly, in any order."""
    return torch.randint(-64, 65, shape, device=DEVICE).to(dtype) * unit


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_products_are_rounded_as_transformers_rounds_them(rows, dtype):
    """Before a residual is added, before a multiplier, an activation and after, before gate and up are multiplied."""
    x, residual = whole(rows, 96, dtype=dtype, unit=2**-10), whole(rows, 200, dtype=dtype, unit=2**-6)
    weight, up = (whole(200, 96, dtype=dtype, unit=2**-3) for _ in range(2))
    bias = whole(200, dtype=dtype, unit=2**-6)
    exact = functional.linear(x.double(), weight.double(), bias.double())
    expected = exact.to(dtype) + residual
    assert not torch.equal(expected, (exact + residual).to(dtype)), "rounding once was to differ"
    assert torch.equal(linear(x, [weight], [bias], residual=residual), expected)
    expected = exact.to(dtype) * 0.22 + residual
    assert not torch.equal(expected, ((exact * 0.22).to(dtype) + residual)), "rounding once less was to differ"
    assert torch.equal(linear(x, [weight], [bias], residual=residual, scale=0.22), expected)
    expected = reference.activation(exact.to(dtype), "relu2")
    assert not torch.equal(expected, reference.activation(exact, "relu2").to(dtype)), "rounding once was to differ"
    assert torch.equal(linear(x, [weight], [bias], activation="relu2"), expected)
    active, upper = (functional.linear(x.double(), each.double()).to(dtype) for each in (weight, up))
    assert same(gated(x, weight, up), functional.silu(active) * upper)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "activation", "offset"),
    [
        (1, 96, 40, "gelu_tanh", 1.0),
        (1, 1100, 130, "silu", 0.0),
        (1, 640, 130, "gelu", 0.0),
        (16, 640, 130, "gelu_tanh", 0.0),
        (80, 640, 130, "gelu", 0.0),
        (3, 1100, 4100, "silu", 0.0),
    ],
)
def test_gated(rows, inputs, outputs, activation, offset, dtype):
    """gate and up are halves of one weight."""
    x = drawn(rows, inputs, dtype=dtype)
    weight = drawn(2 * outputs, inputs, dtype=dtype, scale=inputs**-0.5)
    bias = drawn(2 * outputs, dtype=dtype) if activation != "silu" else None
    norm = drawn(inputs, dtype=dtype) if rows == 1 else None

    def by_torch(x, norm, weight, bias):
        x = x if norm is None else reference.rms_norm(x, norm, EPS, offset)
        gate, up = functional.linear(x, weight, bias).chunk(2, dim=1)
        return reference.activation(gate, activation) * up

    biases = (None, None) if bias is None else bias.chunk(2)
    with poisoned_scratch():
        ours = gated(
            x, *weight.chunk(2), activation, norm=norm, eps=EPS, offset=offset, bias_gate=biases[0], bias_up=biases[1]
        )
    judge(ours, by_torch(x, norm, weight, bias), by_torch(*double([x, norm, weight, bias])))


EIGHT = [torch.zeros(8, 64, dtype=torch.int8)]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(2, 64)}, "float32"),
        ({"x": torch.zeros(81, 64, dtype=torch.float16)}, "1 to 80"),
        ({"x": torch.zeros(2, 32, dtype=torch.float16)}, r"weights\[0\]"),
        ({"weights": [torch.zeros(8, 64)]}, r"weights\[0\] is torch.float32"),
        ({"weights": [torch.zeros(8, 64, dtype=torch.float16)] * 4}, "4 weights"),
        ({"weights": [torch.zeros(8, 64, dtype=torch.int8)]}, r"weights\[0\] is torch.int8"),
        ({"scales": Scales((torch.ones(8),))}, r"weights\[0\] is torch.float16 .* in torch.int8"),
        ({"weights": EIGHT, "scales": Scales((torch.ones(8),) * 2)}, "scales are of 2 weights: want 1"),
        ({"weights": EIGHT, "scales": Scales((torch.ones(8).half(),))}, r"scales.tensors\[0\] is torch.float16 \[8\]"),
        ({"weights": EIGHT, "scales": Scales((torch.ones(1, 2),))}, r"contiguous float32 \[1, 1\]"),
        ({"norm": torch.zeros(64, dtype=torch.float16)}, "norm with 2 rows"),
        ({"residual": torch.zeros(2, 8)}, "residual is torch.float32"),
        ({"activation": "mish"}, "activation='mish' is not one of silu"),
        ({"activation": "relu", "residual": torch.zeros(2, 8, dtype=torch.float16)}, "activation='relu' with a res"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_bad_arguments_are_named(change, named):
    arguments = {"x": torch.zeros(2, 64, dtype=torch.float16), "weights": [torch.zeros(8, 64, dtype=torch.float16)]}
    with pytest.raises(ValueError, match=named):
        linear(**{**arguments, **change})


def test_one_bias_of_two_is_refused():
    x, weight = torch.zeros(1, 64, dtype=torch.float16), torch.zeros(8, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match="bias_up is None"):
        gated(x, weight, weight, bias_gate=weight[:, 0].contiguous())


@pytest.fixture(params=[1, 3], ids="parts={}".format)
def any_block(request, monkeypatch):
    """Launches of several rows are cut into blocks of 32 outputs and 64 inputs, in at most so many parts."""
    block = Block(32, 64, 2, parts=request.param)
    monkeypatch.setattr(linear_module, "choose_block", lambda *_: block)
    launches: list[int] = []
    add_parts = linear_module.add_parts
    monkeypatch.setattr(linear_module, "add_parts", lambda *a, **b: launches.append(len(a[0])) or add_parts(*a, **b))
    yield
    assert set(launches) == ({3} if block.parts == 3 else set())


@pytest.mark.parametrize("rows", [2, 16, 17, 33, 64, 65, 80])
def test_every_count_of_rows_in_any_block(rows, any_block):
    """Ragged outputs and inputs, every epilogue; rows before and after, and what is unwritten, are NaN."""
    dtype, inputs = HALVES[rows % 2], 5 * 64 + 7 if rows % 3 else 6 * 64
    around = torch.full((rows + 4, inputs), float("nan"), dtype=dtype, device=DEVICE)
    x = around[2:-2].copy_(drawn(rows, inputs, dtype=dtype))
    weights = [drawn(count, inputs, dtype=dtype, scale=inputs**-0.5) for count in (41, 9, 33)]
    biases = [drawn(len(weight), dtype=dtype) for weight in weights]
    residual = drawn(rows, 41, dtype=dtype)
    pair = [weights[0], drawn(41, inputs, dtype=dtype, scale=inputs**-0.5)]
    pair_biases = [biases[0], drawn(41, dtype=dtype)]

    def by_torch(x, weights, biases, residual, pair, pair_biases):
        of_three = [functional.linear(x, w, b) for w, b in zip(weights, biases)]
        gate, up = (functional.linear(x, w, b) for w, b in zip(pair, pair_biases))
        return (
            torch.cat(of_three, dim=1),
            torch.cat(of_three[1:], dim=1),
            residual + 0.22 * of_three[0],
            0.22 * functional.silu(of_three[1]),
            functional.silu(gate) * up,
        )

    with poisoned_scratch():
        ours = (
            linear(x, weights, biases),
            linear(x, weights[1:], biases[1:]),
            linear(x, weights[:1], biases[:1], residual=residual, scale=0.22),
            linear(x, weights[1:2], biases[1:2], activation="silu", scale=0.22),
            gated(x, *pair, bias_gate=pair_biases[0], bias_up=pair_biases[1]),
        )
    given = x, weights, biases, residual, pair, pair_biases
    exact = by_torch(*(each.double() if isinstance(each, torch.Tensor) else double(each) for each in given))
    for mine, theirs, expected in zip(ours, by_torch(*given), exact, strict=True):
        judge(mine, theirs, expected)


@pytest.mark.parametrize("shared_kib", [64, 99, 163, 227])
@pytest.mark.parametrize("weights", [1, 2])
@pytest.mark.parametrize("rows", [2, 16, 17, 48, 80])
@pytest.mark.parametrize("outputs", [512, 28672])
def test_blocks_fit_shared_memory(outputs, rows, weights, shared_kib):
    block = choose_block(rows, 4096, outputs, weights, 132, shared_kib * 1024, 8)
    held = weights * block.outputs + sum(padded(rows))
    assert block.num_stages * held * block.inputs * 2 <= shared_kib * 1024
    parts = block.cut(4096)[0]
    assert (parts > 1) == (outputs == 512)
    assert parts == 1 or parts * rows * weights * outputs * 4 <= scratch(rows, 132)


@pytest.mark.parametrize(("major", "taken"), [(7, [True, True, False, False]), (8, [True, True, True, False])])
def test_which_products_are_ours(major, taken, monkeypatch):
    """Up to 80 rows; where there are no tensor cores for them, up to 16 of wide layers, in one part."""
    monkeypatch.setattr(linear_module, "capability", lambda _: (major, 0))
    monkeypatch.setattr(linear_module, "device_limits", lambda _: (40, 64 * 1024))
    rows = [torch.empty(count, 4096, dtype=torch.float16) for count in (1, 16, 17, 81)]
    assert [linear_module.outruns_cublas(x, 640) for x in rows] == taken
    assert linear_module.outruns_cublas(rows[1], 512) == (major > 7)
    assert (linear_module._block(rows[1], 512, 1).parts > 1) == (major > 7)


def test_parts_of_inputs_are_whole_blocks_and_none_is_empty():
    for blocks in range(1, 40):
        for most in range(1, 9):
            parts, of_part = Block(64, 64, 3, parts=most).cut(64 * blocks - 5)
            assert parts <= most
            assert (parts - 1) * of_part < blocks <= parts * of_part


@pytest.mark.parametrize("rows", [1, 66])
@pytest.mark.parametrize(
    ("held", "of", "unit"), [(torch.int8, OF_ROWS, 1 / 127), (torch.float8_e4m3fn, OF_BLOCKS, 1.0)]
)
def test_scales_of_more_than_one_block_of_outputs_and_of_inputs(held, of, unit, rows):
    if not has_dtypes(torch.device(DEVICE), held):
        pytest.skip("this GPU does not convert fp8")
    draw = Draw(secrets.randbits(31), torch.bfloat16, True, DEVICE)
    weights, scales = drawn_scaled(draw, (136, 136), 144, held, of, 1 / 127)
    x = draw(rows, 144)
    with poisoned_scratch():
        ours = gated(x, *weights, "gelu", scales=scales), linear(x, [*weights, weights[0]], scales=third(scales))

    def by_torch(dtype):
        gate, up = (functional.linear(x.to(dtype), weight) for weight in in_dtype(weights, scales, dtype))
        return functional.gelu(gate) * up, torch.cat([gate, up, 3 * gate], dim=1)

    for each in zip(ours, by_torch(x.dtype), by_torch(torch.float64)):
        judge(*each)


def third(scales):
    """The scales, and those of the first weight three times as large for a third."""
    return scales._replace(tensors=(*scales.tensors, 3 * scales.tensors[0]))
