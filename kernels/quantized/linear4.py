"""Linear layers on few rows whose weights are of 4 bits: as `kernels.linear`, from the bytes as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pkv_hf.kernels.activations import check_activation
from pkv_hf.kernels.launch import Remembered, described, device_limits
from pkv_hf.kernels.launcher import Launcher
from pkv_hf.kernels.linear import DTYPES
from pkv_hf.kernels.pdl import options, overlaps
from pkv_hf.kernels.products.adapters import Adapters, Shrunk, read, shrink
from pkv_hf.kernels.products.blocks import MAX_ROWS
from pkv_hf.kernels.products.epilogue import Parts, add_parts, check_epilogue
from pkv_hf.kernels.quantized import codes
from pkv_hf.kernels.quantized.blocks import Block4, choose_block
from pkv_hf.kernels.quantized.kernels4 import gated4_kernel, linear4_kernel
from pkv_hf.kernels.quantized.weights import AnyWeight4, group_of, kind_of

_linear4, _gated4 = Launcher(linear4_kernel, fp_fusion=True), Launcher(gated4_kernel, fp_fusion=True)
_checked: Remembered[None] = Remembered()


def _check(x: torch.Tensor, weights: dict[str, AnyWeight4], vectors: dict[str, torch.Tensor | None]) -> None:
    tensors = [tensor for weight in weights.values() for tensor in weight.tensors]
    shapes = [(each.outputs, each.inputs, *kind_of(each)) for each in weights.values()]
    key = (*described(x, *tensors, *vectors.values()), *shapes)
    if key in _checked:
        return
    if vectors.get("norm") is not None and len(x) > 1:
        raise ValueError(f"norm with {len(x)} rows: take it first, only one row's goes with the product")
    if x.dtype not in DTYPES or x.ndim != 2 or not 1 <= len(x) <= MAX_ROWS or not x.is_contiguous():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}: want contiguous [1 to {MAX_ROWS}, inputs] in fp16 or bf16")
    first = next(iter(weights.values()))
    for name, weight in weights.items():
        _check_weight(name, weight, x.shape[1])
        if kind_of(weight) != kind_of(first):
            raise ValueError(f"{name} is of another kind than the weight before: {kind_of(weight)}")
    for name, vector in vectors.items():
        if vector is not None and (vector.dtype != x.dtype or not vector.is_contiguous()):
            raise ValueError(f"{name} is {vector.dtype}: want it contiguous in {x.dtype}")
    _checked[key] = None


def _check_weight(name: str, weight: AnyWeight4, inputs: int) -> None:
    if weight.quant_type not in codes.VALUES:
        raise ValueError(f"{name} has quant_type={weight.quant_type!r}: want one of {', '.join(codes.VALUES)}")
    try:
        group_of(weight, 1)
    except ValueError as error:
        raise ValueError(f"{name} has {error}") from None
    if weight.inputs != inputs:
        raise ValueError(f"{name} has {weight.inputs} inputs: want x's {inputs}")
    if wrong := weight.wrong():
        raise ValueError(f"{name}{wrong}")


def _aligned(vector: torch.Tensor) -> torch.Tensor:
    """The vector where words of 32 bits can be, of two elements each."""
    return vector.clone() if vector.data_ptr() % 4 else vector


def _asm(x: torch.Tensor, weight: AnyWeight4) -> tuple[str, ...] | None:
    """The instructions that look values up; None in the interpreter, which knows none."""
    return codes.texts(weight.quant_type, x.dtype) if x.is_cuda else None


def _constants(
    x: torch.Tensor, weight: AnyWeight4, norm: torch.Tensor | None, offset: float, block: Block4, shrunk: Shrunk | None
) -> tuple[Any, ...]:
    """NORM, OFFSET, and EVEN to PDL, of both kernels."""
    rows, inputs = x.shape
    group = group_of(weight, rows)
    return (
        norm is not None, offset, inputs % block.inputs == 0, block.cut(inputs)[0] > 1,
        0 if shrunk is None else len(shrunk.h), _asm(x, weight), weight.layout, weight.scaled, weight.block, group,
        block.form, *block.padded(rows, group), block.outputs, block.inputs, block.num_stages, overlaps(x.device),
    )  # fmt: skip


def _block(x: torch.Tensor, weights: Sequence[AnyWeight4], at_once: int) -> Block4:
    """How a launch over weights side by side, or `at_once` ones of the first's shape, is cut."""
    group, outputs = group_of(weights[0], len(x)), sum(weight.outputs for weight in weights)
    return choose_block(*x.shape, outputs, at_once, *device_limits(x.device), group, weights[0].layout)


