"""The kernels of `linear4`: weights of 4 bits, with the epilogues of plain ones."""

from __future__ import annotations

import triton
import triton.language as tl

from pkv_hf.kernels.products.ends import end, end_gated
from pkv_hf.kernels.products.kernels import RUNTIME
from pkv_hf.kernels.quantized.loops import by_dot, by_sums
from pkv_hf.kernels.quantized.threads import by_threads


@triton.jit
def _products(x_ptr, w_ptr, absmax_ptr, code_ptr, absmax2_ptr, offset_ptr,
              w2_ptr, absmax_2_ptr, code_2_ptr, absmax2_2_ptr, offset_2_ptr, norm_ptr,
              rows, first, outputs, inputs, part_blocks, eps, NORM: tl.constexpr, OFFSET: tl.constexpr,
              GATED: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr, ASM: tl.constexpr, values_ptr,
              LAYOUT: tl.constexpr, SCALES: tl.constexpr, QBLOCK: tl.constexpr, GROUP: tl.constexpr,
              FORM: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
              BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """x W^T, and x W2^T where GATED, for outputs first, ..., and a norm's factor, as `by_dot` returns them."""
    TYPE: tl.constexpr = norm_ptr.dtype.element_ty
    if FORM == "threads":
        y, y2, factor = by_threads(
            x_ptr, w_ptr, absmax_ptr, code_ptr, absmax2_ptr, offset_ptr, w2_ptr, absmax_2_ptr, code_2_ptr,
            absmax2_2_ptr, offset_2_ptr, norm_ptr, first, outputs, inputs, eps, TYPE, NORM, OFFSET, GATED, ASM,
            values_ptr, SCALES, QBLOCK, BLOCK_N, BLOCK_K, PDL)  # fmt: skip
        tail, tail2 = y, y2
    elif FORM == "sums":
        y, y2, factor = by_sums(
            x_ptr, w_ptr, absmax_ptr, code_ptr, absmax2_ptr, offset_ptr, w2_ptr, absmax_2_ptr, code_2_ptr,
            absmax2_2_ptr, offset_2_ptr, norm_ptr, first, outputs, inputs, eps, TYPE, NORM, OFFSET, GATED, EVEN, ASM,
            values_ptr, LAYOUT, SCALES, QBLOCK, GROUP, BLOCK_N, BLOCK_K, PDL)  # fmt: skip
        tail, tail2 = y, y2
    else:
        begin = 0
        end = inputs
        if PARTS:
            begin = tl.program_id(1) * part_blocks * BLOCK_K
            end = tl.minimum(begin + part_blocks * BLOCK_K, inputs)
        y, y2, tail, tail2, factor = by_dot(
            x_ptr, w_ptr, absmax_ptr, code_ptr, absmax2_ptr, offset_ptr, w2_ptr, absmax_2_ptr, code_2_ptr,
            absmax2_2_ptr, offset_2_ptr, norm_ptr, rows, first, outputs, inputs, begin, end, eps, TYPE, NORM, OFFSET,
            GATED, EVEN, ASM, values_ptr, LAYOUT, SCALES, QBLOCK, GROUP, FORM == "weights", BLOCK_M, TAIL, BLOCK_N,
            BLOCK_K, STAGES, PDL)  # fmt: skip
    return y, y2, tail, tail2, factor


@triton.jit(do_not_specialize=RUNTIME)
def linear4_kernel(x_ptr, a_ptr, absmax_a_ptr, code_a_ptr, absmax2_a_ptr, offset_a_ptr,
                   b_ptr, absmax_b_ptr, code_b_ptr, absmax2_b_ptr, offset_b_ptr,
                   c_ptr, absmax_c_ptr, code_c_ptr, absmax2_c_ptr, offset_c_ptr,
                   bias_a_ptr, bias_b_ptr, bias_c_ptr, residual_ptr, norm_ptr, values_ptr,
                   table_ptr, h_ptr, lora_ptr, out_ptr,
                   rows, outputs_a, outputs_b, outputs_c, inputs, part_blocks, scale, eps,
                   WEIGHTS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
                   ACTIVATION: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, EVEN: tl.constexpr,
                   PARTS: tl.constexpr, ADAPTERS: tl.constexpr, ASM: tl.constexpr, LAYOUT: tl.constexpr,
                   SCALES: tl.constexpr, QBLOCK: tl.constexpr, GROUP: tl.constexpr, FORM: tl.constexpr,
                   BLOCK_M: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                   STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """As `products.kernels.linear_kernel`, of weights of 4 bits, each with its scales and what those stand for."""
    block = tl.program_id(0)
    w_ptr = a_ptr
    absmax_ptr = absmax_a_ptr
    code_ptr = code_a_ptr
    absmax2_ptr = absmax2_a_ptr
    offset_ptr = offset_a_ptr
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
            absmax_ptr = absmax_c_ptr
            code_ptr = code_c_ptr
            absmax2_ptr = absmax2_c_ptr
            offset_ptr = offset_c_ptr
            bias_ptr = bias_c_ptr
            outputs = outputs_c
            column = outputs_a + outputs_b
            block -= blocks_a + blocks_b
        elif block >= blocks_a:
            number = 1
            w_ptr = b_ptr
            absmax_ptr = absmax_b_ptr
            code_ptr = code_b_ptr
            absmax2_ptr = absmax2_b_ptr
            offset_ptr = offset_b_ptr
            bias_ptr = bias_b_ptr
            outputs = outputs_b
            column = outputs_a
            block -= blocks_a
    y, _, tail, _, factor = _products(
        x_ptr, w_ptr, absmax_ptr, code_ptr, absmax2_ptr, offset_ptr, w_ptr, absmax_ptr, code_ptr, absmax2_ptr,
        offset_ptr, norm_ptr, rows, block * BLOCK_N, outputs, inputs, part_blocks, eps, NORM, OFFSET, False,
        EVEN, PARTS, ASM, values_ptr, LAYOUT, SCALES, QBLOCK, GROUP, FORM, BLOCK_M, TAIL, BLOCK_N, BLOCK_K,
        STAGES, PDL)  # fmt: skip
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    end(y, tail, 0.0, factor, bias_ptr, residual_ptr, table_ptr, h_ptr, lora_ptr, out_ptr, rows, n, outputs,
        column, width, number, scale, BIAS, RESIDUAL, False, SCALED, ACTIVATION, PARTS, ADAPTERS, BLOCK_M, TAIL,
        BLOCK_N)  # fmt: skip


@triton.jit(do_not_specialize=["rows", "outputs", "part_blocks", "eps"])
def gated4_kernel(x_ptr, gate_ptr, absmax_gate_ptr, code_gate_ptr, absmax2_gate_ptr, offset_gate_ptr,
                  up_ptr, absmax_up_ptr, code_up_ptr, absmax2_up_ptr, offset_up_ptr,
                  bias_gate_ptr, bias_up_ptr, norm_ptr, values_ptr, table_ptr, h_ptr, lora_ptr, out_ptr,
                  rows, outputs, inputs, part_blocks, eps,
                  ACTIVATION: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
                  EVEN: tl.constexpr, PARTS: tl.constexpr, ADAPTERS: tl.constexpr, ASM: tl.constexpr,
                  LAYOUT: tl.constexpr, SCALES: tl.constexpr, QBLOCK: tl.constexpr, GROUP: tl.constexpr,
                  FORM: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """As `products.kernels.gated_kernel`, of weights of 4 bits."""
    first = tl.program_id(0) * BLOCK_N
    gate, up, gate_tail, up_tail, factor = _products(
        x_ptr, gate_ptr, absmax_gate_ptr, code_gate_ptr, absmax2_gate_ptr, offset_gate_ptr, up_ptr, absmax_up_ptr,
        code_up_ptr, absmax2_up_ptr, offset_up_ptr, norm_ptr, rows, first, outputs, inputs, part_blocks, eps, NORM,
        OFFSET, True, EVEN, PARTS, ASM, values_ptr, LAYOUT, SCALES, QBLOCK, GROUP, FORM, BLOCK_M, TAIL, BLOCK_N,
        BLOCK_K, STAGES, PDL)  # fmt: skip
    n = first + tl.arange(0, BLOCK_N)
    end_gated(gate, up, gate_tail, up_tail, factor, bias_gate_ptr, bias_up_ptr, table_ptr, h_ptr, lora_ptr, out_ptr,
              rows, n, outputs, ACTIVATION, BIAS, PARTS, ADAPTERS, BLOCK_M, TAIL, BLOCK_N)  # fmt: skip
