"""How launches of linear layers are cut: rows padded for the tensor cores, blocks of weights, parts of inputs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

MAX_ROWS = 80

MOST_PARTS = 8
"""Parts of the inputs at most: each is as many float32 as there are products, written and read once."""

BLOCKS_OF_PART = 4
"""Blocks that a part goes over at least, so that the loads of all but a few overlap."""

PROGRAMS_PER_SM = 2
"""Programs that keep enough weights on their way, where inputs are cut to have them."""


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
        blocks = -(-inputs // self.inputs)
        of_part = -(-blocks // min(self.parts, blocks))
        return -(-blocks // of_part), of_part

    def shared_memory(self, rows: int, weights: int) -> int:
        """Bytes that several rows' loop over `weights` weights at a time keeps; half types."""
        return self.num_stages * (weights * self.outputs + sum(padded(rows))) * self.inputs * 2 + 4096


def padded(rows: int) -> tuple[int, int]:
    """Rows as a program multiplies them, in a power of two and a tail of 0 or 16; one row is not padded."""
    if rows == 1:
        return 1, 0
    if rows <= 64:
        return max(16, 1 << (rows - 1).bit_length()), 0
    return 64, 16


def choose_block(rows: int, inputs: int, outputs: int, weights: int, processors: int, shared_memory: int) -> Block:
    """The block of a launch over `weights` weights at a time (two where gated) that fits `shared_memory` bytes.

    One row needs none: its products stay in registers. More rows keep `num_stages` blocks of weights and of x there.
    Small weights are mostly ramp-up, which `ahead` hides; many inputs of few outputs are not. Each program loads all
    rows of x, so that more rows want blocks of more outputs, and parts of the inputs to fill `processors`.
    """
    if rows == 1 and inputs >= 8192 and weights * outputs <= 3072:
        return Block(4, 512, 3)
    if rows == 1 and weights * outputs <= 8192:
        return Block(4, 2048 if inputs >= 8192 else 512, 1, ahead=True)
    if rows == 1:
        return Block(4, 1024 if inputs % 1024 == 0 else 512, 3)
    if rows <= 16:
        choices = [Block(64, 256, 3) if outputs > 4096 else Block(32, 256, 4), Block(32, 128, 3)]
    else:
        choices = [Block(128 // weights, 64, stages) for stages in (4, 3)]
    for block in (*choices, Block(16, 64, 3), Block(16, 64, 2)):
        if block.shared_memory(rows, weights) <= shared_memory:
            break
    if rows <= 16:
        return block
    programs, blocks = -(-outputs // block.outputs), -(-inputs // block.inputs)
    parts = min(PROGRAMS_PER_SM * processors // programs, blocks // BLOCKS_OF_PART, MOST_PARTS)
    return dataclasses.replace(block, parts=max(1, parts))
