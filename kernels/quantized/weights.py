"""Weights of 4 bits as libraries store them, and in torch what they stand for."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch

from pkv_hf.kernels.quantized.codes import VALUES

GROUPS = (128, 64, 32)
"""Inputs that kernels multiply by one scale: the first that divides a weight's blocks, for few rows but the largest."""

FEW = 4
"""Rows that leave columns of a product idle also where groups are of 64 inputs."""

NESTED = 256
"""Scales of one second scale."""

LAYOUTS = ("bytes", "rows", "words", "tiles")
"""How packed weights lie: an output's after each other, the first of a byte in its high bits (bitsandbytes) or in its
low ones (torchao's plain tensors); in words of 8 inputs, `[inputs / 8, outputs]` (GPTQ); or in the tiles of torch's
tinygemm, 8 outputs by 128 inputs, padded to whole tiles and to 1,024 inputs."""

TILE, PADDED = 128, 1024
"""Inputs of a tile, and what a row of tiles is padded to."""

SCALES = ("blocks", "nested", "groups", "shifted", "pairs", "zeros", "zeros from 1")
"""What values are scaled by: a float32 for each block of a row, `[outputs, blocks]` (bitsandbytes), or 8 bits that
stand for one. All others are `[groups, outputs]` and of any float: a scale; a scale, and what is added beside it;
both in pairs (tinygemm); a scale, and a zero point of 4 bits, in words `[groups, outputs / 8]`, as it is or less 1."""


class Nested(NamedTuple):
    """What 8-bit scales stand for: code[scale] * absmax[i // 256] + offset."""

    code: torch.Tensor
    """Float32 `[256]`."""
    absmax: torch.Tensor
    """Float32, one for 256 scales."""
    offset: torch.Tensor
    """Float32 `[]`."""


class Weight4(NamedTuple):
    """A weight `[outputs, inputs]`: value[4 bits] * scale, a scale for `block` weights of a row after each other."""

    packed: torch.Tensor
    """uint8, two weights a byte, the first in the high four bits; contiguous, rows after each other."""
    absmax: torch.Tensor
    """The scales: float32, or uint8 where they are `nested`."""
    outputs: int
    inputs: int
    block: int
    quant_type: str
    """A name in `codes.VALUES`."""
    nested: Nested | None = None

    @property
    def layout(self) -> str:
        return "bytes"

    @property
    def scaled(self) -> str:
        """A name in `SCALES`."""
        return "blocks" if self.nested is None else "nested"

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """As kernels take them: weights four at a time, scales, and the scales' code, absmax and offset."""
        return self._as(torch.uint16)

    @property
    def words(self) -> tuple[torch.Tensor, ...]:
        """The same with weights eight at a time."""
        return self._as(torch.uint32)

    def _as(self, element: torch.dtype) -> tuple[torch.Tensor, ...]:
        return (self.packed.view(-1).view(element), self.absmax, *(self.nested or (self.absmax,) * 3))

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return self.packed.nbytes + self.absmax.nbytes + (self.nested.absmax.nbytes if self.nested else 0)

    def wrong(self) -> str:
        """What of the tensors kernels cannot take; empty for nothing."""
        count = self.outputs * self.inputs
        of_scales = (torch.float32 if self.nested is None else torch.uint8,)
        return _wrong("packed", self.packed, count // 2, (torch.uint8,)) or _wrong(
            "absmax", self.absmax, count // self.block, of_scales
        )

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        values = _values(self.quant_type, self.packed.view(-1), dtype, high_first=True).view(-1, self.block)
        return (values * self._scales(dtype)[:, None]).view(self.outputs, self.inputs)

    def _scales(self, dtype: torch.dtype) -> torch.Tensor:
        """The scale of every block of weights, `[outputs * inputs / block]`."""
        if self.nested is None:
            return self.absmax.to(dtype)
        code, absmax, offset = (each.to(dtype) for each in self.nested)
        return code[self.absmax.long()] * absmax.repeat_interleave(NESTED)[: len(self.absmax)] + offset


