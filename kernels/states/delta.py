"""One step of the gated delta rule (Yang et al. 2024, Gated Delta Networks), its state updated in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.launch import next_power_of_2
from pkv_hf.kernels.launcher import Launcher
from pkv_hf.kernels.pdl import options, overlaps, release, wait
from pkv_hf.kernels.states.common import BLOCK_STATES, check, softplus

EPS = 1e-6
"""Of the norms of q and k."""


@triton.jit
def _unit(x_ptr, at, mask, eps):
    """x over its l2 norm."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x, 0) + eps)


@triton.jit(do_not_specialize=["stride_x", "stride_a", "stride_b", "eps"])
def delta_rule_kernel(x_ptr, a_ptr, b_ptr, a_log_ptr, dt_bias_ptr, state_ptr, out_ptr, stride_x, stride_a, stride_b,
                      eps, KEY_HEADS: tl.constexpr, REPEATS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
                      BETA: tl.constexpr, PAIRED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
                      PDL: tl.constexpr):  # fmt: skip
    """BLOCK_V columns of a head's state: they do not depend on each other."""
    wait(PDL)
    release(PDL)
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    key_head = head // REPEATS
    i = tl.arange(0, BLOCK_K)
    j = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    x_ptr += row * stride_x
    q = _unit(x_ptr, key_head * DK + i, i < DK, eps) * (DK**-0.5)
    k = _unit(x_ptr, (KEY_HEADS + key_head) * DK + i, i < DK, eps)
    v = tl.load(x_ptr + 2 * KEY_HEADS * DK + head * DV + j, mask=j < DV, other=0.0).to(tl.float32)
    place = key_head * 2 * REPEATS + head % REPEATS if PAIRED else head
    a = tl.load(a_ptr + row * stride_a + place).to(tl.float32) + tl.load(dt_bias_ptr + head).to(tl.float32)
    decay = tl.exp(-tl.exp(tl.load(a_log_ptr + head).to(tl.float32)) * softplus(a))
    beta = BETA / (1.0 + tl.exp(-tl.load(b_ptr + row * stride_b + place).to(tl.float32)))
    state_at = state_ptr + (row * KEY_HEADS * REPEATS + head) * DK * DV + i[:, None] * DV + j[None, :]
    mask = (i < DK)[:, None] & (j < DV)[None, :]
    state = tl.load(state_at, mask=mask, other=0.0).to(tl.float32) * decay
    change = (v - tl.sum(state * k[:, None], 0)) * beta
    state += k[:, None] * change[None, :]
    tl.store(state_at, state.to(state_ptr.dtype.element_ty), mask=mask)
    out_at = out_ptr + (row * KEY_HEADS * REPEATS + head) * DV + j
    tl.store(out_at, tl.sum(state * q[:, None], 0).to(out_ptr.dtype.element_ty), mask=j < DV)


_delta_rule = Launcher(delta_rule_kernel, fp_fusion=True)


def delta_rule(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    *,
    key_heads: int,
    beta: float = 1.0,
    paired: bool = False,
) -> torch.Tensor:
    """One token of every row, in order: S = exp(g) S; S += k (beta sigmoid(b) (v - S^T k))^T; S^T q.

    x `[rows, 2 * H_k * D_k + H_v * D_v]` is q, k and v side by side, a head after the other; q and k are divided by
    their l2 norms, q by sqrt(D_k), and serve H_v / H_k heads of v each. a and b `[rows, H_v]`, a_log and dt_bias
    `[H_v]`: g = -exp(a_log) softplus(a + dt_bias). state S `[rows, H_v, D_k, D_v]`, float32 as a rule. With `paired`
    b and a are parts of one tensor, which has for each key head its b's, then its a's: `[rows, 2 * H_v - H_v / H_k]`
    from the first of each on.

    Returns `[rows, H_v * D_v]` in x's dtype. Raises ValueError for arguments that the kernel cannot take.
    """
    rows, heads, dk, dv = state.shape
    if heads % key_heads:
        raise ValueError(f"key_heads={key_heads} do not divide the {heads} heads of state")
    repeats = heads // key_heads
    width = 2 * heads - repeats if paired else heads
    widths = {"x": (x, 2 * key_heads * dk + heads * dv), "a": (a, width), "b": (b, width)}
    check(widths, {"a_log": (a_log, (heads,)), "dt_bias": (dt_bias, (heads,))}, (state, (len(x), heads, dk, dv)))
    out = torch.empty((rows, heads * dv), dtype=x.dtype, device=x.device)
    block_k = next_power_of_2(dk)
    block_v = min(next_power_of_2(dv), max(BLOCK_STATES // block_k, 8))
    constants = (key_heads, repeats, dk, dv, beta, paired, block_k, block_v, overlaps(x.device))
    _delta_rule(
        (x.dtype, a_log.dtype, dt_bias.dtype, state.dtype, x.device, *constants), (-(-dv // block_v), heads, rows),
        (x, a, b, a_log, dt_bias, state, out), (x.stride(0), a.stride(0), b.stride(0), EPS), constants,
        num_warps=4, **options(x.device),
    )  # fmt: skip
    return out
