"""Random cases for the kernels of layers: append, RoPE, also in attention, linear layers, experts and norms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch

from pkv_hf.kernels import linear
from pkv_hf.kernels.checks import attention as check
from pkv_hf.kernels.checks.append import AppendCase, check_append
from pkv_hf.kernels.checks.experts import ExpertsCase, check_experts
from pkv_hf.kernels.checks.fuzz import Outcome
from pkv_hf.kernels.checks.layers import ElementwiseCase, LinearCase, Result, check_elementwise, check_linear, pooled
from pkv_hf.kernels.checks.new_token import TokenCase, check_token
from pkv_hf.kernels.checks.quantized import Linear4Case, check_linear4

LayerCase: TypeAlias = AppendCase | TokenCase | LinearCase | Linear4Case | ElementwiseCase | ExpertsCase
CHECKS: dict[type, Callable[..., dict[str, Result]]] = {
    AppendCase: check_append, TokenCase: check_token, LinearCase: check_linear, Linear4Case: check_linear4,
    ElementwiseCase: check_elementwise, ExpertsCase: check_experts,
}  # fmt: skip
DTYPES: dict[type[LayerCase], tuple[torch.dtype, ...]] = {
    AppendCase: check.DTYPES, TokenCase: check.DTYPES, LinearCase: linear.DTYPES, Linear4Case: linear.DTYPES,
    ElementwiseCase: check.DTYPES, ExpertsCase: check.DTYPES,
}  # fmt: skip


def batches(rng: np.random.Generator, count: int, variations: int, longest: int) -> list[list[LayerCase]]:
    """`count` random cases, `variations` for each configuration that is compiled, kernels and dtypes in turn.

    Rows of pages are of up to `longest` tokens, layers of up to `longest` inputs and outputs.
    """
    kinds = [(kind, dtype) for kind, dtypes in DTYPES.items() for dtype in dtypes]
    made: list[list[LayerCase]] = []
    while count > 0:
        kind, dtype = kinds[len(made) % len(kinds)]
        first = kind.random(rng, dtype)
        made.append([first.vary(rng, longest) for _ in range(min(variations, count))])
        count -= len(made[-1])
    return made


def measure(case: LayerCase, device: torch.device | str, draws: int = 1) -> dict[str, Result]:
    """The result of each output of a case, over `draws` draws of its tensors."""
    drawn = [CHECKS[type(case)](dataclasses.replace(case, seed=case.seed + i), device) for i in range(draws)]
    return {name: pooled([results[name] for results in drawn]) for name in drawn[0]}


def judge(case: LayerCase, device: str) -> Outcome:
    """A case's outputs. One that is beyond the bound is drawn again, often enough that chance has little part.

    What has to be as torch's to the bit is right in every draw, or wrong.
    """
    outcome = Outcome(case, measure(case, device))
    failed = [outcome.results[name] for name in outcome.failed]
    if not failed or not all(result.written and result.torch_error for result in failed):
        return outcome
    other = dataclasses.replace(case, seed=case.seed + check.MAX_DRAWS)
    return Outcome(case, measure(other, device, check.MAX_DRAWS), redrawn=True)
