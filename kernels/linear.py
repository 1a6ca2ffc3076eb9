"""Linear layers on few rows: weights read once at the speed of memory, several in one launch, epilogues fused.

A decode step multiplies 1 to `MAX_ROWS` rows by every weight of the model, so it takes the time that reading them
takes. One row is a product of vectors; more rows go through the tensor cores, padded to 16. Sums are float32; outputs
are rounded where transformers rounds them, but the norm, which scales the sum instead of every input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.launch import Remembered, described, device_limits
from pkv_hf.kernels.launcher import Launcher
from pkv_hf.kernels.pdl import options, overlaps, release, wait

MAX_ROWS = 16
DTYPES = (torch.float16, torch.bfloat16)


def outruns_cublas(x: torch.Tensor, outputs: int) -> bool:
    """Whether products of x `[rows, inputs]` with `outputs` outputs are better ours (benchmarks/results/linear.jsonl).

    Those of one row always are; those of more rows where every multiprocessor has a block of 16 outputs. Of narrower
    layers cuBLAS cuts the inputs too.
    """
    return len(x) == 1 or outputs >= 16 * device_limits(x.device)[0]


@dataclass(frozen=True)
class Block:
    """How a launch cuts its weights: outputs and inputs of a block, and how its loop is compiled."""

    outputs: int
    inputs: int
    num_stages: int
    ahead: bool = False
    """Load a block of weights before the one in hand is used, the first before the kernel before this one is done."""


def choose_block(rows: int, inputs: int, outputs: int, weights: int, shared_memory: int) -> Block:
    """The block of a launch over `weights` weights at a time (two for SwiGLU) that fits `shared_memory` bytes.

    One row needs none: its products stay in registers. More rows keep `num_stages` blocks of weights and of x there.
    Small weights are mostly ramp-up, which `ahead` hides.
    """
    if rows == 1 and weights * outputs <= 8192:
        return Block(4, 2048 if inputs >= 8192 else 512, 1, ahead=True)
    if rows == 1:
        return Block(4, 1024, 3)
    wide, narrow = Block(64, 256, 3), Block(32, 256, 4)
    for block in (wide if outputs > 4096 else narrow, Block(32, 128, 3), Block(16, 64, 3)):
        if block.num_stages * (weights * block.outputs + 16) * block.inputs * 2 + 4096 <= shared_memory:
            break
    return block


@triton.jit
def _read_once(pointers, mask):
    """Weights for one row: no program reads them again, so they are the first to leave L2."""
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _one_row(x_ptr, w_ptr, w2_ptr, norm_ptr, first, outputs, inputs, eps,
             NORM: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_K: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """As `_products`, of norm(x) for one row; [1, BLOCK_N] each.

    The loop adds up products input by input, [BLOCK_N, BLOCK_K] in registers. They are summed across threads once, at
    the end, and there 1 / rms(x), which all share, multiplies the sums. AHEAD is for the first weight alone.
    """
    n = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    w_at = n.to(tl.int64)[:, None] * inputs + k[None, :]
    w_mask = (n < outputs)[:, None]
    products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    products2 = products
    squares = tl.zeros([BLOCK_K], tl.float32)
    release(PDL)
    if AHEAD:  # no kernel writes weights, so that they need not wait as x does
        next_w = _read_once(w_ptr + w_at, w_mask if EVEN else w_mask & (k < inputs)[None, :])
    wait(PDL)
    for at in tl.range(0, inputs, BLOCK_K, num_stages=STAGES):
        inside = at + k < inputs
        mask = w_mask if EVEN else w_mask & inside[None, :]
        if AHEAD:
            w = next_w
            more = at + BLOCK_K < inputs if EVEN else (at + BLOCK_K + k < inputs)[None, :]
            next_w = _read_once(w_ptr + w_at + at + BLOCK_K, w_mask & more)
        else:
            w = _read_once(w_ptr + w_at + at, mask)
        x = tl.load(x_ptr + at + k, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(norm_ptr + at + k, mask=inside, other=0.0).to(tl.float32)
        products += w.to(tl.float32) * x[None, :]
        if GATED:
            products2 += _read_once(w2_ptr + w_at + at, mask).to(tl.float32) * x[None, :]
    y = tl.sum(products, 1)[None, :]
    y2 = tl.sum(products2, 1)[None, :] if GATED else y
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / inputs + eps)
        y *= scale
        y2 *= scale
    return y, y2


@triton.jit
def _rows(x_ptr, w_ptr, w2_ptr, rows, first, outputs, inputs,
          GATED: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
          STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """As `_products`, for rows padded to 16; [16, BLOCK_N] each."""
    m = tl.arange(0, 16)
    n = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    w_at = n.to(tl.int64)[:, None] * inputs + k[None, :]
    w_mask = (n < outputs)[:, None]
    x_at = m[:, None] * inputs + k[None, :]
    x_mask = (m < rows)[:, None]
    y = tl.zeros([BLOCK_N, 16], tl.float32)
    y2 = y
    wait(PDL)
    for at in tl.range(0, inputs, BLOCK_K, num_stages=STAGES):
        inside = (at + k < inputs)[None, :]
        mask = w_mask if EVEN else w_mask & inside
        w = tl.load(w_ptr + w_at + at, mask=mask, other=0.0)
        x = tl.trans(tl.load(x_ptr + x_at + at, mask=x_mask if EVEN else x_mask & inside, other=0.0))
        y = tl.dot(w, x, y)
        if GATED:
            y2 = tl.dot(tl.load(w2_ptr + w_at + at, mask=mask, other=0.0), x, y2)
    release(PDL)
    return tl.trans(y), tl.trans(y2)


@triton.jit
def _products(x_ptr, w_ptr, w2_ptr, norm_ptr, rows, first, outputs, inputs, eps,
              NORM: tl.constexpr, GATED: tl.constexpr, ONE_ROW: tl.constexpr, EVEN: tl.constexpr,
              BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
              PDL: tl.constexpr):  # fmt: skip
    """x W^T, and x W2^T where GATED, for outputs first, ..., first + BLOCK_N - 1; float32.

    EVEN: inputs are a multiple of BLOCK_K, so that loads of weights need no mask for the last block.
    """
    if ONE_ROW:
        y, y2 = _one_row(x_ptr, w_ptr, w2_ptr, norm_ptr, first, outputs, inputs, eps,
                         NORM, GATED, EVEN, BLOCK_N, BLOCK_K, STAGES, AHEAD, PDL)  # fmt: skip
    else:
        y, y2 = _rows(x_ptr, w_ptr, w2_ptr, rows, first, outputs, inputs,
                      GATED, EVEN, BLOCK_N, BLOCK_K, STAGES, PDL)  # fmt: skip
    return y, y2


@triton.jit
def _round(y, out_ptr):
    """y rounded as the output's dtype has it, in float32."""
    return y.to(out_ptr.dtype.element_ty).to(tl.float32)