class Int4(NamedTuple):
    """A weight `[outputs, inputs]` of evenly spaced values: (4 bits - zero) * scale, both of `block` inputs."""

    packed: torch.Tensor
    """Of any integers, contiguous, in a `layout` of `LAYOUTS` but the first."""
    scale: torch.Tensor
    """float32, fp16 or bf16, contiguous, as `scaled` says."""
    zero: torch.Tensor | None
    """What `scaled` has beside scales: as those, or int32 where zero points are packed."""
    outputs: int
    inputs: int
    block: int
    quant_type: str
    """"uint4", 4 bits that stand for -8 to 7 (so that 8 is zero), or "int4", in two's complement."""
    layout: str
    scaled: str
    """A name in `SCALES` after the second."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """As those of `Weight4`: weights, scales, and what is beside scales in the place of a code."""
        zero = self.scale if self.zero is None else self.zero
        return (self.packed.view(-1).view(torch.uint16), self.scale, zero, self.scale, self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return self.packed.nbytes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)

    def wrong(self) -> str:
        """What of the tensors kernels cannot take; empty for nothing."""
        inputs, outputs = self.inputs, self.outputs
        if self.layout == "tiles":
            inputs, outputs = (-(-size // of) * of for size, of in ((inputs, PADDED), (outputs, 8)))
        count, groups = outputs * inputs // 2, inputs // self.block
        packed = self.packed.flatten().view(torch.uint8) if self.packed.is_contiguous() else self.packed
        found = _wrong("packed", packed, count, (torch.uint8,))
        found = found or _wrong("scale", self.scale, groups * outputs * (1 + (self.scaled == "pairs")), FLOATS)
        if self.scaled.startswith("zeros"):
            if outputs % 8:
                return found or f".outputs={outputs}: want a multiple of 8, with packed zero points"
            return found or _wrong("zero", self.zero, groups * outputs // 8, (torch.int32,))
        return found or (_wrong("zero", self.zero, groups * outputs, FLOATS) if self.scaled == "shifted" else "")

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        values = self._in_rows(dtype)
        scale, shift = (
            each.repeat_interleave(self.block, 1)[: self.outputs, : self.inputs] for each in self._scales(dtype)
        )
        return values * scale + shift

    def first(self, outputs: int) -> Int4:
        """A copy of its first outputs, a multiple of 8; itself where it has no more."""
        if outputs >= self.outputs:
            return self

        def cut(tensor: torch.Tensor, dim: int, of_all: int, count: int) -> torch.Tensor:
            return tensor.view(*((-1, of_all) if dim else (of_all, -1))).narrow(dim, 0, count).contiguous()

        tiles, zero = -(-self.outputs // 8), self.zero
        pairs = 2 * 8 * tiles if self.scaled == "pairs" else 0
        scale = cut(self.scale, 1, pairs or self.outputs, 2 * outputs if pairs else outputs)
        if zero is not None:
            each = 8 if self.scaled.startswith("zeros") else 1
            zero = cut(zero, 1, self.outputs // each, outputs // each)
        if self.layout == "words":
            packed = cut(self.packed, 1, self.outputs, outputs)
        else:
            rows, count = (tiles, outputs // 8) if self.layout == "tiles" else (self.outputs, outputs)
            packed = cut(self.packed, 0, rows, count)
        return self._replace(packed=packed, scale=scale, zero=zero, outputs=outputs)

    def _in_rows(self, dtype: torch.dtype) -> torch.Tensor:
        """Values `[outputs, inputs]`."""
        packed = self.packed.contiguous().view(-1).view(torch.uint8)
        values = _values(self.quant_type, packed, dtype, high_first=False)
        if self.layout == "words":
            return values.view(self.inputs // 8, self.outputs, 8).transpose(0, 1).reshape(self.outputs, self.inputs)
        if self.layout == "rows":
            return values.view(self.outputs, self.inputs)
        # Of a tile: output, 2 of 8 inputs, 32 of 128, of the 2 which, 8 of 32.
        tiles = values.view(-(-self.outputs // 8), -(-self.inputs // PADDED) * (PADDED // TILE), 8, 4, 4, 2, 4)
        rows = tiles.permute(0, 2, 1, 4, 6, 3, 5).reshape(len(tiles) * 8, -1)
        return rows[: self.outputs, : self.inputs]

    def _scales(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The scale of every group and what is added to values times it: [outputs, groups], tiles' padding too."""
        if self.scaled == "pairs":
            scale, shift = self.scale.view(-1, -(-self.outputs // 8) * 8, 2).to(dtype).unbind(2)
            return scale.T, shift.T
        scale = self.scale.view(-1, self.outputs).to(dtype).T
        if self.zero is None:
            return scale, torch.zeros_like(scale)
        if self.scaled == "shifted":
            return scale, self.zero.view(-1, self.outputs).to(dtype).T
        shifts = torch.arange(0, 32, 4, device=scale.device)
        zeros = (self.zero.view(-1, self.outputs // 8, 1) >> shifts & 15).flatten(1).T
        return scale, scale * (8 - zeros - int(self.scaled == "zeros from 1")).to(dtype)


FLOATS = (torch.float32, torch.float16, torch.bfloat16)

AnyWeight4: TypeAlias = Weight4 | Int4


def kind_of(weight: AnyWeight4) -> tuple[Any, ...]:
    """What weights of one launch have in common beside their inputs."""
    zero = weight.zero if isinstance(weight, Int4) else None
    dtypes = weight.tensors[1].dtype, None if zero is None else zero.dtype
    return weight.layout, weight.scaled, weight.quant_type, weight.block, dtypes


def group_of(weight: AnyWeight4, rows: int) -> int:
    """Inputs that kernels multiply rows of at a time by one scale. Raises ValueError where blocks are of no such."""
    for group in GROUPS if rows > FEW else GROUPS[1:]:
        if weight.block % group == 0 and weight.inputs % weight.block == 0:
            return group
    raise ValueError(f"blocks of {weight.block}: want a multiple of {GROUPS[-1]} that divides the inputs")


def dequantized(weight: AnyWeight4, dtype: torch.dtype) -> torch.Tensor:
    """The weight `[outputs, inputs]`, computed in a dtype: what kernels are judged by in float64."""
    return weight.dequantized(dtype)


def _values(quant_type: str, packed: torch.Tensor, dtype: torch.dtype, *, high_first: bool) -> torch.Tensor:
    """What the 4 bits of bytes stand for, in their order."""
    values = torch.tensor(VALUES[quant_type], device=packed.device, dtype=torch.float32).to(dtype)
    high, low = packed.int() >> 4, packed.int() & 15
    return values[torch.stack([high, low] if high_first else [low, high], dim=1)].view(-1)


def _wrong(name: str, tensor: torch.Tensor | None, count: int, dtypes: tuple[torch.dtype, ...]) -> str:
    """How a tensor is not so many elements of a dtype after each other; empty where it is."""
    if tensor is not None and tensor.dtype in dtypes and tensor.numel() == count and tensor.is_contiguous():
        return ""
    is_ = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
    return f".{name} is {is_}: want {count} contiguous of {' or '.join(map(str, dtypes))}"
