"""Experts that are given all rows for each of them, zero where a row did not choose the expert (Llama 4).

Without biases an expert makes nothing of zeros. So each of the rows given is one that chose an expert or none: what the
kernels take, with weights of 1.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from pkv_hf.kernels.experts.reference import Stacked


def takes_rows_alone(module: Any) -> bool:
    """Whether a module's forward takes hidden states and nothing else."""
    return len(inspect.signature(type(module).forward).parameters) == 2  # the module is the first


def chosen_rows(x: torch.Tensor, of: Stacked) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, index and weights for the kernels of x `[experts * rows, hidden]` as such a module takes it."""
    count = len(of.down)
    expert = torch.arange(count, device=x.device).repeat_interleave(len(x) // count)
    index = torch.where((x != 0).any(-1), expert, -1)[:, None]
    return x, index, torch.ones_like(index, dtype=x.dtype)


class AsChosen:
    """Such a module, called with x, index and weights as others are: each choice in a run of its own."""

    def __init__(self, module: Any, count: int) -> None:
        vars(self).update(vars(module))
        self.called, self.count = module, count

    def __call__(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        row, total = torch.arange(len(x), device=x.device), torch.zeros_like(x)
        for expert, weight in zip(index.T, weights.T):
            given = x.new_zeros(self.count, *x.shape)
            given[expert, row] = x
            made = self.called(given.view(-1, x.shape[1])).view(given.shape)
            total += made[expert, row] * weight[:, None]
        return total
