"""Experts of a mixture on few rows: the chosen ones' weights read once, where they lie, chosen on the device.

A decode step of one row is two launches where a weight's inputs are next to each other, three where its outputs are; of
more rows four, the first of which lists the experts that any row chose. Nothing waits for the device, and no weight is
copied. Sums are float32 and in one order; the gates are rounded where transformers rounds them, the weighted sum once.
"""

from __future__ import annotations

import torch

from pkv_hf.kernels.activations import check_activation
from pkv_hf.kernels.experts.blocks import MAX_ROWS, Block, choose_block, padded, sums_in_launch
from pkv_hf.kernels.experts.kernels import chosen_kernel, down_kernel, down_row_kernel, up_kernel, weigh_kernel
from pkv_hf.kernels.experts.reference import LAYOUTS, Stacked
from pkv_hf.kernels.launch import DTYPES, Remembered, capability, described, device_limits, next_power_of_2
from pkv_hf.kernels.launcher import Launcher
from pkv_hf.kernels.pdl import options, overlaps

INDEX_DTYPES = (torch.int32, torch.int64)

LEAST_BINS = 64
"""Of the list of experts: a histogram has one for each thread of a warp at least."""

WEIGHED = 512
"""Elements of a row that a program sums."""

_chosen, _weigh = Launcher(chosen_kernel, fp_fusion=True), Launcher(weigh_kernel, fp_fusion=True)
_up, _down = Launcher(up_kernel, fp_fusion=True), Launcher(down_kernel, fp_fusion=True)
_down_row = Launcher(down_row_kernel, fp_fusion=True)
_checked: Remembered[None] = Remembered()


def most_rows(device: torch.device) -> int:
    """Rows that the kernels take: one alone on sm_75, where Triton emits no products of tensor cores."""
    return MAX_ROWS if capability(device) >= (8, 0) else 1


def check_stacked(of: Stacked) -> None:
    """Raises ValueError, naming the field, for weights that the kernels cannot take."""
    form = of.form
    check_activation(form.activation)
    if form.layout not in LAYOUTS:
        raise ValueError(f"layout={form.layout!r} is not one of {', '.join(LAYOUTS)}")
    if form.alpha != 1.0 and form.activation != "silu":
        raise ValueError(f"alpha={form.alpha} with activation={form.activation!r}: only silu has one")
    up = (of.hidden, of.outputs) if form.transposed else (of.outputs, of.hidden)
    want = {"up": up, "down": tuple(of.down.shape[1:]), "up_bias": (of.outputs,), "down_bias": (of.hidden,)}
    for name, tensor in zip(want, of.tensors):
        if tensor is None:
            continue
        shape = len(of.down), *want[name]
        if tensor.shape != shape or tensor.dtype != of.down.dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}: want contiguous {of.down.dtype} {list(shape)}"
            )
    if of.down.dtype not in DTYPES:
        raise ValueError(f"down is {of.down.dtype}: want fp16, bf16 or fp32")


def _check(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, of: Stacked) -> None:
    key = (*described(x, index, weights, *of.tensors), of.form)
    if key in _checked:
        return
    check_stacked(of)
    most = most_rows(x.device)
    if x.shape != (len(x), of.hidden) or not 1 <= len(x) <= most or not x.is_contiguous() or x.dtype != of.down.dtype:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)}: want contiguous [1 to {most}, {of.hidden}] in {of.down.dtype}"
        )
    if index.dtype not in INDEX_DTYPES or index.ndim != 2 or len(index) != len(x) or not index.is_contiguous():
        raise ValueError(f"index is {index.dtype} {list(index.shape)}: want contiguous integers of {len(x)} rows")
    if weights.dtype not in DTYPES or weights.shape != index.shape or not weights.is_contiguous():
        raise ValueError(
            f"weights are {weights.dtype} {list(weights.shape)}: want contiguous {list(index.shape)}, floating"
        )
    _checked[key] = None


