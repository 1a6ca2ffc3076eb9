"""Products with evenly spaced weights of 4 bits: how values are found, how libraries pack them, what kernels do."""

from __future__ import annotations

import secrets

import pytest
import torch

pytest.importorskip("triton")

from weights.packed4 import gptq, plain, tinygemm, words_of

from pkv_hf.kernels.checks.attention import poisoned_scratch, rms
from pkv_hf.kernels.checks.layers import Draw
from pkv_hf.kernels.checks.quantized import drawn_int4
from pkv_hf.kernels.quantized import codes
from pkv_hf.kernels.quantized.blocks import Block4
from pkv_hf.kernels.quantized.linear4 import gated4, linear4
from pkv_hf.kernels.quantized.weights import Int4, dequantized

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.float16, torch.bfloat16)
KINDS = [
    ("rows", "groups"), ("rows", "shifted"), ("words", "groups"), ("words", "zeros"), ("words", "zeros from 1"),
    ("tiles", "pairs"),
]  # fmt: skip


def run(instructions, registers, dtype):
    """What instructions leave in registers of 32 bits, as PTX has them; a `fma` is of two halves."""

    def halves(word):
        return torch.tensor([word & 0xFFFF, word >> 16]).to(torch.uint16).view(dtype).double()

    def fma(a, b, c):
        low, high = (halves(a) * halves(b) + halves(c)).to(dtype).view(torch.uint16).tolist()
        return high << 16 | low

    def lop3(a, b, c, truth):
        bits = ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1) for i in range(32))
        return sum((truth >> bit & 1) << i for i, bit in enumerate(bits))

    operations = {"mov": lambda a: a, "shr": lambda a, b: a >> b, "lop3": lop3, "fma": fma}
    for operation, target, sources in instructions:
        values = [registers[source] if isinstance(source, str) else source for source in sources]
        registers[target] = operations[operation.split(".")[0]](*values)
    return registers


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("code", codes.EVEN)
def test_the_instructions_find_every_value_at_every_place(code, dtype):
    for value in range(16):
        for place in range(4):
            elements = [secrets.randbits(16) for _ in range(4)]
            of_place = [element >> 4 * place & 15 for element in elements]
            at = secrets.randbelow(4)
            elements[at] += (value - of_place[at]) << 4 * place
            of_place[at] = value
            registers = {
                "$2": elements[0] | elements[1] << 16,
                "$3": elements[2] | elements[3] << 16,
            }
            run(codes.of_even(code, dtype, place), registers, dtype)
            held = [registers[result] >> shift & 0xFFFF for result in ("$0", "$1") for shift in (0, 16)]
            found = torch.tensor(held).to(torch.uint16).view(dtype).tolist()
            assert found == [codes.EVEN[code][index] for index in of_place]


def test_the_text_names_what_it_computes_with():
    assert "fma.rn.bf16x2 $1, held, one, base;" in codes.texts("int4", torch.bfloat16)[3]
    assert "fma.rn.f16x2 $0, held, one, base;" in codes.texts("uint4", torch.float16)[0]
    assert "shr" not in codes.texts("uint4", torch.float16)[0]


@pytest.mark.parametrize(("outputs", "inputs"), [(24, 128), (11, 1152), (8, 32)])
def test_weights_stand_for_what_libraries_packed(outputs, inputs):
    values, block = torch.randint(16, (outputs, inputs)), 32
    groups = inputs // block
    scale, shift = torch.rand(groups, outputs) + 0.1, torch.randn(groups, outputs)
    exact = (values - 8) * scale.T.repeat_interleave(block, 1)
    shape = outputs, inputs, block
    shifted = exact + shift.T.repeat_interleave(block, 1)
    packed, pairs = tinygemm(values, scale, shift)
    found = [
        (Int4(plain(values - 8), scale, shift, *shape, "int4", "rows", "shifted"), shifted),
        (Int4(packed, pairs, None, *shape, "uint4", "tiles", "pairs"), shifted),
        (Int4(gptq(values), scale, None, *shape, "uint4", "words", "groups"), exact),
    ]
    if outputs % 8 == 0:
        zeros = torch.randint(1, 16, (groups, outputs))
        exact = (values - zeros.T.repeat_interleave(block, 1)) * scale.T.repeat_interleave(block, 1)
        for scaled, stored in (("zeros", zeros), ("zeros from 1", zeros - 1)):
            words = words_of(stored.view(groups, -1, 8))
            found.append((Int4(gptq(values), scale, words, *shape, "uint4", "words", scaled), exact))
    for weight, expected in found:
        assert weight.wrong() == ""
        torch.testing.assert_close(dequantized(weight, torch.float32), expected)
        for count in (8, outputs + 5 & -8):
            part = weight.first(count)
            assert part.wrong() == ""
            torch.testing.assert_close(dequantized(part, torch.float32), expected[:count])


