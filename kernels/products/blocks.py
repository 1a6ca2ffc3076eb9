"""How launches of linear layers are cut: rows padded for the tensor cores, blocks of weights, parts of inputs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

MAX_ROWS = 80

OUTPUTS = 64
"""Of a block at most: what a warp group's tensor cores take at a time, as rows of theirs."""

MOST_PARTS = 8
"""Parts of the inputs at most: each is as many float32 as there are products, written and read once."""

BLOCKS_OF_PART = 2
"""Blocks that a part goes over at least."""


class Most(NamedTuple):
    """What a class of GPUs is better given at most."""

    rows: int
    """Up to which products are at least as fast as cuBLAS's and the elementwise kernels that those need."""
    parts: int


MOST_BY_CAPABILITY = {7: Most(16, 1)}
"""By a compute capability's first number. On sm_75 Triton emits no products of tensor cores."""


def most(capability: tuple[int, int]) -> Most:
    """Of a compute capability; 8 and newer are as 9.0, which was measured (benchmarks/results/linear.jsonl)."""
    return MOST_BY_CAPABILITY.get(capability[0], Most(MAX_ROWS, MOST_PARTS))


@dataclass(frozen=True)
class Block:
    """How a launch cuts its weights: outputs and inputs of a block, and how its loop is compiled."""

    outputs: int
    inputs: int
    num_stages: int
    ahead: bool = False
    """Load a block of weights before the one in hand is used, the first before the kernel before this one is done."""
    num_warps: int = 4
    parts: int = 1
    """Parts of the inputs, each with programs of its own, at most so many; a second launch adds up their products."""

    def cut(self, inputs: int) -> tuple[int, int]:
        """Parts of so many inputs, none of them empty, and the blocks that each but the last goes over."""
        return cut_in_parts(inputs, self.inputs, self.parts)

    def shared_memory(self, rows: int, weights: int) -> int:
        """Bytes that several rows' loop over `weights` weights at a time keeps; half types."""
        return self.num_stages * (weights * self.outputs + sum(padded(rows))) * self.inputs * 2 + 4096


def cut_in_parts(inputs: int, of_block: int, most: int) -> tuple[int, int]:
    """Parts of inputs in blocks of so many, at most so many and none empty, and the blocks of each but the last."""
    blocks = -(-inputs // of_block)
    of_part = -(-blocks // min(most, blocks))
    return -(-blocks // of_part), of_part


def padded(rows: int) -> tuple[int, int]:
    """Rows as a program multiplies them, in a power of two and a tail of 0 or 16; one row is not padded."""
    if rows == 1:
        return 1, 0
    if rows <= 64:
        return max(16, 1 << (rows - 1).bit_length()), 0
    return 64, 16


def scratch(rows: int, processors: int) -> int:
    """Bytes that parts of so many rows' products take at most: two blocks of two weights a multiprocessor, float32."""
    return 4 * processors * OUTPUTS * sum(padded(rows)) * 4 if 1 < rows <= MAX_ROWS else 0


def choose_block(
    rows: int, inputs: int, outputs: int, weights: int, processors: int, shared_memory: int, most_parts: int
) -> Block:
    """The block of a launch over `weights` weights at a time (two where gated) that fits `shared_memory` bytes.

    One row needs none: its products stay in registers. Small weights are mostly ramp-up, which `ahead` hides, and the
    smallest fill a GPU only with more warps a program. More rows: `_blocks_of_rows`, in up to `most_parts` parts of the
    inputs, as many as fit the device at once. Blocks for half of the multiprocessors keep the memory busy without, and
    save a launch.
    """
    if rows == 1 and weights * outputs <= 2560 and inputs >= 1024:
        return Block(8 if inputs <= 4096 else 4, 1024, 1, ahead=True, num_warps=8)
    if rows == 1 and weights * outputs <= 3072 and inputs >= 1024:
        return Block(4, 1024, 1, ahead=True)
    if rows == 1 and weights * outputs <= 4608:
        return Block(4, 512, 1, ahead=True)
    if rows == 1:
        return Block(4, 1024 if inputs % 1024 == 0 else 512, 3)
    blocks = _blocks_of_rows(rows, outputs, weights, processors, shared_memory)
    block = next((each for each in blocks if each.shared_memory(rows, weights) <= shared_memory), blocks[-1])
    programs = -(-outputs // block.outputs)
    at_once = processors * (shared_memory // block.shared_memory(rows, weights))
    parts = min(at_once // programs, -(-inputs // block.inputs) // BLOCKS_OF_PART, most_parts)
    if parts < 1 or 2 * programs > processors:
        parts = 1
    return dataclasses.replace(block, parts=parts)


def _blocks_of_rows(rows: int, outputs: int, weights: int, processors: int, shared_memory: int) -> list[Block]:
    """Blocks for 2 to 80 rows, the best first; they keep `num_stages` blocks of weights and of x in shared memory.

    Large blocks have a multiprocessor to themselves: where the last round of programs would leave many idle, two
    smaller ones a multiprocessor even it out.
    """
    if rows <= 16:
        largest = [Block(OUTPUTS, 128, 3)] if weights == 2 else [Block(OUTPUTS, 128, 6), Block(OUTPUTS, 128, 4)]
        smaller = [Block(32, 128, 3)]
    else:
        warps = 8 if weights == 2 or 32 < rows <= 64 else 4
        largest = [Block(OUTPUTS, 128, 3 if weights == 2 else 4, num_warps=warps)]
        smaller = [Block(OUTPUTS, 64, 4), Block(OUTPUTS, 64, 3)]
    programs = -(-outputs // OUTPUTS)
    places = -(-programs // processors) * processors
    if processors < programs < 3 * places / 4 and 2 * largest[0].shared_memory(rows, weights) > shared_memory:
        del largest[0]
    return [*largest, *smaller, Block(16, 64, 3)]
