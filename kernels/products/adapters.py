"""Low-rank adapters beside a product (LoRA, Hu et al. 2021): x W^T + scaling * (x A^T) B^T, a sum over adapters.

`shrink` multiplies x by the A's of all weights that share it, in one launch. The product's kernel adds h B^T to its
sums (`with_adapters`). A and B are read where they are: a table on the device says where, so that neither their number
nor their ranks are compiled. All sums are float32. The tensor cores take float32 operands as three products of TF32,
which keeps float32's precision.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.launch import device_limits
from pkv_hf.kernels.launcher import ALIGNED, Launcher
from pkv_hf.kernels.pdl import options, overlaps, release, wait

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

WEIGHTS = tl.constexpr(3)
"""Of a launch at most."""

RANKS = tl.constexpr(16)
"""Ranks of a block: what the tensor cores sum over at least. An adapter's last block may have less."""

FIELDS = tl.constexpr(5)
"""Of a block in a table: addresses of its rows of A and its columns of B, the rank of B's rows, how many ranks the
block has, and the scaling's float32 bits. A table begins with `WEIGHTS + 1` numbers: where each weight's blocks begin,
and how many there are."""

NAMED = "pkv_hf_named"
"""The attribute of a table that holds the tensors whose addresses are in it."""

AT_ONCE = 4
"""Ranks of a program of one row."""

MOST_PARTS = {1: 16, 16: 8}
"""Parts of the inputs at most, by rows of a program: every program of the product reads all of h's parts."""

INPUTS = {1: 512, 16: 64}
"""Of a block, by rows of a program."""

OUTPUTS = 64
"""Of a program of `expand`."""


class Adapter(NamedTuple):
    """scaling * (x A^T) B^T."""

    a: torch.Tensor
    """`[rank, inputs]`."""
    b: torch.Tensor
    """`[outputs, rank]`, in the dtype of A."""
    scaling: float


class Adapters:
    """The adapters of one to three weights that share their input, as launches read them.

    `of_weights` holds those of each weight, none for a weight without; all are contiguous, on one device, and of one
    dtype, float32, float16 or bfloat16. They are read where they are at every launch: whoever replaces one makes this
    anew. Raises ValueError, naming the adapter, for what launches cannot read.
    """

    def __init__(self, of_weights: Sequence[Sequence[Adapter]]) -> None:
        adapters = [adapter for of_weight in of_weights for adapter in of_weight]
        if not adapters or len(of_weights) > WEIGHTS.value:
            raise ValueError(
                f"{len(adapters)} adapters of {len(of_weights)} weights: want some, of 1 to {WEIGHTS.value}"
            )
        first = adapters[0]
        self.inputs, self.dtype, self.device = first.a.shape[1], first.a.dtype, first.a.device
        self.like = first.b
        """Says the dtype that addresses point to."""
        self.outputs = [len(of_weight[0].b) if of_weight else None for of_weight in of_weights]
        places = [self.inputs * first.a.element_size(), *(adapter.a.data_ptr() for adapter in adapters)]
        self.aligned = not any(place % ALIGNED for place in places)
        """Whether all rows of A begin at multiples of 16 bytes."""
        ends, blocks = [0], list[int]()
        for place, of_weight in enumerate(of_weights):
            for adapter in of_weight:
                self._check(f"adapter {adapter.a.shape[0]} of weight {place}", adapter, self.outputs[place])
                blocks += _blocks(adapter)
            ends.append(len(blocks) // FIELDS.value)
        ends += [ends[-1]] * (WEIGHTS.value + 1 - len(ends))
        self.blocks = ends[-1]
        self.table = torch.tensor(ends + blocks, dtype=torch.int64, device="cpu").to(self.device)
        setattr(self.table, NAMED, [tensor for adapter in adapters for tensor in adapter[:2]])

    def _check(self, name: str, adapter: Adapter, outputs: int | None) -> None:
        a, b = adapter.a, adapter.b
        if a.ndim != 2 or not len(a) or a.shape[1] != self.inputs or b.shape != (outputs, len(a)):
            raise ValueError(
                f"{name} has A {list(a.shape)} and B {list(b.shape)}: want [rank, {self.inputs}] and [{outputs}, rank]"
            )
        for tensor in (a, b):
            if tensor.dtype not in DTYPES or tensor.dtype != self.dtype or tensor.device != self.device:
                raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}: want {self.dtype} on {self.device}")
            if not tensor.is_contiguous():
                raise ValueError(f"{name} has strides {tensor.stride()}: want it contiguous")

    def check(self, x: torch.Tensor, outputs: Sequence[int]) -> None:
        """Raises ValueError where x `[rows, inputs]`, or weights of so many outputs, are not what these are of."""
        wanted = [count if found is None else found for found, count in zip(self.outputs, outputs)]
        if (
            x.shape[1] != self.inputs
            or x.device != self.device
            or [*outputs] != wanted
            or len(wanted) != len(self.outputs)
        ):
            raise ValueError(
                f"adapters are of {self.inputs} inputs and {self.outputs} outputs on {self.device}, the product of "
                f"{x.shape[1]} and {[*outputs]} on {x.device}"
            )


