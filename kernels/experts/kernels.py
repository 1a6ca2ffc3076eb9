"""The kernels of `experts`: which experts were chosen, their two products, and the weighted sum of a row's choices.

A choice is a place in index `[rows, CHOICES]`: what it becomes is kept at that place, whatever its expert. With one row
every choice has programs of its own. With more, every expert that was chosen has them, with all rows: the weights are
the left operand of the tensor cores and are read once; rows that did not choose the expert are not read, and are zero.
Two equal choices of a row share the later place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pkv_hf.kernels.activations import activated
from pkv_hf.kernels.pdl import release, wait


@triton.jit(do_not_specialize=["choices", "experts"])
def chosen_kernel(index_ptr, chosen_ptr, choices, experts,
                  BLOCK: tl.constexpr, BINS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The experts that are in index `[choices]`, each once and in their order, then -1: chosen `[BINS]`.

    BINS are more than there are experts: what is no expert's number goes to the first that is none's.
    """
    wait(PDL)
    release(PDL)
    at = tl.arange(0, BLOCK)
    index = tl.load(index_ptr + at, mask=at < choices, other=-1)
    index = tl.where((index >= 0) & (index < experts), index, experts).to(tl.int32)
    expert = tl.arange(0, BINS)
    there = (tl.histogram(index, BINS) > 0) & (expert < experts)
    before = tl.cumsum(there.to(tl.int32), 0) - there.to(tl.int32)
    count = tl.sum(there.to(tl.int32), 0)
    place = tl.where(there, before, count + expert - before)
    tl.store(chosen_ptr + place, tl.where(there, expert, -1))


