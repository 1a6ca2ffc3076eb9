"""Greedy selection in one launch: every row's largest logit, the end of sequence, and what the next step reads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.launch import DTYPES, next_power_of_2
from pkv_hf.kernels.launcher import Launcher
from pkv_hf.kernels.pdl import options, overlaps, release, wait
from pkv_hf.kernels.reference import EndOfSequence, NextStep

BLOCK = 1024
"""Logits that a program looks at."""

LARGEST = tl.constexpr(0x7FFFFFFF)
INFINITY = tl.constexpr(0x7F800000)
"""The bits of infinity in float32; NaN is above it."""


@triton.jit
def _order(x):
    """float32 as int32 of the same order from -INFINITY up: zeros are equal, and every NaN is the largest."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & LARGEST
    order = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(magnitude > INFINITY, LARGEST, order)


@triton.jit(do_not_specialize=["rows", "num_ends", "planes"])
def select_kernel(logits_ptr, most_ptr, end_tokens_ptr, pad_ptr, scratch_ptr, newest_ptr, inputs_ptr, positions_ptr,
                  ends_ptr, width, rows, num_ends, planes,
                  BLOCK: tl.constexpr, BLOCK_ENDS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program a part of a row's logits; the one that is done last with a row takes its token.

    An order and an index are one number, greater than 0, which is larger where a logit is larger or as large and comes
    first: so the largest of a row is an atomic maximum, in whatever order programs come.
    """
    part = tl.program_id(0)
    row = tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    there = at < width
    wait(PDL)
    release(PDL)
    x = tl.load(logits_ptr + row.to(tl.int64) * width + at, mask=there, other=float("-inf")).to(tl.float32)
    if most_ptr is not None:
        most = tl.load(most_ptr + at, mask=there, other=float("inf")).to(tl.float32)
        x = tl.where(most < x, most, x)  # which leaves NaN
    ordered = ((_order(x).to(tl.int64) + LARGEST) << 31) + (LARGEST - at)
    largest_ptr, done_ptr = scratch_ptr + row, scratch_ptr + rows + row
    tl.atomic_max(largest_ptr, tl.max(ordered, 0), sem="relaxed", scope="gpu")
    tl.debug_barrier()  # whichever threads do the two, the maximum comes first: only the second has to order them
    if tl.atomic_add(done_ptr, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        goes_on_ptr = newest_ptr + rows + row
        if end_tokens_ptr is not None:  # all is on its way before the maximum is waited for
            goes_on = tl.load(goes_on_ptr)
            pad = tl.load(pad_ptr)
            e = tl.arange(0, BLOCK_ENDS)
            end_tokens = tl.load(end_tokens_ptr + e, mask=e < num_ends, other=-1)
        end = tl.load(ends_ptr + row)
        token = LARGEST - (tl.atomic_xchg(largest_ptr, 0, sem="relaxed", scope="gpu") & LARGEST)
        if end_tokens_ptr is not None:
            token = tl.where(goes_on != 0, token, pad)
            ended = tl.max((end_tokens == token).to(tl.int32), 0)
            tl.store(goes_on_ptr, tl.where(ended != 0, 0, goes_on))
        tl.store(newest_ptr + row, token)
        tl.store(inputs_ptr + row, token)
        tl.store(ends_ptr + row, end + 1)
        for plane in range(planes):
            position_ptr = positions_ptr + plane * rows + row
            tl.store(position_ptr, tl.load(position_ptr) + 1)
        tl.store(done_ptr, 0)


_select = Launcher(select_kernel, fp_fusion=False)


def select(
    logits: torch.Tensor,
    newest: torch.Tensor,
    step: NextStep,
    end: EndOfSequence | None = None,
    most: torch.Tensor | None = None,
    *,
    scratch: torch.Tensor,
) -> None:
    """What `kernels.reference.select` does, in one launch.

    `scratch` is int64 zeros `[2, rows]`, which stay zeros. Launches that may run at the same time need scratch of their
    own. Raises ValueError for what the kernel cannot take.
    """
    rows, _, width = logits.shape
    logits = logits[:, -1].contiguous()
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits is {logits.dtype}: want one of float16, bfloat16, float32")
    want = {"newest": (newest, torch.int64, (2, rows)), "scratch": (scratch, torch.int64, (2, rows)),
            "inputs": (step.inputs, torch.int64, (rows, 1)), "ends": (step.ends, torch.int32, (rows,)),
            "positions": (step.positions, torch.int64, (*step.positions.shape[:-2], rows, 1))}  # fmt: skip
    for name, (tensor, dtype, shape) in want.items():
        if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}: want contiguous {dtype} {list(shape)}")
    if most is not None and most.shape != (width,):
        raise ValueError(f"most is {list(most.shape)}: want {[width]}, one for each logit")
    tokens, pad = (None, None) if end is None else end
    count = 0 if tokens is None else len(tokens)
    block_ends = next_power_of_2(max(count, 1))
    device = logits.device
    kind = logits.dtype, None if most is None else most.dtype, tokens is None, block_ends, device
    _select(
        kind, (-(-width // BLOCK), rows, 1),
        (logits, most, tokens, pad, scratch, newest, step.inputs, step.positions, step.ends),
        (width, rows, count, step.positions.numel() // rows),
        (BLOCK, block_ends, overlaps(device)), num_warps=4, **options(device),
    )  # fmt: skip