def _blocks(adapter: Adapter) -> list[int]:
    """The entries of an adapter in a table."""
    a, b, scaling = adapter
    rank, inputs = a.shape
    bits = struct.unpack("<i", struct.pack("<f", scaling))[0]
    entries: list[int] = []
    for begin in range(0, rank, RANKS.value):
        addresses = a.data_ptr() + begin * inputs * a.element_size(), b.data_ptr() + begin * b.element_size()
        entries += [*addresses, rank, min(RANKS.value, rank - begin), bits]
    return entries


class Shrunk(NamedTuple):
    """scaling * x A^T of all adapters, for a product's kernel to go on with."""

    h: torch.Tensor
    """Float32 `[parts, rows, 16 * blocks]`, to be summed over the parts; without an RMSNorm's factor 1 / rms(x)."""
    adapters: Adapters


def read(x: torch.Tensor, shrunk: Shrunk | None) -> tuple[torch.dtype | None, tuple[torch.Tensor, ...]]:
    """The dtype of adapters, and table_ptr, h_ptr and lora_ptr of a product's kernel; of x where there are none."""
    if shrunk is None:
        return None, (x, x, x)
    return shrunk.adapters.dtype, (shrunk.adapters.table, shrunk.h, shrunk.adapters.like)


@triton.jit
def _block(table_ptr, lora_ptr, block):
    """A block's rows of A, columns of B, the rank of B's rows, how many ranks it has, and its scaling."""
    entry = table_ptr + WEIGHTS + 1 + block * FIELDS
    a_ptr, b_ptr = tl.load(entry).to(lora_ptr.dtype), tl.load(entry + 1).to(lora_ptr.dtype)
    scaling = tl.load(entry + 4).to(tl.int32).to(tl.float32, bitcast=True)
    return a_ptr, b_ptr, tl.load(entry + 2), tl.load(entry + 3), scaling