RUNTIME = ["rows", "outputs_a", "outputs_b", "outputs_c", "eps"]
"""Arguments that Triton must not specialise on: rows change without a new compilation."""


@triton.jit(do_not_specialize=RUNTIME)
def linear_kernel(x_ptr, a_ptr, b_ptr, c_ptr, bias_a_ptr, bias_b_ptr, bias_c_ptr, norm_ptr, residual_ptr, out_ptr,
                  rows, outputs_a, outputs_b, outputs_c, inputs, eps,
                  WEIGHTS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
                  EVEN: tl.constexpr, ONE_ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_K: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One weight, or three side by side, each in blocks of its own: out [rows, outputs_a + outputs_b + outputs_c]."""
    block = tl.program_id(0)
    w_ptr = a_ptr
    bias_ptr = bias_a_ptr
    outputs = outputs_a
    column = tl.zeros([], tl.int32)  # of out, where the weight's outputs begin
    width = outputs_a
    if WEIGHTS > 1:
        blocks_a = tl.cdiv(outputs_a, BLOCK_N)
        blocks_b = tl.cdiv(outputs_b, BLOCK_N)
        width = outputs_a + outputs_b + outputs_c
        if block >= blocks_a + blocks_b:
            w_ptr = c_ptr
            bias_ptr = bias_c_ptr
            outputs = outputs_c
            column = outputs_a + outputs_b
            block -= blocks_a + blocks_b
        elif block >= blocks_a:
            w_ptr = b_ptr
            bias_ptr = bias_b_ptr
            outputs = outputs_b
            column = outputs_a
            block -= blocks_a
    y, _ = _products(x_ptr, w_ptr, w_ptr, norm_ptr, rows, block * BLOCK_N, outputs, inputs, eps,
                     NORM, False, ONE_ROW, EVEN, BLOCK_N, BLOCK_K, STAGES, AHEAD, PDL)  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * width + (column + n)[None, :]
    mask = (m < rows)[:, None] & (n < outputs)[None, :]
    if RESIDUAL:
        y = _round(y, out_ptr) + tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "outputs", "eps"])
def swiglu_kernel(x_ptr, gate_ptr, up_ptr, norm_ptr, out_ptr, rows, outputs, inputs, eps,
                  NORM: tl.constexpr, EVEN: tl.constexpr, ONE_ROW: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """silu(x G^T) * (x U^T)."""
    first = tl.program_id(0) * BLOCK_N
    gate, up = _products(x_ptr, gate_ptr, up_ptr, norm_ptr, rows, first, outputs, inputs, eps,
                         NORM, True, ONE_ROW, EVEN, BLOCK_N, BLOCK_K, STAGES, AHEAD, PDL)  # fmt: skip
    gate = _round(gate, out_ptr)
    y = _round(gate / (1.0 + tl.exp(-gate)), out_ptr) * _round(up, out_ptr)
    m = tl.arange(0, BLOCK_M)
    n = first + tl.arange(0, BLOCK_N)
    mask = (m < rows)[:, None] & (n < outputs)[None, :]
    at = m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


_linear, _swiglu = Launcher(linear_kernel, fp_fusion=True), Launcher(swiglu_kernel, fp_fusion=True)
_checked: Remembered[None] = Remembered()


def _check(x: torch.Tensor, weights: dict[str, torch.Tensor], vectors: dict[str, torch.Tensor | None]) -> None:
    key = described(x, *weights.values(), *vectors.values())
    if key in _checked:
        return
    if vectors["norm"] is not None and len(x) > 1:
        raise ValueError(f"norm with {len(x)} rows: norm them first, only one row's norm goes with the product")
    if x.dtype not in DTYPES or x.ndim != 2 or not 1 <= len(x) <= MAX_ROWS or not x.is_contiguous():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}: want contiguous [1 to {MAX_ROWS}, inputs] in fp16 or bf16")
    for name, weight in weights.items():
        if weight.dtype != x.dtype or weight.shape[1] != x.shape[1] or not weight.is_contiguous():
            raise ValueError(f"{name} is {weight.dtype} {list(weight.shape)}: want contiguous [outputs, {x.shape[1]}]")
    for name, vector in vectors.items():
        if vector is not None and (vector.dtype != x.dtype or not vector.is_contiguous()):
            raise ValueError(f"{name} is {vector.dtype}: want it contiguous in {x.dtype}")
    _checked[key] = None


def _constants(x: torch.Tensor, norm: torch.Tensor | None, block: Block) -> tuple[Any, ...]:
    """NORM, EVEN, ONE_ROW, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, AHEAD, PDL of both kernels."""
    rows, inputs = x.shape
    return (
        norm is not None, inputs % block.inputs == 0, rows == 1, 1 if rows == 1 else 16, block.outputs, block.inputs,
        block.num_stages, block.ahead, overlaps(x.device),
    )  # fmt: skip


def linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None] = (None, None, None),
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + norm(x) W^T + bias of one weight, or of three side by side in one launch.

    x `[rows, inputs]`, 1 to 16 rows, fp16 or bf16; weights `[outputs, inputs]`, biases `[outputs]`, all or none; `norm`
    is the weight `[inputs]` of an RMSNorm (Zhang & Sennrich 2019) with `eps` before the product, for one row; residual
    `[rows, outputs]`, with one weight. Returns `[rows, sum of outputs]`.

    Raises ValueError for arguments that the kernel cannot take.
    """
    rows, inputs = x.shape
    _check(x, {f"weights[{i}]": weight for i, weight in enumerate(weights)}, {"norm": norm, "residual": residual})
    if len(weights) not in (1, 3) or (residual is not None and len(weights) > 1):
        raise ValueError(f"{len(weights)} weights: want one, or three without a residual")
    outputs = [len(weight) for weight in weights]
    block = choose_block(rows, inputs, sum(outputs), 1, device_limits(x.device)[1])
    out = torch.empty((rows, sum(outputs)), dtype=x.dtype, device=x.device)
    a, b, c = weights if len(weights) == 3 else (weights[0],) * 3
    bias_a, bias_b, bias_c = (a if bias is None else bias for bias in (tuple(biases) * 3)[:3])
    constants = (len(weights), biases[0] is not None, residual is not None, *_constants(x, norm, block))
    _linear(
        (x.dtype, x.device, constants), (sum(-(-count // block.outputs) for count in outputs), 1, 1),
        (x, a, b, c, bias_a, bias_b, bias_c, x if norm is None else norm, x if residual is None else residual, out),
        (rows, *(outputs if len(outputs) == 3 else outputs * 3), inputs, eps), constants,
        num_warps=4, **options(x.device),
    )  # fmt: skip
    return out


def swiglu(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """silu(norm(x) G^T) * (norm(x) U^T) (Shazeer 2020) in one launch; x, norm and eps as `linear` has them.

    gate and up `[outputs, inputs]`. Returns `[rows, outputs]`.

    Raises ValueError for arguments that the kernel cannot take.
    """
    _check(x, {"gate": gate, "up": up}, {"norm": norm})
    if gate.shape != up.shape:
        raise ValueError(f"gate is {list(gate.shape)} and up {list(up.shape)}: want the same")
    rows, inputs = x.shape
    block = choose_block(rows, inputs, len(gate), 2, device_limits(x.device)[1])
    out = torch.empty((rows, len(gate)), dtype=x.dtype, device=x.device)
    constants = _constants(x, norm, block)
    _swiglu(
        (x.dtype, x.device, constants), (-(-len(gate) // block.outputs), 1, 1),
        (x, gate, up, x if norm is None else norm, out), (rows, len(gate), inputs, eps), constants,
        num_warps=4, **options(x.device),
    )  # fmt: skip
    return out
