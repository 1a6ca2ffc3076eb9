"""How launches of experts cut their weights: blocks of outputs and inputs, by rows and by how weights lie."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from pkv_hf.kernels.launch import next_power_of_2

MAX_ROWS = 80

LEAST = 16
"""Rows, outputs and inputs that the tensor cores take at least."""


@dataclass(frozen=True)
class Block:
    """A block of weights: its outputs, gates and ups counted each, and its inputs; and how its loop is compiled."""

    outputs: int
    inputs: int
    num_stages: int
    num_warps: int = 4

    def shared_memory(self, rows: int, itemsize: int) -> int:
        """Bytes that the loop over so many rows keeps in flight."""
        return self.num_stages * (self.outputs + padded(rows)) * self.inputs * itemsize + 4096


def padded(rows: int) -> int:
    """Rows as a program multiplies them; one row is not padded."""
    return 1 if rows == 1 else max(LEAST, next_power_of_2(rows))


def sums_in_launch(rows: int, transposed: bool) -> bool:
    """Whether programs of the second product go over all choices of a row, and so sum them: where its blocks of outputs
    are enough for a GPU by themselves."""
    return rows == 1 and not transposed


def choose_block(rows: int, inputs: int, outputs: int, transposed: bool, itemsize: int, shared_memory: int) -> Block:
    """The block of a launch whose programs each multiply `rows` rows by one expert's block.

    One row: a program reads whole rows of few outputs, or, of weights whose outputs are next to each other, lines of
    128 bytes; narrow weights have few programs, each of which then has more in flight. More rows: as few outputs as a
    warp group's tensor cores take, since experts are many and narrow.
    """
    if rows == 1 and transposed:
        block = Block(64, 128, 3)
    elif rows == 1:
        block = Block(8, 512, 3) if inputs > 1024 else Block(8, 1024, 2)
    elif itemsize == 4:
        block = Block(64, 32, 2, num_warps=8)
    elif padded(rows) <= 32:
        block = Block(64, 128, 4 if padded(rows) == LEAST else 3)
    else:
        block = Block(64, 64, 4 if padded(rows) == 64 else 3, num_warps=4 if padded(rows) == 64 else 8)
    least = 1 if rows == 1 else LEAST
    block = dataclasses.replace(
        block,
        outputs=min(block.outputs, max(2 * least, next_power_of_2(outputs))),
        inputs=min(block.inputs, max(LEAST, next_power_of_2(inputs))),
    )
    while block.num_stages > 2 and block.shared_memory(rows, itemsize) > shared_memory:
        block = dataclasses.replace(block, num_stages=block.num_stages - 1)
    return block
