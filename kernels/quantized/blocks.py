"""How launches over weights of 4 bits are cut."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from pkv_hf.kernels.products.blocks import BLOCKS_OF_PART, MAX_ROWS, MOST_PARTS, OUTPUTS, cut_in_parts

COLUMNS = 16
"""Of a product by tensor cores, at least."""

OF_THREAD = 32
"""Inputs that a thread sums of each output: 16 bytes of weights."""

OF_WARP = 32 * OF_THREAD
"""Inputs that a warp sums at a time: where a block has no more a warp, a thread has all outputs of its inputs."""

FORMS = ("columns", "weights", "sums", "threads")
"""Tensor cores, with scales on products of groups in columns of their own, or on weights; or one row's sums, of groups
or, where weights lie in rows of bytes, of what a thread reads."""


def most_rows(capability: tuple[int, int]) -> int:
    """Rows at most by a GPU's compute capability: before 8 Triton emits no products of tensor cores."""
    return MAX_ROWS if capability[0] >= 8 else 1


@dataclass(frozen=True)
class Block4:
    """How a launch cuts its weights: outputs and inputs of a block, and how its loop is compiled."""

    outputs: int
    inputs: int
    """A multiple of 128; of 1,024 at most where the form is "columns"."""
    num_stages: int
    form: str
    """One of `FORMS`."""
    num_warps: int = 4
    parts: int = 1
    """Parts of the inputs, each with programs of its own, at most so many; a second launch adds up their products."""

    def cut(self, inputs: int) -> tuple[int, int]:
        """Parts of so many inputs, none of them empty, and the blocks that each but the last goes over."""
        return cut_in_parts(inputs, self.inputs, self.parts)

    def padded(self, rows: int, group: int) -> tuple[int, int]:
        """Rows as a program multiplies them by groups of inputs, in a power of two and a tail of 0 or 16."""
        if rows > 64:
            return 64, 16
        count = 1 << (rows - 1).bit_length()
        if self.form in ("sums", "threads"):
            return count, 0
        return max(count, COLUMNS if self.form == "weights" else COLUMNS * group // self.inputs), 0

    def shared_memory(self, rows: int, weights: int, group: int) -> int:
        """Bytes that a loop over `weights` weights at a time keeps, about: blocks in flight, and x for tensor cores."""
        rows = sum(self.padded(rows, group))
        columns = rows * (self.inputs // group if self.form == "columns" else 1)
        in_flight = weights * self.outputs * (self.inputs // 2 + 4 * self.inputs // group) + rows * self.inputs * 2
        return (self.num_stages - 1) * in_flight + columns * self.inputs * 2 + 4096


def choose_block(
    rows: int, inputs: int, outputs: int, weights: int, processors: int, shared_memory: int, group: int, layout: str
) -> Block4:
    """The block of a launch over `weights` weights at a time (two where gated) that fits `shared_memory` bytes.

    Instructions bound it, not memory. One row is sums, of threads where the `layout` is of bytes. More rows go through
    the tensor cores: 64 outputs are what a warp group's take from registers, and parts are as those of plain weights.
    Values that are looked up have their scales on weights. Of evenly spaced ones up to 8 rows where a scale is of a
    `group` of 64 (4 or 16 where it is of 32 or 128) leave columns idle, where products take scales at no cost.
    """
    if rows == 1 and layout == "bytes":
        warps = 1 if weights == 2 or inputs < 2048 else 2 if inputs < 4096 else 4
        return Block4(8 // weights, OF_WARP * warps, 1, "threads", num_warps=warps)
    if rows == 1:
        wide = weights * outputs > 4096
        return Block4(8 if wide else 4, 1024 if wide else 2048, 1, "sums")
    in_columns = layout != "bytes" and rows <= COLUMNS * group // 128
    programs = -(-outputs // OUTPUTS)
    cuts = 2 * programs <= processors
    of_inputs = 256 if rows <= 2 * COLUMNS or not (cuts or weights == 2) else 128
    blocks = [Block4(OUTPUTS, of_inputs, stages, "columns" if in_columns else "weights") for stages in (4, 3, 2)]
    block = next((each for each in blocks if each.shared_memory(rows, weights, group) <= shared_memory), blocks[-1])
    parts = min(2 * processors // programs, -(-inputs // block.inputs) // BLOCKS_OF_PART, MOST_PARTS)
    return dataclasses.replace(block, parts=max(parts, 1) if cuts else 1)
