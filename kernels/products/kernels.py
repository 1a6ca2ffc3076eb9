"""The kernels of `linear`: products of few rows, and what becomes of them."""

from __future__ import annotations

import triton
import triton.language as tl

from pkv_hf.kernels.products.ends import end, end_gated
from pkv_hf.kernels.products.loops import products

RUNTIME = ["rows", "outputs_a", "outputs_b", "outputs_c", "part_blocks", "eps", "scale"]
"""Arguments that Triton must not specialise on: rows change without a new compilation."""


@triton.jit(do_not_specialize=RUNTIME)
def linear_kernel(x_ptr, a_ptr, b_ptr, c_ptr, scale_a_ptr, scale_b_ptr, scale_c_ptr, bias_a_ptr, bias_b_ptr,
                  bias_c_ptr, residual_ptr, norm_ptr, table_ptr, h_ptr, lora_ptr, out_ptr,
                  rows, outputs_a, outputs_b, outputs_c, inputs, part_blocks, scale, eps,
                  WEIGHTS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
                  ACTIVATION: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, SCALES: tl.constexpr,
                  UNIT: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr, ADAPTERS: tl.constexpr,
                  BLOCK_M: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                  STAGES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One weight, or three side by side, each in blocks of its own: out [rows, outputs_a + outputs_b + outputs_c].

    With PARTS out is float32 `[parts, rows, outputs]`, of which `epilogue.add_parts` makes the rest. ADAPTERS counts
    the parts of h, 0 where no weight has adapters; the first of PARTS takes what they add. SCALES as in `products`.
    """
    block = tl.program_id(0)
    w_ptr = a_ptr
    scale_ptr = scale_a_ptr
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
            if SCALES:
                scale_ptr = scale_c_ptr
            bias_ptr = bias_c_ptr
            outputs = outputs_c
            column = outputs_a + outputs_b
            block -= blocks_a + blocks_b
        elif block >= blocks_a:
            number = 1
            w_ptr = b_ptr
            if SCALES:
                scale_ptr = scale_b_ptr
            bias_ptr = bias_b_ptr
            outputs = outputs_b
            column = outputs_a
            block -= blocks_a
    y, _, tail, _, residual, factor = products(
        x_ptr, w_ptr, w_ptr, scale_ptr, scale_ptr, norm_ptr, residual_ptr, rows, block * BLOCK_N, outputs, inputs,
        part_blocks, eps, NORM, OFFSET, SCALES, UNIT, RESIDUAL, False, EVEN, PARTS, BLOCK_M, TAIL, BLOCK_N, BLOCK_K,
        STAGES, AHEAD, PDL)  # fmt: skip
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    end(y, tail, residual, factor, bias_ptr, residual_ptr, table_ptr, h_ptr, lora_ptr, out_ptr, rows, n, outputs,
        column, width, number, scale, BIAS, RESIDUAL, BLOCK_M == 1, SCALED, ACTIVATION, PARTS, ADAPTERS, BLOCK_M, TAIL,
        BLOCK_N)  # fmt: skip


@triton.jit(do_not_specialize=["rows", "outputs", "part_blocks", "eps"])
def gated_kernel(x_ptr, gate_ptr, up_ptr, scale_gate_ptr, scale_up_ptr, bias_gate_ptr, bias_up_ptr, norm_ptr,
                 table_ptr, h_ptr, lora_ptr, out_ptr, rows, outputs, inputs, part_blocks, eps,
                 ACTIVATION: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
                 SCALES: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr,
                 ADAPTERS: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_K: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """act(x G^T + bias) * (x U^T + bias); with PARTS as `linear_kernel`, out `[parts, 2, rows, outputs]`."""
    first = tl.program_id(0) * BLOCK_N
    gate, up, gate_tail, up_tail, _, factor = products(
        x_ptr, gate_ptr, up_ptr, scale_gate_ptr, scale_up_ptr, norm_ptr, x_ptr, rows, first, outputs, inputs,
        part_blocks, eps, NORM, OFFSET, SCALES, UNIT, False, True, EVEN, PARTS, BLOCK_M, TAIL, BLOCK_N, BLOCK_K, STAGES,
        AHEAD, PDL)  # fmt: skip
    n = first + tl.arange(0, BLOCK_N)
    end_gated(gate, up, gate_tail, up_tail, factor, bias_gate_ptr, bias_up_ptr, table_ptr, h_ptr, lora_ptr, out_ptr,
              rows, n, outputs, ACTIVATION, BIAS, PARTS, ADAPTERS, BLOCK_M, TAIL, BLOCK_N)  # fmt: skip
