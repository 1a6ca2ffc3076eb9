"""Products with weights of 4 bits: how values are looked up, and what launches take. Fuzzing has the products."""

from __future__ import annotations

import itertools
import secrets

import pytest
import torch

pytest.importorskip("triton")

from pkv_hf.kernels.checks.attention import poisoned_scratch, rms
from pkv_hf.kernels.checks.layers import Draw
from pkv_hf.kernels.checks.quantized import drawn_weight
from pkv_hf.kernels.products.epilogue import Parts
from pkv_hf.kernels.quantized import codes
from pkv_hf.kernels.quantized import linear4 as module
from pkv_hf.kernels.quantized.blocks import Block4, choose_block, most_rows
from pkv_hf.kernels.quantized.linear4 import gated4, in_parts4, linear4
from pkv_hf.kernels.quantized.weights import GROUPS, LAYOUTS, Nested, Weight4, dequantized

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.float16, torch.bfloat16)
ALL = (1 << 32) - 1


def run(made, lanes=(), **registers):
    """What instructions leave in registers of 32 bits, as PTX has them, in a warp whose lanes hold a table."""

    def prmt(a, b, selector):
        held = (a | b << 32).to_bytes(8, "little")
        picked = [(selector >> (4 * i)) & 15 for i in range(4)]
        signs = [held[pick & 7] >> 7 for pick in picked]
        return int.from_bytes(
            bytes(0xFF * sign if pick & 8 else held[pick] for pick, sign in zip(picked, signs)), "little"
        )

    def lop3(a, b, c, truth):
        bits = ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1) for i in range(32))
        return sum((truth >> bit & 1) << i for i, bit in enumerate(bits))

    operations = {
        "mov": lambda a: a, "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
        "shl": lambda a, b: a << b & ALL, "shr": lambda a, b: a >> b, "prmt": prmt, "lop3": lop3,
        "shfl": lambda _, lane: lanes[lane % 32],
    }  # fmt: skip
    registers[codes.ZERO] = (1 << secrets.randbelow(32)) - 1
    for operation, target, sources in made:
        read = [registers.get(source) if isinstance(source, str) else source for source in sources]
        registers[target] = operations[operation](*read)
    return registers


def around(byte, at, count):
    others = [secrets.randbelow(256) for _ in range(count - 1)]
    return bytes([*others[:at], byte, *others[at:]])


def weights_in(held):
    return [index for each in held for index in (each >> 4, each & 15)]


def test_lanes_have_the_values_of_every_byte():
    values = [secrets.randbits(32) for _ in range(16)]
    for byte in range(256):
        for at in range(4):
            held = around(byte, at, 4)
            word = {"$1": int.from_bytes(held, "little")}
            found = [run(codes.by_lanes(weight), values * 2, **word)["$0"] for weight in range(8)]
            assert found == [values[index] for index in weights_in(held)]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("quant_type", codes.LOOKED_UP)
def test_bytes_have_the_values_of_every_byte_at_every_place(quant_type, dtype):
    table, values = codes.words(quant_type, dtype), codes.bits(quant_type, dtype)
    for byte in range(256):
        for at in range(8):
            held = around(byte, at, 8)  # four elements of two bytes
            packed = {"$2": int.from_bytes(held[:4], "little"), "$3": int.from_bytes(held[4:], "little")}
            for place in range(4):
                found = run(codes.by_bytes(table, place), **packed)
                of_place = [found[result] >> shift & 0xFFFF for result in ("$0", "$1") for shift in (0, 16)]
                assert of_place == [values[index] for index in weights_in(held)[place::4]]


def test_the_text_is_the_instructions():
    table = codes.words("nf4", torch.float16)
    lists = [*map(codes.by_lanes, range(8)), *(codes.by_bytes(table, place) for place in range(4))]
    texts = [*codes.WEIGHTS_PTX, *codes.texts("nf4", torch.float16)]
    for text, made in zip(texts, lists, strict=True):
        lines = [line.strip() for line in text.strip("{} ").split(";")[1:] if line.strip()]
        for line, (operation, target, sources) in zip(lines, made, strict=True):
            name, _, operands = line.partition(" ")
            assert name.split(".")[0] == operation
            read = [operand.strip() for operand in operands.split(",")]
            lanes = ["0x1f", "0xffffffff"] * (operation == "shfl")
            assert read == [target, *(s if isinstance(s, str) else f"0x{s:08x}" for s in sources), *lanes]


def test_values_and_order_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for quant_type in codes.LOOKED_UP:
        for nested in (False, True):
            weight = torch.randn(24, 128)
            packed, state = functional.quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested)
            of_scales = Weight4(packed, state.absmax, 24, 128, 64, quant_type)
            if nested:
                of_scales = of_scales._replace(nested=Nested(state.state2.code, state.state2.absmax, state.offset))
            torch.testing.assert_close(dequantized(of_scales, torch.float32), functional.dequantize_4bit(packed, state))


def weights_of(*outputs, inputs=192, dtype=torch.bfloat16, quant_type="nf4", nested=False, block=64):
    draw = Draw(secrets.randbits(31), dtype, True, DEVICE)
    return draw, [drawn_weight(draw, count, inputs, block, quant_type, nested) for count in outputs]