@triton.jit
def _places(index_ptr, expert, number, rows, CHOICES: tl.constexpr, BLOCK_CHOICES: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where in index each row chose an expert, -1 for rows that did not; `[BLOCK_M]`."""
    m = tl.arange(0, BLOCK_M)
    if BLOCK_M == 1:
        places = m + number
    else:
        choice = tl.arange(0, BLOCK_CHOICES)
        at = m[:, None] * CHOICES + choice[None, :]
        inside = (m < rows)[:, None] & (choice < CHOICES)[None, :]
        places = tl.max(tl.where(tl.load(index_ptr + at, mask=inside, other=-1) == expert, at, -1), 1)
    return places


@triton.jit
def _outputs(first, width, LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr):
    """The BLOCK_N outputs of a weight that results from `first` on are made of, and which there are.

    Of gated layouts half as many results, each of a gate and an up.
    """
    i = tl.arange(0, BLOCK_N)
    if LAYOUT == "halves":
        n = first + i % (BLOCK_N // 2)
        at = n + (i // (BLOCK_N // 2)) * width
        inside = n < width
    elif LAYOUT == "interleaved":
        at = 2 * first + i
        inside = at < 2 * width
    else:
        at = first + i
        inside = at < width
    return at.to(tl.int64), inside


@triton.jit
def _added(y, x_ptr, w_ptr, n, inside, x_at, there, outputs, inputs, factor,
           TRANSPOSED: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
           STAGES: tl.constexpr):  # fmt: skip
    """y plus W x of the outputs n of one expert's weight, in float32; x's rows begin at x_at.

    y is `[BLOCK_N, BLOCK_M]`; of one row it is `[BLOCK_N, BLOCK_K]`, to be summed over inputs, and x is multiplied by
    `factor` first.
    """
    k = tl.arange(0, BLOCK_K)
    if TRANSPOSED:
        w_at = n[:, None] + k.to(tl.int64)[None, :] * outputs
        step = outputs.to(tl.int64)
    else:
        w_at = n[:, None] * inputs + k[None, :]
        step = 1
    for at in tl.range(0, inputs, BLOCK_K, num_stages=STAGES):
        in_x = at + k < inputs
        mask = inside[:, None] if EVEN else inside[:, None] & in_x[None, :]
        if BLOCK_M == 1:  # no program reads these weights again
            w = tl.load(w_ptr + w_at + at * step, mask=mask, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_ptr + tl.sum(x_at, 0) + at + k, mask=in_x, other=0.0).to(tl.float32) * factor
            y += w.to(tl.float32) * x[None, :]
        else:
            w = tl.load(w_ptr + w_at + at * step, mask=mask, other=0.0)
            rows = there[:, None] if EVEN else there[:, None] & in_x[None, :]
            x = tl.load(x_ptr + x_at[:, None] + at + k[None, :], mask=rows, other=0.0)
            y = tl.dot(w, tl.trans(x), y, input_precision="ieee")
    return y


@triton.jit
def _product(x_ptr, w_ptr, bias_ptr, expert, n, inside, x_at, there, outputs, inputs,
             BIAS: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """W x + bias of an expert's outputs n, `[BLOCK_N, BLOCK_M]` in float32; x's rows begin at x_at."""
    w_ptr += expert.to(tl.int64) * outputs * inputs
    y = tl.zeros([BLOCK_N, BLOCK_K if BLOCK_M == 1 else BLOCK_M], tl.float32)
    y = _added(y, x_ptr, w_ptr, n, inside, x_at, there, outputs, inputs, 1.0, TRANSPOSED, EVEN, BLOCK_M, BLOCK_K,
               STAGES)  # fmt: skip
    if BLOCK_M == 1:
        y = tl.sum(y, 1)[:, None]
    if BIAS:
        y += tl.load(bias_ptr + expert.to(tl.int64) * outputs + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    return y


@triton.jit
def _round(y, out_ptr):
    return y.to(out_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _gated(y, out_ptr, limit, alpha, shift, LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr,
           ALPHA: tl.constexpr, SHIFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """What `reference.gate` makes of the first product `[BLOCK_N, BLOCK_M]`; comparisons leave NaN as it is."""
    if LAYOUT == "plain":
        acted = activated(_round(y, out_ptr), ACTIVATION)
    else:
        half: tl.constexpr = BLOCK_N // 2
        if LAYOUT == "halves":
            pairs = tl.permute(tl.reshape(y, [2, half, BLOCK_M]), [1, 2, 0])
        else:
            pairs = tl.permute(tl.reshape(y, [half, 2, BLOCK_M]), [0, 2, 1])
        gate, up = tl.split(pairs)
        gate = _round(gate, out_ptr)
        up = _round(up, out_ptr)
        if LIMIT:
            gate = tl.where(gate > limit, limit, gate)
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        acted = gate / (1.0 + tl.exp(-alpha * gate)) if ALPHA else activated(gate, ACTIVATION)
        if SHIFT:
            up = _round(up + shift, out_ptr)
        acted = _round(acted, out_ptr) * up
    return acted


@triton.jit(do_not_specialize=["rows", "experts", "limit", "alpha", "shift"])
def up_kernel(x_ptr, index_ptr, chosen_ptr, w_ptr, bias_ptr, h_ptr, rows, experts, width, outputs, inputs, limit, alpha,
              shift, CHOICES: tl.constexpr, BLOCK_CHOICES: tl.constexpr, LAYOUT: tl.constexpr, BIAS: tl.constexpr,
              ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr,
              TRANSPOSED: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
              BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The first products of x `[rows, inputs]`, gated: h `[rows * CHOICES, width]`, at the places of choices."""
    results: tl.constexpr = BLOCK_N if LAYOUT == "plain" else BLOCK_N // 2
    first = tl.program_id(0) * results
    number = tl.program_id(1)
    wait(PDL)
    expert = tl.load((index_ptr if BLOCK_M == 1 else chosen_ptr) + number)
    if (expert >= 0) & (expert < experts):
        places = _places(index_ptr, expert, number, rows, CHOICES, BLOCK_CHOICES, BLOCK_M)
        n, inside = _outputs(first, width, LAYOUT, BLOCK_N)
        x_at = tl.arange(0, BLOCK_M).to(tl.int64) * inputs
        y = _product(x_ptr, w_ptr, bias_ptr, expert, n, inside, x_at, places >= 0, outputs, inputs, BIAS, TRANSPOSED,
                     EVEN, BLOCK_M, BLOCK_N, BLOCK_K, STAGES)  # fmt: skip
        h = _gated(y, h_ptr, limit, alpha, shift, LAYOUT, ACTIVATION, LIMIT, ALPHA, SHIFT, BLOCK_M, BLOCK_N)
        n = first + tl.arange(0, results)
        at = places.to(tl.int64)[None, :] * width + n[:, None]
        tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=(places >= 0)[None, :] & (n < width)[:, None])
    release(PDL)


