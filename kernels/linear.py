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

from pkv_hf.kernels.activations import check_activation
from pkv_hf.kernels.launch import Remembered, capability, described, device_limits
from pkv_hf.kernels.launcher import Launcher
from pkv_hf.kernels.pdl import options, overlaps
from pkv_hf.kernels.products.adapters import Adapters, Shrunk, read, shrink
from pkv_hf.kernels.products.blocks import MAX_ROWS, Block, choose_block, most, padded
from pkv_hf.kernels.products.epilogue import Parts, add_parts, check_epilogue
from pkv_hf.kernels.products.kernels import gated_kernel, linear_kernel
from pkv_hf.kernels.products.scales import DTYPES as DTYPES_8
from pkv_hf.kernels.products.scales import Scales, check_scales

DTYPES = (torch.float16, torch.bfloat16)


def outruns_cublas(x: torch.Tensor, outputs: int) -> bool:
    """Whether products of x `[rows, inputs]` with `outputs` outputs are better ours.

    Those of one row always are; those of more up to `blocks.most`, where parts of inputs, or else blocks of 16 outputs,
    are enough for every multiprocessor.
    """
    rows, parts = most(capability(x.device))
    return len(x) == 1 or (len(x) <= rows and (parts > 1 or outputs >= 16 * device_limits(x.device)[0]))


_linear, _gated = Launcher(linear_kernel, fp_fusion=True), Launcher(gated_kernel, fp_fusion=True)
_checked: Remembered[None] = Remembered()


def _check(
    x: torch.Tensor,
    weights: dict[str, torch.Tensor],
    vectors: dict[str, torch.Tensor | None],
    scales: Scales | None,
) -> None:
    key = described(x, *weights.values(), *vectors.values(), *(scales.tensors if scales else ()))
    if key in _checked:
        return
    if vectors["norm"] is not None and len(x) > 1:
        raise ValueError(f"norm with {len(x)} rows: take it first, only one row's goes with the product")
    if x.dtype not in DTYPES or x.ndim != 2 or not 1 <= len(x) <= MAX_ROWS or not x.is_contiguous():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}: want contiguous [1 to {MAX_ROWS}, inputs] in fp16 or bf16")
    first = next(iter(weights.values())).dtype
    want = x.dtype if scales is None else first if first in DTYPES_8 else DTYPES_8[0]
    for name, weight in weights.items():
        if weight.dtype != want or weight.shape[1] != x.shape[1] or not weight.is_contiguous():
            shape = f"{weight.dtype} {list(weight.shape)}"
            raise ValueError(f"{name} is {shape}: want contiguous [outputs, {x.shape[1]}] in {want}")
    if scales is not None:
        check_scales(x, [*weights.values()], scales)
    for name, vector in vectors.items():
        if vector is not None and (vector.dtype != x.dtype or not vector.is_contiguous()):
            raise ValueError(f"{name} is {vector.dtype}: want it contiguous in {x.dtype}")
    _checked[key] = None


def _switches(
    x: torch.Tensor, norm: torch.Tensor | None, offset: float, scales: Scales | None, block: Block,
    shrunk: Shrunk | None,
) -> tuple[Any, ...]:  # fmt: skip
    """NORM to PDL, of both kernels."""
    rows, inputs = x.shape
    return (
        norm is not None, offset, *((0, 1.0) if scales is None else (scales.of, scales.unit)),
        inputs % block.inputs == 0, block.cut(inputs)[0] > 1,
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
    scales: Scales | None = None,
) -> torch.Tensor:
    """residual + scale * (norm(x) W^T + bias) of one weight, or of two or three side by side in one launch.

    x `[rows, inputs]`, 1 to 80 rows, fp16 or bf16; weights `[outputs, inputs]`, biases `[outputs]`, all or none. `norm`
    is the weight `[inputs]`, less `offset`, of an RMSNorm (Zhang & Sennrich 2019) with `eps` before the product, of one
    row. residual is `[rows, outputs]`, with one weight. With one weight and no residual `activation`, a name in
    `kernels.reference.ACTIVATIONS`, may be taken of the product before the scale. What `adapters` of the weights add is
    part of the products, which are rounded once, and costs a launch before. Weights may be int8 or, from sm_89 on,
    float8_e4m3fn, all alike and with their `scales`. Returns `[rows, sum of outputs]`.

    Raises ValueError for arguments that the kernel cannot take.
    """
    rows, inputs = x.shape
    named = {f"weights[{i}]": weight for i, weight in enumerate(weights)}
    _check(x, named, {"norm": norm, "residual": residual}, scales)
    check_epilogue(len(weights), residual, activation)
    outputs = [len(weight) for weight in weights]
    width = sum(outputs)
    block = _block(x, width, 1)
    shrunk = None if adapters is None else shrink(x, adapters, outputs, norm, offset)
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if block.cut(inputs)[0] > 1:
        sums = _sums(x, weights, scales, block, shrunk)
        add_parts(sums, out, biases[: len(weights)], outputs, residual, scale, activation)
    else:
        _launch(x, weights, scales, block, out, shrunk, biases, norm, eps, offset, residual, scale, activation)
    return out


