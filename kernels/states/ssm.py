"""One step of a Mamba 2 state space (Dao & Gu 2024), its state updated in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.launch import next_power_of_2
from pkv_hf.kernels.launcher import Launcher
from pkv_hf.kernels.pdl import options, overlaps, release, wait
from pkv_hf.kernels.states.common import BLOCK_STATES, check, softplus


@triton.jit(do_not_specialize=["stride_x", "stride_dt"])
def state_space_kernel(x_ptr, dt_ptr, a_log_ptr, dt_bias_ptr, d_ptr, state_ptr, out_ptr, stride_x, stride_dt,
                       HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                       BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """BLOCK_P rows of a head's state."""
    wait(PDL)
    release(PDL)
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // (HEADS // GROUPS)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    x_ptr += row * stride_x
    x = tl.load(x_ptr + head * P + p, mask=p < P, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + HEADS * P + group * N + n, mask=n < N, other=0.0).to(tl.float32)
    c = tl.load(x_ptr + HEADS * P + (GROUPS + group) * N + n, mask=n < N, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + row * stride_dt + head).to(tl.float32) + tl.load(dt_bias_ptr + head).to(tl.float32)
    dt = softplus(dt)
    decay = tl.exp(-tl.exp(tl.load(a_log_ptr + head).to(tl.float32)) * dt)
    state_at = state_ptr + (row * HEADS + head) * P * N + p[:, None] * N + n[None, :]
    mask = (p < P)[:, None] & (n < N)[None, :]
    state = tl.load(state_at, mask=mask, other=0.0).to(tl.float32)
    state = state * decay + (dt * x)[:, None] * b[None, :]
    tl.store(state_at, state.to(state_ptr.dtype.element_ty), mask=mask)
    y = tl.sum(state * c[None, :], 1) + x * tl.load(d_ptr + head).to(tl.float32)
    tl.store(out_ptr + (row * HEADS + head) * P + p, y.to(out_ptr.dtype.element_ty), mask=p < P)


_state_space = Launcher(state_space_kernel, fp_fusion=True)


def state_space(
    x: torch.Tensor,
    dt: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    d: torch.Tensor,
    state: torch.Tensor,
    *,
    groups: int,
) -> torch.Tensor:
    """One token of every row: t = softplus(dt + dt_bias); S = exp(-exp(a_log) t) S + t x B^T; S C + d x.

    x `[rows, H * P + 2 * groups * N]` is x, B and C side by side, of which H / groups heads share B and C; dt
    `[rows, H]`; a_log, dt_bias and d `[H]`; state S `[rows, H, P, N]`, float32 as a rule.

    Returns `[rows, H * P]` in x's dtype. Raises ValueError for arguments that the kernel cannot take.
    """
    rows, heads, p, n = state.shape
    if heads % groups:
        raise ValueError(f"groups={groups} do not divide the {heads} heads of state")
    whole: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]] = {
        "a_log": (a_log, (heads,)), "dt_bias": (dt_bias, (heads,)), "d": (d, (heads,)),
    }  # fmt: skip
    check({"x": (x, heads * p + 2 * groups * n), "dt": (dt, heads)}, whole, (state, (len(x), heads, p, n)))
    out = torch.empty((rows, heads * p), dtype=x.dtype, device=x.device)
    block_n = next_power_of_2(n)
    block_p = min(next_power_of_2(p), max(BLOCK_STATES // block_n, 1))
    constants = (heads, groups, p, n, block_p, block_n, overlaps(x.device))
    dtypes = (x.dtype, a_log.dtype, dt_bias.dtype, d.dtype, state.dtype)
    _state_space(
        (*dtypes, x.device, *constants), (-(-p // block_p), heads, rows),
        (x, dt, a_log, dt_bias, d, state, out), (x.stride(0), dt.stride(0)), constants,
        num_warps=4, **options(x.device),
    )  # fmt: skip
    return out