@triton.jit(do_not_specialize=["rows", "experts"])
def down_kernel(h_ptr, index_ptr, chosen_ptr, w_ptr, bias_ptr, y_ptr, rows, experts, outputs, inputs,
                CHOICES: tl.constexpr, BLOCK_CHOICES: tl.constexpr, BIAS: tl.constexpr, TRANSPOSED: tl.constexpr,
                EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The second products of h `[rows * CHOICES, inputs]`: y `[rows * CHOICES, outputs]`, float32."""
    number = tl.program_id(1)
    wait(PDL)
    expert = tl.load((index_ptr if BLOCK_M == 1 else chosen_ptr) + number)
    if (expert >= 0) & (expert < experts):
        places = _places(index_ptr, expert, number, rows, CHOICES, BLOCK_CHOICES, BLOCK_M)
        n, inside = _outputs(tl.program_id(0) * BLOCK_N, outputs, "plain", BLOCK_N)
        y = _product(h_ptr, w_ptr, bias_ptr, expert, n, inside, places.to(tl.int64) * inputs, places >= 0, outputs,
                     inputs, BIAS, TRANSPOSED, EVEN, BLOCK_M, BLOCK_N, BLOCK_K, STAGES)  # fmt: skip
        at = places.to(tl.int64)[None, :] * outputs + n[:, None]
        tl.store(y_ptr + at, y, mask=(places >= 0)[None, :] & inside[:, None])
    release(PDL)


@triton.jit(do_not_specialize=["experts"])
def down_row_kernel(h_ptr, index_ptr, weights_ptr, w_ptr, bias_ptr, out_ptr, experts, outputs, inputs,
                    CHOICES: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The second products of h `[CHOICES, inputs]` of one row, times the choices' weights, summed: out `[outputs]`."""
    wait(PDL)
    release(PDL)
    n, inside = _outputs(tl.program_id(0) * BLOCK_N, outputs, "plain", BLOCK_N)
    y = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    added = tl.zeros([BLOCK_N], tl.float32)
    for choice in range(CHOICES):
        expert = tl.load(index_ptr + choice)
        weight = tl.load(weights_ptr + choice).to(tl.float32)
        if (expert >= 0) & (expert < experts):
            of_expert = w_ptr + expert.to(tl.int64) * outputs * inputs
            x_at = tl.arange(0, 1).to(tl.int64) + choice * inputs
            y = _added(y, h_ptr, of_expert, n, inside, x_at, x_at >= 0, outputs, inputs, weight, False, EVEN, 1,
                       BLOCK_K, STAGES)  # fmt: skip
            if BIAS:
                bias = tl.load(bias_ptr + expert.to(tl.int64) * outputs + n, mask=inside, other=0.0)
                added += weight * bias.to(tl.float32)
    y = tl.sum(y, 1) + added
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["experts"])
def weigh_kernel(y_ptr, index_ptr, weights_ptr, out_ptr, experts, width,
                 CHOICES: tl.constexpr, BLOCK_CHOICES: tl.constexpr, BLOCK: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """The sum of y `[rows, CHOICES, width]` times the choices' weights, in their order: out `[rows, width]`."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1) * CHOICES
    wait(PDL)
    release(PDL)
    choice = tl.arange(0, BLOCK_CHOICES)
    index = tl.load(index_ptr + first + choice, mask=choice < CHOICES, other=-1)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(CHOICES):
        expert = tl.load(index_ptr + first + i)
        weight = tl.load(weights_ptr + first + i).to(tl.float32)
        place = first + tl.max(tl.where(index == expert, choice, -1), 0)  # where equal choices are kept
        there = (expert >= 0) & (expert < experts)
        y = tl.load(y_ptr + place.to(tl.int64) * width + n, mask=(n < width) & there, other=0.0)
        total += tl.where(there, weight, 0.0) * y
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * width + n, total.to(out_ptr.dtype.element_ty), mask=n < width)
