"""How a product's kernel ends, whatever its weights are stored as: adapters, bias, the epilogue or a part's sums."""

from __future__ import annotations

import triton
import triton.language as tl

from pkv_hf.kernels.products.adapters import with_adapters
from pkv_hf.kernels.products.epilogue import elements, finish, store_gated


@triton.jit
def end(y, tail, residual, factor, bias_ptr, residual_ptr, table_ptr, h_ptr, lora_ptr, out_ptr, rows, n, outputs,
        column, width, number, scale,
        BIAS: tl.constexpr, RESIDUAL: tl.constexpr, LOADED: tl.constexpr, SCALED: tl.constexpr,
        ACTIVATION: tl.constexpr, PARTS: tl.constexpr, ADAPTERS: tl.constexpr, BLOCK_M: tl.constexpr,
        TAIL: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Of outputs n of weight number `number`, which begin at `column` of out's `width`; sums as `products` gives them.

    The residual of the first BLOCK_M rows may be LOADED already.
    """
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
    if RESIDUAL and not LOADED:
        residual = tl.load(residual_ptr + at, mask=mask, other=0.0)
    finish(y, residual, at, mask, out_ptr, scale, RESIDUAL, SCALED, ACTIVATION)
    if TAIL > 0:
        at, mask = elements(BLOCK_M, TAIL, rows, n, outputs, column, width)
        if RESIDUAL:
            residual = tl.load(residual_ptr + at, mask=mask, other=0.0)
        finish(tail, residual, at, mask, out_ptr, scale, RESIDUAL, SCALED, ACTIVATION)


@triton.jit
def end_gated(gate, up, gate_tail, up_tail, factor, bias_gate_ptr, bias_up_ptr, table_ptr, h_ptr, lora_ptr, out_ptr,
              rows, n, outputs,
              ACTIVATION: tl.constexpr, BIAS: tl.constexpr, PARTS: tl.constexpr, ADAPTERS: tl.constexpr,
              BLOCK_M: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Of outputs n of gate and up, weights 0 and 1."""
    if ADAPTERS > 0:  # noqa: SIM102, as above
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