def in_parts(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    adapters: Adapters | None = None,
    scales: Scales | None = None,
) -> Parts | None:
    """x W^T + bias, as `linear` takes it, left in the parts that its launch is cut into; None for one.

    `elementwise.add_norms` adds the parts and the bias. Raises ValueError for arguments that the kernel cannot take.
    """
    _check(x, {"weight": weight}, {"norm": None, "bias": bias}, scales)
    block = _block(x, len(weight), 1)
    if block.cut(x.shape[1])[0] == 1:
        return None
    shrunk = None if adapters is None else shrink(x, adapters, [len(weight)])
    return Parts(_sums(x, [weight], scales, block, shrunk), bias)


def _sums(
    x: torch.Tensor, weights: Sequence[torch.Tensor], scales: Scales | None, block: Block, shrunk: Shrunk | None
) -> torch.Tensor:
    """Float32 `[parts, rows, sum of outputs]` of a product that a block cuts, which is never one row's."""
    shape = block.cut(x.shape[1])[0], len(x), sum(len(weight) for weight in weights)
    sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    _launch(x, weights, scales, block, sums, shrunk)
    return sums


def _launch(
    x: torch.Tensor, weights: Sequence[torch.Tensor], scales: Scales | None, block: Block, out: torch.Tensor,
    shrunk: Shrunk | None, biases: Sequence[torch.Tensor | None] = (None,), norm: torch.Tensor | None = None,
    eps: float = 0.0, offset: float = 0.0, residual: torch.Tensor | None = None, scale: float = 1.0,
    activation: str | None = None,
) -> None:  # fmt: skip
    """Writes a product that is in one part, with all that `linear` takes, or else the sums of its parts."""
    rows, inputs = x.shape
    parts, part_blocks = block.cut(inputs)
    a, b, c = (*weights, *(weights[-1],) * 2)[:3]
    of_weights = (None,) * 3 if scales is None else (*scales.tensors, *(scales.tensors[-1],) * 2)[:3]
    outputs = [*(len(weight) for weight in weights), 0, 0][:3]
    bias_a, bias_b, bias_c = (x if bias is None else bias for bias in (tuple(biases) * 3)[:3])
    epilogue = biases[0] is not None, residual is not None, scale != 1.0, activation
    constants = 1 if len(weights) == 1 else 3, *epilogue, *_switches(x, norm, offset, scales, block, shrunk)
    lora, pointers = read(x, shrunk)
    _linear(
        (x.dtype, a.dtype, lora, x.device, block.num_warps, constants),
        (sum(-(-len(weight) // block.outputs) for weight in weights), parts, 1),
        (x, a, b, c, *of_weights, bias_a, bias_b, bias_c, x if residual is None else residual,
         x if norm is None else norm, *pointers, out),
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
    scales: Scales | None = None,
) -> torch.Tensor:
    """act(norm(x) G^T + bias) * (norm(x) U^T + bias) (Shazeer 2020) in one launch; arguments as in `linear`.

    gate and up `[outputs, inputs]`, which may be the halves of one weight; their biases `[outputs]`, both or none.
    `activation` is a name in `kernels.reference.ACTIVATIONS`. Returns `[rows, outputs]`.

    Raises ValueError for arguments that the kernel cannot take.
    """
    _check(x, {"gate": gate, "up": up}, {"norm": norm, "bias_gate": bias_gate, "bias_up": bias_up}, scales)
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
    switches, (lora, pointers) = _switches(x, norm, offset, scales, block, shrunk), read(x, shrunk)
    constants = *((activation, bias_gate is not None) if parts == 1 else (None, False)), *switches
    vectors = tuple(x if vector is None else vector for vector in (bias_gate, bias_up, norm))
    of_weights = (None, None) if scales is None else scales.tensors
    _gated(
        (x.dtype, gate.dtype, lora, x.device, block.num_warps, constants), (-(-len(gate) // block.outputs), parts, 1),
        (x, gate, up, *of_weights, *vectors, *pointers, sums), (rows, len(gate), inputs, part_blocks, eps), constants,
        num_warps=block.num_warps, **options(x.device),
    )  # fmt: skip
    if parts > 1:
        add_parts(sums, out, (bias_gate, bias_up), [len(gate)] * 2, None, 1.0, activation, gated=True)
    return out
