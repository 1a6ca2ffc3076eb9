"""Experts of a mixture: their weights as modules stack them, and in torch what the kernels are judged by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from pkv_hf.kernels.reference import activation

LAYOUTS = ("halves", "interleaved", "plain")
"""How the outputs of a first product lie: all gates before all ups, each gate before its up, or ups without gates."""


class Form(NamedTuple):
    """What experts do with their weights."""

    transposed: bool
    """Whether a weight is `[inputs, outputs]`."""
    layout: str
    """One of LAYOUTS."""
    activation: str
    """One of `kernels.reference.ACTIVATIONS`."""
    limit: float = 0.0
    """What gates are at most, and ups at most away from 0; 0 for no limit. Only of gated layouts, as what follows."""
    alpha: float = 1.0
    """Of silu(gate) = gate * sigmoid(alpha * gate)."""
    shift: float = 0.0
    """What is added to ups."""


class Stacked(NamedTuple):
    """The weights of all experts: each is gate(x U + bias) D + bias."""

    up: torch.Tensor
    """`[experts, outputs, hidden]`, of twice `width` outputs but in the plain layout; `[experts, hidden, outputs]`
    where the form is transposed."""
    down: torch.Tensor
    """`[experts, hidden, width]`, or `[experts, width, hidden]`."""
    up_bias: torch.Tensor | None
    """`[experts, outputs]`."""
    down_bias: torch.Tensor | None
    """`[experts, hidden]`."""
    form: Form

    @property
    def hidden(self) -> int:
        return self.down.shape[2 if self.form.transposed else 1]

    @property
    def width(self) -> int:
        return self.down.shape[1 if self.form.transposed else 2]

    @property
    def outputs(self) -> int:
        """Of a first product."""
        return self.width * (1 if self.form.layout == "plain" else 2)

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self[:4]


def gate(y: torch.Tensor, of: Form) -> torch.Tensor:
    """What the second product takes of the first's outputs `[rows, outputs]`."""
    if of.layout == "plain":
        return activation(y, of.activation)
    first, up = y.chunk(2, dim=-1) if of.layout == "halves" else (y[..., ::2], y[..., 1::2])
    if of.limit:
        first, up = first.clamp(max=of.limit), up.clamp(-of.limit, of.limit)
    acted = activation(first, of.activation) if of.alpha == 1.0 else first * torch.sigmoid(of.alpha * first)
    return acted * (up + of.shift if of.shift else up)


def experts(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, of: Stacked) -> torch.Tensor:
    """The sum of what the experts make of each row that chose them, times the choice's weight.

    x `[rows, hidden]`; index and weights `[rows, choices]`. Choices of no expert count as nothing. Computes in x's
    dtype, whatever the weights are stored in. Returns `[rows, hidden]`.
    """

    def of_expert(stack: torch.Tensor | None, expert: int, turned: bool = False) -> torch.Tensor | None:
        return None if stack is None else (stack[expert].T if turned else stack[expert]).to(x.dtype)

    out = torch.zeros_like(x)
    for expert in sorted({each for each in index.flatten().tolist() if 0 <= each < len(of.up)}):
        rows, places = torch.where(index == expert)
        up, down = (of_expert(stack, expert, of.form.transposed) for stack in (of.up, of.down))
        y = functional.linear(x[rows], up, of_expert(of.up_bias, expert))
        y = functional.linear(gate(y, of.form), down, of_expert(of.down_bias, expert))
        out.index_add_(0, rows, (y * weights[rows, places, None].to(x.dtype)))
    return out