def experts(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    of: Stacked,
    blocks: tuple[Block, Block] | None = None,
) -> torch.Tensor:
    """The sum of what the experts make of each row that chose them, times the choice's weight: `[rows, hidden]`.

    x `[rows, hidden]`, 1 to 80 rows, in the weights' dtype, fp16, bf16 or fp32; index `[rows, choices]`, int32 or
    int64, weights `[rows, choices]`, floating. Numbers of no expert count as nothing. `blocks` are how the launches of
    the first and the second product are cut, chosen where they are None.

    Raises ValueError for arguments that the kernels cannot take.
    """
    _check(x, index, weights, of)
    (rows, choices), device, count, pdl = index.shape, x.device, len(of.up), overlaps(x.device)
    form, block_choices, block_m = of.form, next_power_of_2(choices), padded(rows)
    up, down = blocks or choose_blocks(rows, of, device)
    chosen, programs = index, choices
    if rows > 1:
        programs, bins = min(count, rows * choices), max(LEAST_BINS, next_power_of_2(count + 1))
        chosen = torch.empty(bins, dtype=torch.int32, device=device)
        sizes = next_power_of_2(rows * choices), bins, pdl
        _chosen(
            (index.dtype, device, sizes), (1, 1, 1), (index, chosen), (rows * choices, count), sizes, **options(device)
        )
    kind = x.dtype, index.dtype, weights.dtype, device
    h = torch.empty((rows * choices, of.width), dtype=x.dtype, device=device)
    constants = (
        choices, block_choices, form.layout, of.up_bias is not None, form.activation, form.limit != 0,
        form.alpha != 1.0, form.shift != 0, form.transposed, of.hidden % up.inputs == 0, block_m, up.outputs,
        up.inputs, up.num_stages, pdl,
    )  # fmt: skip
    _up(
        (*kind, up.num_warps, constants), (-(-of.outputs // up.outputs), programs, 1),
        (x, index, chosen, of.up, x if of.up_bias is None else of.up_bias, h),
        (rows, count, of.width, of.outputs, of.hidden, *form[3:]), constants,
        num_warps=up.num_warps, **options(device),
    )  # fmt: skip
    out = torch.empty_like(x)
    bias, even = x if of.down_bias is None else of.down_bias, of.width % down.inputs == 0
    grid = (-(-of.hidden // down.outputs), programs, 1)
    if sums_in_launch(rows, form.transposed):
        constants = choices, of.down_bias is not None, even, down.outputs, down.inputs, down.num_stages, pdl
        _down_row(
            (*kind, down.num_warps, constants), (grid[0], 1, 1), (h, index, weights, of.down, bias, out),
            (count, of.hidden, of.width), constants, num_warps=down.num_warps, **options(device),
        )  # fmt: skip
        return out
    y = torch.empty((rows * choices, of.hidden), dtype=torch.float32, device=device)
    constants = (
        choices, block_choices, of.down_bias is not None, form.transposed, even, block_m, down.outputs, down.inputs,
        down.num_stages, pdl,
    )  # fmt: skip
    _down(
        (*kind, down.num_warps, constants), grid, (h, index, chosen, of.down, bias, y),
        (rows, count, of.hidden, of.width), constants, num_warps=down.num_warps, **options(device),
    )  # fmt: skip
    constants = choices, block_choices, WEIGHED, pdl
    _weigh(
        (*kind, constants), (-(-of.hidden // WEIGHED), rows, 1), (y, index, weights, out), (count, of.hidden),
        constants, **options(device),
    )  # fmt: skip
    return out


def choose_blocks(rows: int, of: Stacked, device: torch.device) -> tuple[Block, Block]:
    """How the launches of the first and the second product of so many rows are cut."""
    rest = of.form.transposed, of.down.element_size(), device_limits(device)[1]
    return choose_block(rows, of.hidden, of.outputs, *rest), choose_block(rows, of.width, of.hidden, *rest)
