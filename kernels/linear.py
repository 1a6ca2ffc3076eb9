"""Linear layers on few rows: weights read once at the speed of memory, several in one launch, epilogues fused.

A decode step multiplies 1 to `MAX_ROWS` rows by every weight of the model, so it takes the time that reading them
takes. One row is a product of vectors; more rows go through the tensor cores, all of them in every program, so that a
weight is read once. Where blocks of outputs are too few to fill a GPU the inputs are cut as well, and a second launch
adds up the parts in their order. Sums are float32; outputs are rounded where transformers rounds them, but the norm,
which scales the sum instead of every input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.activations import check_activation
from pkv_hf.kernels.launch import Remembered, capability, described, device_limits
from pkv_hf.kernels.launcher import Launcher
from pkv_hf.kernels.pdl import options, overlaps
from pkv_hf.kernels.products.adapters import Adapters, Shrunk, read, shrink, with_adapters
from pkv_hf.kernels.products.blocks import MAX_ROWS, Block, choose_block, most, padded
from pkv_hf.kernels.products.epilogue import Parts, add_parts, elements, finish, store_gated
from pkv_hf.kernels.products.loops import products

DTYPES = (torch.float16, torch.bfloat16)


def outruns_cublas(x: torch.Tensor, outputs: int) -> bool:
    """Whether products of x `[rows, inputs]` with `outputs` outputs are better ours.

    Those of one row always are; those of more up to `blocks.most`, where parts of inputs, or else blocks of 16 outputs,
    are enough for every multiprocessor.
    """
    rows, parts = most(capability(x.device))
    return len(x) == 1 or (len(x) <= rows and (parts > 1 or outputs >= 16 * device_limits(x.device)[0]))


RUNTIME = ["rows", "outputs_a", "outputs_b", "outputs_c", "part_blocks", "eps", "scale"]
"""Arguments that Triton must not specialise on: rows change without a new compilation."""


@triton.jit(do_not_specialize=RUNTIME)
def linear_kernel(x_ptr, a_ptr, b_ptr, c_ptr, bias_a_ptr, bias_b_ptr, bias_c_ptr, residual_ptr, norm_ptr,
                  table_ptr, h_ptr, lora_ptr, out_ptr,
                  rows, outputs_a, outputs_b, outputs_c, inputs, part_blocks, scale, eps,
                  WEIGHTS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
                  ACTIVATION: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, EVEN: tl.constexpr,
                  PARTS: tl.constexpr, ADAPTERS: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr,
                  BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """One weight, or three side by side, each in blocks of its own: out [rows, outputs_a + outputs_b + outputs_c].

    With PARTS out is float32 `[parts, rows, outputs]`, of which `epilogue.add_parts` makes the rest. ADAPTERS counts
    the parts of h, 0 where no weight has adapters; the first of PARTS takes what they add.
    """
    block = tl.program_id(0)
    w_ptr = a_ptr
    bias_ptr = bias_a_ptr
    outputs = outputs_a
    column = tl.zeros([], tl.int32)  # of out, where the weight's outputs begin
    width = outputs_a
    number = 0  # of the weight
    if WEIGHTS > 1:
        blocks_a = tl.cdiv(outputs_a, BLOCK_N)
        blocks_b = tl.cdiv(outputs_b, BLOCK_N)
        width = outputs_a + outputs_b + outputs_c
        if block >= blocks_a + blocks_b:
            number = 2
            w_ptr = c_ptr
            bias_ptr = bias_c_ptr
            outputs = outputs_c
            column = outputs_a + outputs_b
            block -= blocks_a + blocks_b
        elif block >= blocks_a:
            number = 1
            w_ptr = b_ptr
            bias_ptr = bias_b_ptr
            outputs = outputs_b
            column = outputs_a
            block -= blocks_a
    y, _, tail, _, residual, factor = products(
        x_ptr, w_ptr, w_ptr, norm_ptr, residual_ptr, rows, block * BLOCK_N, outputs, inputs, part_blocks, eps, NORM,
        OFFSET, RESIDUAL, False, EVEN, PARTS, BLOCK_M, TAIL, BLOCK_N, BLOCK_K, STAGES, AHEAD, PDL)  # fmt: skip
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if ADAPTERS > 0:  # noqa: SIM102, which leaves out the rest where it is not compiled
        if tl.program_id(1) == 0:
            y, tail = with_adapters(
                y, tail, table_ptr, h_ptr, lora_ptr, number, rows, n, outputs, factor, ADAPTERS, BLOCK_M, TAIL,
                BLOCK_N)  # fmt: skip
    if PARTS:
        out_ptr += tl.program_id(1).to(tl.int64) * rows * width
    elif BIAS:
        bias = tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
        y += bias
        if TAIL > 0:
            tail += bias
    at, mask = elements(0, BLOCK_M, rows, n, outputs, column, width)
    if RESIDUAL and BLOCK_M > 1:
        residual = tl.load(residual_ptr + at, mask=mask, other=0.0)
    finish(y, residual, at, mask, out_ptr, scale, RESIDUAL, SCALED, ACTIVATION)
    if TAIL > 0:
        at, mask = elements(BLOCK_M, TAIL, rows, n, outputs, column, width)
        if RESIDUAL:
            residual = tl.load(residual_ptr + at, mask=mask, other=0.0)
        finish(tail, residual, at, mask, out_ptr, scale, RESIDUAL, SCALED, ACTIVATION)


@triton.jit(do_not_specialize=["rows", "outputs", "part_blocks", "eps"])
def gated_kernel(x_ptr, gate_ptr, up_ptr, bias_gate_ptr, bias_up_ptr, norm_ptr, table_ptr, h_ptr, lora_ptr,
                 out_ptr, rows, outputs, inputs, part_blocks, eps,
                 ACTIVATION: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
                 EVEN: tl.constexpr, PARTS: tl.constexpr, ADAPTERS: tl.constexpr, BLOCK_M: tl.constexpr,
                 TAIL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
                 AHEAD: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """act(x G^T + bias) * (x U^T + bias); with PARTS as `linear_kernel`, out `[parts, 2, rows, outputs]`."""
    first = tl.program_id(0) * BLOCK_N
    gate, up, gate_tail, up_tail, _, factor = products(
        x_ptr, gate_ptr, up_ptr, norm_ptr, x_ptr, rows, first, outputs, inputs, part_blocks, eps, NORM, OFFSET, False,
        True, EVEN, PARTS, BLOCK_M, TAIL, BLOCK_N, BLOCK_K, STAGES, AHEAD, PDL)  # fmt: skip
    n = first + tl.arange(0, BLOCK_N)
    if ADAPTERS > 0:  # noqa: SIM102, which leaves out the rest where it is not compiled
        if tl.program_id(1) == 0:
            gate, gate_tail = with_adapters(
                gate, gate_tail, table_ptr, h_ptr, lora_ptr, 0, rows, n, outputs, factor, ADAPTERS, BLOCK_M, TAIL,
                BLOCK_N)  # fmt: skip
            up, up_tail = with_adapters(
                up, up_tail, table_ptr, h_ptr, lora_ptr, 1, rows, n, outputs, factor, ADAPTERS, BLOCK_M, TAIL,
                BLOCK_N)  # fmt: skip
    if PARTS:
        out_ptr += 2 * tl.program_id(1).to(tl.int64) * rows * outputs
    elif BIAS:
        bias_gate = tl.load(bias_gate_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
        bias_up = tl.load(bias_up_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
        gate += bias_gate
        up += bias_up
        if TAIL > 0:
            gate_tail += bias_gate
            up_tail += bias_up
    at, mask = elements(0, BLOCK_M, rows, n, outputs, 0, outputs)
    store_gated(gate, up, at, mask, rows, outputs, out_ptr, ACTIVATION, PARTS)
    if TAIL > 0:
        at, mask = elements(BLOCK_M, TAIL, rows, n, outputs, 0, outputs)
        store_gated(gate_tail, up_tail, at, mask, rows, outputs, out_ptr, ACTIVATION, PARTS)


_linear, _gated = Launcher(linear_kernel, fp_fusion=True), Launcher(gated_kernel, fp_fusion=True)
_checked: Remembered[None] = Remembered()


def _check(x: torch.Tensor, weights: dict[str, torch.Tensor], vectors: dict[str, torch.Tensor | None]) -> None:
    key = described(x, *weights.values(), *vectors.values())
    if key in _checked:
        return
    if vectors["norm"] is not None and len(x) > 1:
        raise ValueError(f"norm with {len(x)} rows: take it first, only one row's goes with the product")
    if x.dtype not in DTYPES or x.ndim != 2 or not 1 <= len(x) <= MAX_ROWS or not x.is_contiguous():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}: want contiguous [1 to {MAX_ROWS}, inputs] in fp16 or bf16")
    for name, weight in weights.items():
        if weight.dtype != x.dtype or weight.shape[1] != x.shape[1] or not weight.is_contiguous():
            raise ValueError(f"{name} is {weight.dtype} {list(weight.shape)}: want contiguous [outputs, {x.shape[1]}]")
    for name, vector in vectors.items():
        if vector is not None and (vector.dtype != x.dtype or not vector.is_contiguous()):
            raise ValueError(f"{name} is {vector.dtype}: want it contiguous in {x.dtype}")
    _checked[key] = None


def _switches(
    x: torch.Tensor, norm: torch.Tensor | None, offset: float, block: Block, shrunk: Shrunk | None
) -> tuple[Any, ...]:
    """NORM, OFFSET, and EVEN to PDL, of both kernels."""
    rows, inputs = x.shape
    return (
        norm is not None, offset, inputs % block.inputs == 0, block.cut(inputs)[0] > 1,
        0 if shrunk is None else len(shrunk.h), *padded(rows), block.outputs, block.inputs, block.num_stages,
        block.ahead, overlaps(x.device),
    )  # fmt: skip


def _block(x: torch.Tensor, outputs: int, weights: int) -> Block:
    return choose_block(*x.shape, outputs, weights, *device_limits(x.device), most(capability(x.device)).parts)


def linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None] = (None, None, None),
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
    scale: float = 1.0,
    activation: str | None = None,
    adapters: Adapters | None = None,
) -> torch.Tensor:
    """residual + scale * (norm(x) W^T + bias) of one weight, or of two or three side by side in one launch.

    x `[rows, inputs]`, 1 to 80 rows, fp16 or bf16; weights `[outputs, inputs]`, biases `[outputs]`, all or none. `norm`
    is the weight `[inputs]`, less `offset`, of an RMSNorm (Zhang & Sennrich 2019) with `eps` before the product, of one
    row. residual is `[rows, outputs]`, with one weight. With one weight and no residual `activation`, a name in
    `kernels.reference.ACTIVATIONS`, may be taken of the product before the scale. What `adapters` of the weights add is
    part of the products, which are rounded once, and costs a launch before. Returns `[rows, sum of outputs]`.

    Raises ValueError for arguments that the kernel cannot take.
    """
    rows, inputs = x.shape
    named = {f"weights[{i}]": weight for i, weight in enumerate(weights)}
    _check(x, named, {"norm": norm, "residual": residual})
    if not 1 <= len(weights) <= 3 or (len(weights) > 1 and (residual is not None or activation is not None)):
        raise ValueError(f"{len(weights)} weights: want one, or two or three without a residual or an activation")
    if activation is not None:
        check_activation(activation)
        if residual is not None:
            raise ValueError(f"activation={activation!r} with a residual: add it to the activation's result")
    outputs = [len(weight) for weight in weights]
    width = sum(outputs)
    block = _block(x, width, 1)
    shrunk = None if adapters is None else shrink(x, adapters, outputs, norm, offset)
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if block.cut(inputs)[0] > 1:
        sums, of_each = _sums(x, weights, block, shrunk), [*outputs, 0] if len(weights) == 2 else outputs
        add_parts(sums, out, biases[: len(weights)], of_each, residual, scale, activation)
    else:
        _launch(x, weights, block, out, shrunk, biases, norm, eps, offset, residual, scale, activation)
    return out


def in_parts(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, adapters: Adapters | None = None
) -> Parts | None:
    """x W^T + bias, with adapters, as `linear` takes it, left in the parts that its launch is cut into; None for one.

    `elementwise.add_norms` adds the parts and the bias. Raises ValueError for arguments that the kernel cannot take.
    """
    _check(x, {"weight": weight}, {"norm": None, "bias": bias})
    block = _block(x, len(weight), 1)
    if block.cut(x.shape[1])[0] == 1:
        return None
    shrunk = None if adapters is None else shrink(x, adapters, [len(weight)])
    return Parts(_sums(x, [weight], block, shrunk), bias)


def _sums(x: torch.Tensor, weights: Sequence[torch.Tensor], block: Block, shrunk: Shrunk | None) -> torch.Tensor:
    """Float32 `[parts, rows, sum of outputs]` of a product that a block cuts, which is never one row's."""
    shape = block.cut(x.shape[1])[0], len(x), sum(len(weight) for weight in weights)
    sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    _launch(x, weights, block, sums, shrunk)
    return sums