@pytest.mark.parametrize(
    ("rows", "form", "parts"), [(3, "columns", 3), (20, "weights", 2), (1, "sums", 1), (80, "weights", 1)]
)
@pytest.mark.parametrize(("layout", "scaled"), KINDS)
def test_parts_and_ragged_sizes(layout, scaled, rows, form, parts):
    outputs, block = 56 + (not scaled.startswith("zeros")), secrets.choice((32, 64, 128))
    inputs, dtype = block * (256 // block + 1), secrets.choice(HALVES)
    draw = Draw(secrets.randbits(31), dtype, True, DEVICE)
    code = secrets.choice([*codes.EVEN])
    weight, gate, up = (drawn_int4(draw, outputs, inputs, block, code, layout, scaled) for _ in range(3))
    x, bias, residual = draw(rows, inputs), draw(outputs), draw(rows, outputs)
    norm = draw(inputs) if form == "sums" else None
    cut = Block4(16, 128 if form != "columns" else 256, 2, form, parts=parts)
    with poisoned_scratch():
        ours = (
            linear4(x, [weight], [bias], residual=residual, scale=0.22, norm=norm, eps=0.1, block=cut),
            gated4(x, gate, up, "gelu", norm=norm, eps=0.1, block=cut),
            linear4(x, [gate, up], [bias, bias], norm=norm, eps=0.1, block=cut),
        )

    def by_torch(dtype):
        made = torch.promote_types(dtype, torch.float32)
        full, of_gate, of_up = (dequantized(each, made).to(dtype) for each in (weight, gate, up))
        wide = x.to(dtype)
        if norm is not None:
            wide = torch.nn.functional.rms_norm(wide, (inputs,), norm.to(dtype), 0.1)
        return (
            residual.to(dtype) + 0.22 * torch.nn.functional.linear(wide, full, bias.to(dtype)),
            torch.nn.functional.gelu(wide @ of_gate.T) * (wide @ of_up.T),
            torch.cat([wide @ of_gate.T + bias.to(dtype), wide @ of_up.T + bias.to(dtype)], dim=1),
        )

    for mine, theirs, exact in zip(ours, by_torch(x.dtype), by_torch(torch.float64)):
        assert torch.isfinite(mine).all()
        assert rms(mine - exact) <= 2 * rms(theirs - exact)


def weight_of(layout="words", scaled="zeros", dtype=torch.bfloat16, **changed):
    draw = Draw(secrets.randbits(31), dtype, True, DEVICE)
    return drawn_int4(draw, 16, 192, 64, "uint4", layout, scaled)._replace(**changed)


@pytest.mark.parametrize(
    ("weight", "named"),
    [
        (lambda: weight_of(packed=torch.zeros(3, dtype=torch.int32)), r"weights\[0\].packed is torch.uint8 \[12\]"),
        (lambda: weight_of(scale=torch.zeros(48, dtype=torch.int8)), r"weights\[0\].scale is torch.int8 \[48\]"),
        (lambda: weight_of(zero=None), r"weights\[0\].zero is missing: want 6"),
        (lambda: weight_of("rows", "shifted", zero=torch.zeros(9)), r"weights\[0\].zero is torch.float32 \[9\]"),
        (lambda: weight_of(outputs=12, packed=torch.zeros(24, 12, dtype=torch.int32), scale=torch.zeros(3, 12)),
         r"weights\[0\].outputs=12: want a multiple of 8"),
        (lambda: weight_of("tiles", "pairs", scale=torch.zeros(3, 16, 2)), r"weights\[0\].scale is torch.float32"),
        (lambda: weight_of(block=16), "blocks of 16"),
    ],
)  # fmt: skip
def test_bad_weights_are_named(weight, named):
    with pytest.raises(ValueError, match=named):
        linear4(torch.zeros(2, 192, dtype=torch.bfloat16, device=DEVICE), [weight()])


def test_weights_of_two_kinds_are_refused():
    x = torch.zeros(1, 192, dtype=torch.bfloat16, device=DEVICE)
    for other in (weight_of("rows", "shifted"), weight_of(dtype=torch.float16), weight_of(scaled="groups")):
        with pytest.raises(ValueError, match=r"weights\[1\] is of another kind"):
            linear4(x, [weight_of(), other])


@pytest.mark.parametrize(("layout", "scaled"), [("rows", "shifted"), ("words", "zeros"), ("tiles", "pairs")])
def test_a_value_and_a_zero_point_that_cancel_are_rounded_once(layout, scaled):
    """Apart, their errors would be as large as what they are, and their sum is next to nothing."""
    weight = drawn_int4(Draw(0, torch.bfloat16, True, DEVICE), 24, 128, 128, "uint4", layout, scaled)
    flat = torch.full_like(weight.packed.view(torch.uint8), 0xFF)
    zero, scale = weight.zero, weight.scale
    if scaled == "zeros":
        zero = torch.full_like(zero, 0x11111111 * 14 - (1 << 32))
        scale = torch.full_like(scale, 0.1)
    elif scaled == "shifted":
        scale, zero = torch.full_like(scale, 0.1), torch.full_like(zero, -0.6)
    else:
        scale = torch.empty_like(scale)
        scale.view(-1, 2)[:] = torch.tensor([0.1, -0.6])
    weight = weight._replace(packed=flat.view(weight.packed.dtype), scale=scale, zero=zero)
    x, exact = torch.ones(1, 128, dtype=torch.bfloat16, device=DEVICE), dequantized(weight, torch.float64).sum(1)
    found = linear4(x, [weight], block=Block4(16, 128, 2, "weights"))
    torch.testing.assert_close(found[0].double(), exact, rtol=2**-7, atol=0)