def _tensors(block: Block4, *weights: AnyWeight4) -> list[torch.Tensor]:
    """Weights' tensors as the block's form reads them."""
    by_words = block.form == "threads"
    return [tensor for weight in weights for tensor in (weight.words if by_words else weight.tensors)]


def linear4(
    x: torch.Tensor,
    weights: Sequence[AnyWeight4],
    biases: Sequence[torch.Tensor | None] = (None, None, None),
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
    scale: float = 1.0,
    activation: str | None = None,
    adapters: Adapters | None = None,
    block: Block4 | None = None,
) -> torch.Tensor:
    """residual + scale * (norm(x) W^T + bias) as `linear.linear`, of one weight of 4 bits, of two or of three.

    Values are rounded to x's dtype before they are multiplied. The weights are alike in all but outputs.
    `block` is how the launch is cut, chosen where it is None. Raises ValueError for arguments that the kernel cannot
    take.
    """
    rows, inputs = x.shape
    named = {f"weights[{i}]": weight for i, weight in enumerate(weights)}
    vectors = {f"biases[{i}]": bias for i, bias in enumerate(biases)}
    _check(x, named, {"norm": norm, "residual": residual, **vectors})
    check_epilogue(len(weights), residual, activation)
    outputs = [weight.outputs for weight in weights]
    width = sum(outputs)
    block = block or _block(x, weights, 1)
    shrunk = None if adapters is None else shrink(x, adapters, outputs, norm, offset)
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if block.cut(inputs)[0] > 1:
        sums = _sums(x, weights, block, shrunk)
        add_parts(sums, out, biases[: len(weights)], outputs, residual, scale, activation)
    else:
        _launch(x, weights, block, out, shrunk, biases, norm, eps, offset, residual, scale, activation)
    return out


def in_parts4(
    x: torch.Tensor, weight: AnyWeight4, bias: torch.Tensor | None, adapters: Adapters | None = None
) -> Parts | None:
    """x W^T + bias, with adapters, as `linear4` takes it, left in the parts that its launch is cut into; None for one.

    `elementwise.add_norms` adds the parts and the bias. Raises ValueError for arguments that the kernel cannot take.
    """
    _check(x, {"weight": weight}, {"bias": bias})
    block = _block(x, [weight], 1)
    if block.cut(x.shape[1])[0] == 1:
        return None
    shrunk = None if adapters is None else shrink(x, adapters, [weight.outputs])
    return Parts(_sums(x, [weight], block, shrunk), bias)


def _sums(x: torch.Tensor, weights: Sequence[AnyWeight4], block: Block4, shrunk: Shrunk | None) -> torch.Tensor:
    """Float32 `[parts, rows, sum of outputs]` of a product that a block cuts."""
    shape = block.cut(x.shape[1])[0], len(x), sum(weight.outputs for weight in weights)
    sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    _launch(x, weights, block, sums, shrunk)
    return sums