@triton.jit(do_not_specialize=["rows", "part_blocks"])
def shrink_kernel(x_ptr, norm_ptr, table_ptr, lora_ptr, h_ptr, rows, inputs, part_blocks,
                  NORM: tl.constexpr, OFFSET: tl.constexpr, LORA_ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """BLOCK_R ranks of a block, a part of the inputs, BLOCK_M rows; one row is multiplied by the norm's weight."""
    of_block: tl.constexpr = RANKS // BLOCK_R
    block = tl.program_id(0) // of_block
    r = tl.program_id(0) % of_block * BLOCK_R + tl.arange(0, BLOCK_R)
    a_ptr, _, _, ranks, scaling = _block(table_ptr, lora_ptr, block)
    k = tl.arange(0, BLOCK_K)
    begin = tl.program_id(1) * part_blocks * BLOCK_K
    end = tl.minimum(begin + part_blocks * BLOCK_K, inputs)
    a_at = a_ptr + (r[:, None] * inputs + k[None, :])
    if LORA_ALIGNED:
        a_at = tl.multiple_of(a_at, (1, 16))
    a_mask = (r < ranks)[:, None]
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    if BLOCK_M == 1:
        h = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
        next_a = tl.load(a_at + begin, mask=a_mask & (begin + k < end)[None, :], other=0.0)  # as weights are
        wait(PDL)
        release(PDL)
        for at in tl.range(begin, end, BLOCK_K):
            inside = at + k < end
            a = next_a
            next_a = tl.load(a_at + at + BLOCK_K, mask=a_mask & (at + BLOCK_K + k < end)[None, :], other=0.0)
            x = tl.load(x_ptr + at + k, mask=inside, other=0.0).to(tl.float32)
            if NORM:
                weight = tl.load(norm_ptr + at + k, mask=inside, other=0.0).to(tl.float32)
                if OFFSET != 0:
                    weight += OFFSET
                x *= weight
            h += a.to(tl.float32) * x[None, :]
        h = tl.sum(h, 1)[:, None]
    else:
        h = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
        x_at = m[:, None] * inputs + k[None, :]
        x_mask = (m < rows)[:, None]
        wait(PDL)
        for at in tl.range(begin, end, BLOCK_K, num_stages=3):
            inside = (at + k < end)[None, :]
            a = tl.load(a_at + at, mask=a_mask & inside, other=0.0)
            x = tl.trans(tl.load(x_ptr + x_at + at, mask=x_mask & inside, other=0.0))
            if a.dtype == x.dtype:
                h = tl.dot(a, x, h)
            else:
                h = tl.dot(a.to(tl.float32), x.to(tl.float32), h, input_precision="tf32x3")
        release(PDL)
    width = tl.num_programs(0) * BLOCK_R
    row = tl.program_id(1).to(tl.int64) * rows + m
    at = row[None, :] * width + (block * RANKS + r)[:, None]
    tl.store(h_ptr + at, h * scaling, mask=(m < rows)[None, :])


@triton.jit
def with_adapters(y, tail, table_ptr, h_ptr, lora_ptr, weight, rows, n, outputs, factor,
                  PARTS: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """A product's sums as `loops.products` gives them, with what the adapters of weight number `weight` add.

    For outputs n; h is in so many PARTS. `factor` is an RMSNorm's, which h is without.
    """
    y = _with_adapters(
        y, table_ptr, h_ptr, lora_ptr, weight, 0, rows, n, outputs, factor, PARTS, BLOCK_M, BLOCK_N)  # fmt: skip
    if TAIL > 0:
        tail = _with_adapters(
            tail, table_ptr, h_ptr, lora_ptr, weight, BLOCK_M, rows, n, outputs, factor, PARTS, TAIL,
            BLOCK_N)  # fmt: skip
    return y, tail


@triton.jit
def _with_adapters(y, table_ptr, h_ptr, lora_ptr, weight, first, rows, n, outputs, factor,
                   PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """y + factor * h B^T of rows from `first` on, [BLOCK_M, BLOCK_N]; the parts of h are added in their order."""
    r = tl.arange(0, RANKS)
    m = first + tl.arange(0, BLOCK_M)
    width = tl.load(table_ptr + WEIGHTS) * RANKS
    b_mask = (n < outputs)[:, None]
    h_mask = (m < rows)[:, None]
    h_at = m.to(tl.int64)[:, None] * width + r[None, :]
    part = tl.arange(0, triton.next_power_of_2(PARTS))[:, None]
    added = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in tl.range(tl.load(table_ptr + weight), tl.load(table_ptr + weight + 1), num_stages=1):
        _, b_ptr, rank, ranks, _ = _block(table_ptr, lora_ptr, block)
        b_at = n.to(tl.int64)[:, None] * rank + r[None, :]
        b = tl.load(b_ptr + b_at, mask=b_mask & (r < ranks)[None, :], other=0.0).to(tl.float32)
        at = h_at + block * RANKS
        if BLOCK_M == 1:  # the parts side by side, which takes less registers than one after the other
            h = tl.sum(tl.load(h_ptr + at + part * width, mask=part < PARTS, other=0.0), 0)
            added += tl.sum(b * h[None, :], 1)[:, None]
        else:
            h = tl.load(h_ptr + at, mask=h_mask, other=0.0)
            for i in tl.static_range(1, PARTS):
                h += tl.load(h_ptr + at + i * rows.to(tl.int64) * width, mask=h_mask, other=0.0)
            if BLOCK_M < 16:  # less than the tensor cores take
                added += tl.sum(b[:, None, :] * h[None, :, :], 2)
            else:
                added = tl.dot(b, tl.trans(h), added, input_precision="tf32x3")
    return y + factor * tl.trans(added)


@triton.jit(do_not_specialize=["weight", "rows", "outputs"])
def expand_kernel(y_ptr, table_ptr, h_ptr, lora_ptr, out_ptr, weight, rows, outputs,
                  PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    first = tl.program_id(1) * BLOCK_M
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = first + tl.arange(0, BLOCK_M)
    at, mask = m.to(tl.int64)[:, None] * outputs + n[None, :], (m < rows)[:, None] & (n < outputs)[None, :]
    wait(PDL)
    release(PDL)
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = _with_adapters(y, table_ptr, h_ptr, lora_ptr, weight, first, rows, n, outputs, 1.0, PARTS, BLOCK_M, BLOCK_N)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


_shrink, _expand = Launcher(shrink_kernel, fp_fusion=True), Launcher(expand_kernel, fp_fusion=True)


def shrink(
    x: torch.Tensor, adapters: Adapters, outputs: Sequence[int], norm: torch.Tensor | None = None, offset: float = 0.0
) -> Shrunk:
    """scaling * x A^T of all adapters of weights of so many outputs; x `[rows, inputs]` contiguous, fp16 or bf16.

    `norm` is the weight `[inputs]`, less `offset`, of an RMSNorm of one row: h is that of x times the weight, and the
    product multiplies it by 1 / rms(x), which it has. Raises ValueError where the adapters are of other weights.
    """
    adapters.check(x, outputs)
    rows, inputs = x.shape
    block_m, block_r = (1, AT_ONCE) if rows == 1 else (16, RANKS.value)
    block_k, row_blocks = INPUTS[block_m], -(-rows // block_m)
    blocks = -(-inputs // block_k)
    programs = adapters.blocks * RANKS.value // block_r * row_blocks
    part_blocks = -(-blocks // max(1, min(device_limits(x.device)[0] // programs, blocks, MOST_PARTS[block_m])))
    parts = -(-blocks // part_blocks)
    h = torch.empty((parts, rows, RANKS.value * adapters.blocks), dtype=torch.float32, device=x.device)
    constants = norm is not None, offset, adapters.aligned, block_m, block_r, block_k, overlaps(x.device)
    _shrink(
        (x.dtype, adapters.dtype, x.device, constants), (programs // row_blocks, parts, row_blocks),
        (x, x if norm is None else norm, adapters.table, adapters.like, h), (rows, inputs, part_blocks), constants,
        num_warps=4, **options(x.device),
    )  # fmt: skip
    return Shrunk(h, adapters)


def expand(y: torch.Tensor, shrunk: Shrunk, weight: int = 0) -> torch.Tensor:
    """y + h B^T of weight number `weight`, rounded to y's dtype; y `[rows, outputs]` is contiguous, a product's."""
    rows, outputs = y.shape
    block_m, out = 1 if rows == 1 else 16, torch.empty_like(y)
    constants, (lora, pointers) = (len(shrunk.h), block_m, OUTPUTS, overlaps(y.device)), read(y, shrunk)
    _expand(
        (y.dtype, lora, y.device, constants), (-(-outputs // OUTPUTS), -(-rows // block_m), 1),
        (y, *pointers, out), (weight, rows, outputs), constants,
        num_warps=4, **options(y.device),
    )  # fmt: skip
    return out