def _launch(
    x: torch.Tensor, weights: Sequence[torch.Tensor], block: Block, out: torch.Tensor, shrunk: Shrunk | None,
    biases: Sequence[torch.Tensor | None] = (None,), norm: torch.Tensor | None = None, eps: float = 0.0,
    offset: float = 0.0, residual: torch.Tensor | None = None, scale: float = 1.0, activation: str | None = None,
) -> None:  # fmt: skip
    """Writes a product that is in one part, with all that `linear` takes, or else the sums of its parts."""
    rows, inputs = x.shape
    parts, part_blocks = block.cut(inputs)
    a, b, c = (*weights, *(weights[-1],) * 2)[:3]
    outputs = [*(len(weight) for weight in weights), 0, 0][:3]
    bias_a, bias_b, bias_c = (a if bias is None else bias for bias in (tuple(biases) * 3)[:3])
    epilogue = biases[0] is not None, residual is not None, scale != 1.0, activation
    constants = 1 if len(weights) == 1 else 3, *epilogue, *_switches(x, norm, offset, block, shrunk)
    lora, pointers = read(x, shrunk)
    _linear(
        (x.dtype, lora, x.device, block.num_warps, constants),
        (sum(-(-len(weight) // block.outputs) for weight in weights), parts, 1),
        (x, a, b, c, bias_a, bias_b, bias_c, x if residual is None else residual, x if norm is None else norm,
         *pointers, out),
        (rows, *outputs, inputs, part_blocks, scale, eps), constants,
        num_warps=block.num_warps, **options(x.device),
    )  # fmt: skip


def gated(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str = "silu",
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    bias_gate: torch.Tensor | None = None,
    bias_up: torch.Tensor | None = None,
    adapters: Adapters | None = None,
) -> torch.Tensor:
    """act(norm(x) G^T + bias) * (norm(x) U^T + bias) (Shazeer 2020) in one launch; x, norm and adapters as in `linear`.

    gate and up `[outputs, inputs]`, which may be the halves of one weight; their biases `[outputs]`, both or none.
    `activation` is a name in `kernels.reference.ACTIVATIONS`. Returns `[rows, outputs]`.

    Raises ValueError for arguments that the kernel cannot take.
    """
    _check(x, {"gate": gate, "up": up}, {"norm": norm, "bias_gate": bias_gate, "bias_up": bias_up})
    check_activation(activation)
    if gate.shape != up.shape:
        raise ValueError(f"gate is {list(gate.shape)} and up {list(up.shape)}: want the same")
    if (bias_gate is None) != (bias_up is None):
        raise ValueError(f"bias_{'gate' if bias_gate is None else 'up'} is None: want both biases or none")
    rows, inputs = x.shape
    block = _block(x, len(gate), 2)
    parts, part_blocks = block.cut(inputs)
    out = torch.empty((rows, len(gate)), dtype=x.dtype, device=x.device)
    sums = out if parts == 1 else torch.empty((parts, 2, rows, len(gate)), dtype=torch.float32, device=x.device)
    shrunk = None if adapters is None else shrink(x, adapters, [len(gate)] * 2, norm, offset)
    switches, (lora, pointers) = _switches(x, norm, offset, block, shrunk), read(x, shrunk)
    constants = *((activation, bias_gate is not None) if parts == 1 else (None, False)), *switches
    vectors = tuple(x if vector is None else vector for vector in (bias_gate, bias_up, norm))
    _gated(
        (x.dtype, lora, x.device, block.num_warps, constants), (-(-len(gate) // block.outputs), parts, 1),
        (x, gate, up, *vectors, *pointers, sums), (rows, len(gate), inputs, part_blocks, eps), constants,
        num_warps=block.num_warps, **options(x.device),
    )  # fmt: skip
    if parts > 1:
        add_parts(sums, out, (bias_gate, bias_up), [len(gate)] * 2, None, 1.0, activation, gated=True)
    return out