@pytest.mark.parametrize(
    ("rows", "form", "parts"),
    [(3, "columns", 3), (20, "weights", 2), (1, "threads", 1), (1, "sums", 1), (80, "columns", 1), (1, "columns", 1)],
)
def test_parts_and_ragged_sizes(rows, form, parts):
    outputs = 121  # of few elements, the ratio of two errors is chance
    draw, (weight, gate, up) = weights_of(outputs, outputs, outputs, inputs=64 * 7, nested=True)
    x, bias, residual = draw(rows, 64 * 7), draw(outputs), draw(rows, outputs)
    block = Block4(16, 128 if form != "columns" or rows > 8 else 256, 2, form, parts=parts)
    with poisoned_scratch():
        ours = (
            linear4(x, [weight], [bias], residual=residual, scale=0.22, block=block),
            gated4(x, gate, up, "gelu", block=block),
            linear4(x, [gate, up], [bias, bias], block=block),
        )

    def by_torch(dtype):
        full, of_gate, of_up = (dequantized(each, torch.float64).to(dtype) for each in (weight, gate, up))
        wide = x.to(dtype)
        return (
            residual.to(dtype) + 0.22 * torch.nn.functional.linear(wide, full, bias.to(dtype)),
            torch.nn.functional.gelu(wide @ of_gate.T) * (wide @ of_up.T),
            torch.cat([wide @ of_gate.T + bias.to(dtype), wide @ of_up.T + bias.to(dtype)], dim=1),
        )

    for mine, theirs, exact in zip(ours, by_torch(x.dtype), by_torch(torch.float64)):
        assert torch.isfinite(mine).all()
        assert rms(mine - exact) <= 2 * rms(theirs - exact)


def test_what_is_left_in_parts_adds_up(monkeypatch):
    draw, (weight,) = weights_of(24, inputs=512)
    x, bias = draw(5, 512), draw(24)
    monkeypatch.setattr(module, "choose_block", lambda *_, **__: Block4(16, 256, 2, "columns", parts=2))
    left = in_parts4(x, weight, bias)
    assert isinstance(left, Parts)
    assert len(left.sums) == 2
    torch.testing.assert_close((left.sums.sum(0) + bias).to(x.dtype), linear4(x, [weight], [bias]))
    monkeypatch.setattr(module, "choose_block", lambda *_, **__: Block4(16, 256, 2, "columns"))
    assert in_parts4(x, weight, bias) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(2, 192)}, "x is torch.float32"),
        ({"x": torch.zeros(81, 192, dtype=torch.bfloat16)}, "1 to 80"),
        ({"x": torch.zeros(2, 64, dtype=torch.bfloat16)}, r"weights\[0\] has 192 inputs"),
        ({"weights": {"quant_type": "nf3"}}, "quant_type='nf3'"),
        ({"weights": {"block": 48}}, "blocks of 48"),
        ({"weights": {"absmax": torch.zeros(3)}}, r"weights\[0\].absmax is torch.float32 \[3\]"),
        ({"weights": {"packed": torch.zeros(8 * 96, dtype=torch.int8)}}, r"weights\[0\].packed is torch.int8"),
        ({"norm": torch.zeros(192, dtype=torch.bfloat16)}, "norm with 2 rows"),
        ({"residual": torch.zeros(2, 8)}, "residual is torch.float32"),
        ({"activation": "mish"}, "activation='mish' is not one of silu"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_bad_arguments_are_named(change, named):
    _, (weight,) = weights_of(8)
    changed = weight._replace(**change["weights"]) if "weights" in change else weight
    arguments = {"x": torch.zeros(2, 192, dtype=torch.bfloat16), **change, "weights": [changed]}
    with pytest.raises(ValueError, match=named):
        linear4(**arguments)


def test_weights_of_two_kinds_are_refused():
    _, (a, b) = weights_of(8, 8)
    x = torch.zeros(1, 192, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="up is of another kind"):
        gated4(x, a, b._replace(quant_type="fp4"))


@pytest.mark.parametrize("shared_kib", [99, 163, 227])
@pytest.mark.parametrize("weights", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 17, 48, 80])
@pytest.mark.parametrize("outputs", [512, 28672])
def test_blocks_fit_shared_memory(outputs, rows, weights, shared_kib):
    for group, layout in itertools.product(GROUPS, LAYOUTS):
        of_group = choose_block(rows, 4096, outputs, weights, 132, shared_kib * 1024, group, layout)
        assert of_group.shared_memory(rows, weights, group) <= shared_kib * 1024
        one_row = "threads" if layout == "bytes" else "sums"
        in_columns = layout != "bytes" and rows <= group / 8
        assert of_group.form == (one_row if rows == 1 else "columns" if in_columns else "weights")
    block = choose_block(rows, 4096, outputs, weights, 132, shared_kib * 1024, 64, "bytes")
    assert (block.cut(4096)[0] > 1) == (outputs == 512 and rows > 1)
    assert sum(block.padded(rows, 64)) >= rows


@pytest.mark.parametrize(("major", "most"), [(7, 1), (8, 80), (9, 80), (12, 80)])
def test_rows_by_capability(major, most):
    assert most_rows((major, 0)) == most


def test_a_norm_that_may_overflow_is_taken_in_float32(monkeypatch):
    draw, (weight,) = weights_of(8, dtype=torch.float16)
    x, norm = draw(1, 192) * 2000, draw(192).abs() + 60
    exact = (x.double() * norm.double() / x.double().square().mean().sqrt()) @ dequantized(weight, torch.float64).T
    torch.testing.assert_close(linear4(x, [weight], norm=norm).double(), exact, atol=0.2, rtol=0.01)
