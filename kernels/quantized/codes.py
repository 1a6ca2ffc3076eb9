"""The 16 values of 4 bits, and how a GPU finds them in registers.

NF4 is of Dettmers et al. 2023 (QLoRA), FP4 has a sign, two bits of exponent and one of mantissa; both are scaled to a
largest value of 1. bitsandbytes packs two weights a byte, the first one in the high four bits.

One row's sums take words of eight weights, and look them up in lanes: a warp holds the table, lane l has value l % 16,
and `shfl` gives a thread the value of the lane that a weight names. It takes the low five bits of an index, so that a
shift alone brings a weight there. Beside tensor cores, whose operands take the same way, that is slower than by bytes:
`prmt` picks four bytes out of eight by four selectors of 4 bits. Tables of the values' low and of their high bytes take
four registers each, two for values 0 to 7 and two for 8 to 15. Both halves are asked, bit 3 of the weights picks one,
and low and high bytes are put together. Four elements of 16 bits, of four weights each, are taken at a time: two
registers, as are the values of a place in them. Weights of a place are first laced into each other, so that they lie as
their values have to.

Evenly spaced values are computed: 4 bits in the mantissa of 128 (bf16) or 1,024 (fp16) make a number from which the
values' distance is known. One `lop3` puts two there, one `fma` takes both back to -8 to 7, exactly.
"""

from __future__ import annotations

import functools
from typing import TypeAlias

import torch

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_MAGNITUDES = (0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
FP4 = (*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES))
EVEN = {"uint4": tuple(float(i - 8) for i in range(16)), "int4": tuple(float((i ^ 8) - 8) for i in range(16))}
LOOKED_UP = {"nf4": NF4, "fp4": FP4}
VALUES = {**LOOKED_UP, **EVEN}

Instruction: TypeAlias = "tuple[str, str, tuple[str | int, ...]]"
"""An operation, the register that it writes, and what it reads: registers, or numbers of 32 bits. `lop3`'s last number
is its table of truth: 0xE4 takes bits of the first where the third has ones, of the second elsewhere, and 0x6A is the
first and the second, exclusively or the third. `fma` is of two elements, and named with their type."""

TABLE = tuple(f"table{i}" for i in range(8))
ZERO = "%lanemask_lt"
"""Its highest bit is never set, which compilers do not know: they would make constants anew for every `prmt`."""

LANE = "mov.u32 $0, %laneid; and.b32 $0, $0, $1;"
"""The lane of a thread, among as many as $1 has ones."""
LANE_CONSTRAINTS = "=&r,r"

WEIGHT_CONSTRAINTS, ELEMENTS_CONSTRAINTS = "=r,r,r", "=&r,=&r,r,r"
"""Of the texts below: results, what is packed, and the lanes' table."""