def _launch(
    x: torch.Tensor, weights: Sequence[AnyWeight4], block: Block4, out: torch.Tensor, shrunk: Shrunk | None,
    biases: Sequence[torch.Tensor | None] = (None,), norm: torch.Tensor | None = None, eps: float = 0.0,
    offset: float = 0.0, residual: torch.Tensor | None = None, scale: float = 1.0, activation: str | None = None,
) -> None:  # fmt: skip
    """Writes a product that is in one part, with all that `linear4` takes, or else the sums of its parts."""
    rows, inputs = x.shape
    parts, part_blocks = block.cut(inputs)
    a, b, c = (*weights, *(weights[-1],) * 2)[:3]
    outputs = [*(weight.outputs for weight in weights), 0, 0][:3]
    bias_a, bias_b, bias_c = (x if bias is None else bias for bias in (tuple(biases) * 3)[:3])
    epilogue = biases[0] is not None, residual is not None, scale != 1.0, activation
    constants = 1 if len(weights) == 1 else 3, *epilogue, *_constants(x, a, norm, offset, block, shrunk)
    lora, pointers = read(x, shrunk)
    _linear4(
        (x.dtype, kind_of(a), lora, x.device, block.num_warps, constants),
        (sum(-(-weight.outputs // block.outputs) for weight in weights), parts, 1),
        (_aligned(x).view(torch.int32), *_tensors(block, a, b, c), bias_a, bias_b, bias_c,
         x if residual is None else residual, x if norm is None else _aligned(norm),
         codes.values(a.quant_type, x.dtype, x.device), *pointers, out),
        (rows, *outputs, inputs, part_blocks, scale, eps), constants,
        num_warps=block.num_warps, **options(x.device),
    )  # fmt: skip


def gated4(
    x: torch.Tensor,
    gate: AnyWeight4,
    up: AnyWeight4,
    activation: str = "silu",
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    bias_gate: torch.Tensor | None = None,
    bias_up: torch.Tensor | None = None,
    adapters: Adapters | None = None,
    block: Block4 | None = None,
) -> torch.Tensor:
    """act(norm(x) G^T + bias) * (norm(x) U^T + bias) as `linear.gated`, of weights as `linear4` takes them."""
    _check(x, {"gate": gate, "up": up}, {"norm": norm, "bias_gate": bias_gate, "bias_up": bias_up})
    check_activation(activation)
    if gate.outputs != up.outputs:
        raise ValueError(f"gate has {gate.outputs} outputs and up {up.outputs}: want the same")
    if (bias_gate is None) != (bias_up is None):
        raise ValueError(f"bias_{'gate' if bias_gate is None else 'up'} is None: want both biases or none")
    rows, inputs = x.shape
    block = block or _block(x, [gate], 2)
    parts, part_blocks = block.cut(inputs)
    out = torch.empty((rows, gate.outputs), dtype=x.dtype, device=x.device)
    sums = out
    if parts > 1:
        sums = torch.empty((parts, 2, rows, gate.outputs), dtype=torch.float32, device=x.device)
    shrunk = None if adapters is None else shrink(x, adapters, [gate.outputs] * 2, norm, offset)
    switches, (lora, pointers) = _constants(x, gate, norm, offset, block, shrunk), read(x, shrunk)
    constants = *((activation, bias_gate is not None) if parts == 1 else (None, False)), *switches
    vectors = [x if each is None else each for each in (bias_gate, bias_up, None if norm is None else _aligned(norm))]
    values = codes.values(gate.quant_type, x.dtype, x.device)
    _gated4(
        (x.dtype, kind_of(gate), lora, x.device, block.num_warps, constants),
        (-(-gate.outputs // block.outputs), parts, 1),
        (_aligned(x).view(torch.int32), *_tensors(block, gate, up), *vectors, values, *pointers, sums),
        (rows, gate.outputs, inputs, part_blocks, eps), constants, num_warps=block.num_warps, **options(x.device),
    )  # fmt: skip
    if parts > 1:
        add_parts(sums, out, (bias_gate, bias_up), [gate.outputs] * 2, None, 1.0, activation, gated=True)
    return out
