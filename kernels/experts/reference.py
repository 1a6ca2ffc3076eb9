"""Experts of a mixture and their routers: what they do, and in torch what the kernels are judged by."""

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


SCORES = ("softmax", "sigmoid")
"""What weighs experts: the softmax of all logits, or each one's sigmoid. The softmax of the chosen logits alone is the
first, normalised."""

LEAST_SUM = 1e-20
"""What sums that weights are divided by have more, as those of DeepSeek-V3 have."""


class Routing(NamedTuple):
    """How rows choose experts by their logits."""

    choices: int
    scores: str
    """One of SCORES."""
    corrected: bool
    """Whether a bias is added to scores for the choice alone (DeepSeek-V3)."""
    normalised: bool
    """Whether a row's weights are divided by their sum."""
    scale: float = 1.0
    """What weights are multiplied by."""
    groups: int = 1
    """Of experts next to each other: a row chooses in those `kept` whose two largest scores have the largest sums."""
    kept: int = 1


def route(
    logits: torch.Tensor, of: Routing, correction: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and index `[rows, choices]` by logits `[rows, experts]`; the correction is `[experts]`.

    Of equal scores the first is taken; computes in the logits' dtype.
    """
    scores = logits.softmax(-1) if of.scores == "softmax" else logits.sigmoid()
    ranked = scores if correction is None else scores + correction
    if of.groups > 1:
        in_groups = ranked.unflatten(-1, (of.groups, -1))
        kept = _first(in_groups.topk(2)[0].sum(-1), of.kept)
        left_out = torch.ones_like(in_groups[..., 0], dtype=torch.bool).scatter_(-1, kept, False)
        ranked = in_groups.masked_fill(left_out[..., None], float("-inf")).flatten(-2)
    index = _first(ranked, of.choices)
    weights = scores.gather(-1, index)
    if of.normalised:
        weights = weights / (weights.sum(-1, keepdim=True) + LEAST_SUM)
    return weights * of.scale, index


def _first(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The places of the largest scores, of equal ones the first."""
    return scores.sort(dim=-1, descending=True, stable=True)[1][..., :count]