@functools.cache
def values(quant_type: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The 16 values rounded to a half type, on a device."""
    return torch.tensor(VALUES[quant_type], device=device).to(dtype)


def bits(quant_type: str, dtype: torch.dtype) -> list[int]:
    """The 16 values rounded to a half type, as their 16 bits."""
    return [int(value) & 0xFFFF for value in values(quant_type, dtype, torch.device("cpu")).view(torch.int16)]


def words(quant_type: str, dtype: torch.dtype) -> list[int]:
    """The 16 values' low bytes in four words of 32 bits, then their high bytes."""
    table = bits(quant_type, dtype)
    held = [value & 0xFF for value in table] + [value >> 8 for value in table]
    return [int.from_bytes(bytes(held[at : at + 4]), "little") for at in range(0, 32, 4)]


def by_lanes(weight: int) -> list[Instruction]:
    """How a word of 32 bits, $1, becomes the value of its weight 0 to 7, as the lanes' table $2 has it."""
    return [("shr", "index", ("$1", 4 * (weight ^ 1))), ("shfl", "$0", ("$2", "index"))]


def by_bytes(table: list[int], place: int) -> list[Instruction]:
    """How four elements, $2 and $3, become the values of their weights at a place of 0 to 3, $0 and $1.

    `table` is as `words` gives it. Compilers find what is the same for other places, and do it once.
    """
    low = place % 2  # in the low four bits of a byte
    made: list[Instruction] = [
        ("mov", "zero", (ZERO,)),
        ("and", "zero", ("zero", 0x80000000)),
        ("xor", "unmoved", ("zero", 0x32103210)),
        *(("xor", name, ("zero", word)) for name, word in zip(TABLE, table)),
        ("prmt", "a", ("$2", "$3", 0x5410)),
        ("prmt", "b", ("$2", "$3", 0x7632)),
        ("shl", "b", ("b", 4)) if low else ("shr", "a", ("a", 4)),
        ("lop3", "a", ("a", "b", 0x0F0F0F0F, 0xE4)),
        ("and", "index", ("a", 0x77777777)),
        ("shr", "upper", ("a", 1)),
        ("and", "upper", ("upper", 0x44444444)),
        ("or", "upper", ("upper", "unmoved")),
    ]
    for result in ("$0", "$1"):
        for half, of_half in zip(("lows", "highs"), (TABLE[:4], TABLE[4:])):
            made += [
                ("prmt", half, (*of_half[:2], "index")),
                ("prmt", "other", (*of_half[2:], "index")),
                ("prmt", half, (half, "other", "upper")),
            ]
        made.append(("prmt", result, ("lows", "highs", 0x7362 if place > 1 else 0x5140)))
        if result == "$0":
            made += [("shr", "index", ("index", 16)), ("shr", "upper", ("upper", 16))]
    return made


def of_even(quant_type: str, dtype: torch.dtype, place: int) -> list[Instruction]:
    """As `by_bytes`, of evenly spaced values; a place is of 4 bits, the lowest first."""
    base, one, kind = {
        torch.bfloat16: (0x4300, 0x3F80, "bf16x2"), torch.float16: (0x6400, 0x3C00, "f16x2"),
    }[dtype]  # fmt: skip
    sign = 8 * (quant_type == "int4")  # of two's complement: with it changed, 4 bits count from -8
    both = lambda half: half << 16 | half  # noqa: E731
    made: list[Instruction] = [("mov", "one", (both(one),)), ("mov", "base", (both(base + 8 | 0x8000),))]
    for result, packed in (("$0", "$2"), ("$1", "$3")):
        source = packed
        if place:
            source = "shifted"
            made.append(("shr", source, (packed, 4 * place)))
        made += [
            ("lop3", "held", (source, 0x000F000F, both(base | sign), 0x6A)),
            (f"fma.rn.{kind}", result, ("held", "one", "base")),
        ]
    return made


def ptx(made: list[Instruction]) -> str:
    """Instructions as PTX has them."""
    kinds = {"mov": "mov.u32", "shr": "shr.u32", "shfl": "shfl.sync.idx.b32"}
    lines, registers = [], {target for _, target, _ in made if not target.startswith("$")}
    for operation, target, sources in made:
        operands = [source if isinstance(source, str) else f"0x{source:08x}" for source in sources]
        if operation == "shfl":
            operands += ["0x1f", "0xffffffff"]
        kind = operation if "." in operation else kinds.get(operation, f"{operation}.b32")
        lines.append(f"{kind} {target}, {', '.join(operands)};")
    return f"{{ .reg .b32 {', '.join(sorted(registers))}; {' '.join(lines)} }}"


WEIGHTS_PTX = tuple(ptx(by_lanes(weight)) for weight in range(8))


@functools.cache
def texts(quant_type: str, dtype: torch.dtype) -> tuple[str, ...]:
    """`of_even` or `by_bytes` for every place."""
    if quant_type in EVEN:
        return tuple(ptx(of_even(quant_type, dtype, place)) for place in range(4))
    return tuple(ptx(by_bytes(words(quant_type, dtype), place)) for place in range(4))
