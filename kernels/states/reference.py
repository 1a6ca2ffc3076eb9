"""Steps of linear attention in torch, for any dtype: what the kernels are judged by. States are updated in place."""

from __future__ import annotations

import torch
from torch.nn import functional

from pkv_hf.kernels.states.delta import EPS


def convolution(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    silu: bool = False,
    gated: bool = False,
) -> torch.Tensor:
    """As `convolution.convolution`."""
    b, c, x = x.chunk(3, dim=1) if gated else (1, 1, x)
    state.copy_(torch.cat([state[..., 1:], (b * x)[..., None]], dim=-1))
    y = (state * weight).sum(-1) + (0 if bias is None else bias)
    return c * (functional.silu(y) if silu else y)


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
) -> torch.Tensor:
    """As `delta.delta_rule`, of a and b that are not paired."""
    rows, heads, dk, dv = state.shape
    q, k, v = x.split([key_heads * dk, key_heads * dk, heads * dv], dim=1)
    q, k = (each.reshape(rows, key_heads, dk).repeat_interleave(heads // key_heads, 1) for each in (q, k))
    q, k = (each * (each.square().sum(-1, keepdim=True) + EPS).rsqrt() for each in (q, k))
    decay = (-a_log.exp() * functional.softplus(a + dt_bias)).exp()
    state.mul_(decay[..., None, None])
    change = (v.reshape(rows, heads, dv) - torch.einsum("bhkv,bhk->bhv", state, k)) * beta * b.sigmoid()[..., None]
    state.add_(torch.einsum("bhk,bhv->bhkv", k, change))
    return torch.einsum("bhkv,bhk->bhv", state, q * dk**-0.5).reshape(rows, -1)


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
    """As `ssm.state_space`."""
    rows, heads, p, n = state.shape
    x, b, c = x.split([heads * p, groups * n, groups * n], dim=1)
    x = x.reshape(rows, heads, p)
    b, c = (each.reshape(rows, groups, n).repeat_interleave(heads // groups, 1) for each in (b, c))
    dt = functional.softplus(dt + dt_bias)
    state.mul_((-a_log.exp() * dt).exp()[..., None, None])
    state.add_(torch.einsum("bh,bhp,bhn->bhpn", dt, x, b))
    return (torch.einsum("bhpn,bhn->bhp", state, c) + d[:, None] * x).reshape(rows, -1)


def gated_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float = 0.0,
    *,
    size: int,
    gate_first: bool = False,
) -> torch.Tensor:
    """As `norm.gated_norm`."""
    gate = functional.silu(gate.reshape(x.shape))
    x = x * gate if gate_first else x
    if weight is not None:
        groups = x.view(len(x), -1, size)
        groups = groups * (groups.square().mean(-1, keepdim=True) + eps).rsqrt()
        x = (groups * weight.view(-1, size)).view(x.shape)
    return x if gate_first else x * gate
