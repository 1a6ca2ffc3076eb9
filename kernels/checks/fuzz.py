"""Random cases by the thousand, in several processes: batches of cases that share what they compile."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from pkv_hf.kernels.checks.attention import MAX_DRAWS, ROUTES, Case, log_uniform, measure_routes, random_case, vary

BOUND = 2.0
"""A route's error over that of torch's attention in the same dtype, at most."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    case: Any
    results: dict[str, Any]
    """By route or output; each says whether it was `written`, and its error's `ratio` to torch's."""
    redrawn: bool = False
    """The case was beyond the bound at first, and `results` are those of new random numbers."""

    @property
    def failed(self) -> list[str]:
        """Routes or outputs with elements unwritten or not finite, or with a larger error than the bound."""
        return [name for name, result in self.results.items() if not (result.written and result.ratio <= BOUND)]


Judge = Callable[[Any, str], Outcome]


def batches(
    rng: np.random.Generator, count: int, variations: int, longest: int, dtypes: Sequence[torch.dtype]
) -> list[list[Case]]:
    """`count` random cases, `variations` for each configuration that is compiled, the dtypes in turn.

    A case's rows are of up to `longest` tokens, by `log_uniform`.
    """
    made: list[list[Case]] = []
    while count > 0:
        first = random_case(rng, log_uniform(rng, longest), dtypes[len(made) % len(dtypes)])
        more = range(min(variations, count) - 1)
        made.append([first, *(vary(first, rng, log_uniform(rng, longest)) for _ in more)])
        count -= len(made[-1])
    return made


def judge(case: Case, device: str) -> Outcome:
    """All routes on a case. One that is beyond the bound is drawn again, often enough that chance has little part."""
    outcome = Outcome(case, measure_routes(case, ROUTES, device))
    if not outcome.failed or not all(result.written for result in outcome.results.values()):
        return outcome
    other = dataclasses.replace(case, seed=case.seed + MAX_DRAWS)
    return Outcome(case, measure_routes(other, ROUTES, device, draws=MAX_DRAWS), redrawn=True)


def _judge_all(task: tuple[Judge, Sequence[Any], str]) -> list[Outcome]:
    of_case, cases, device = task
    return [of_case(case, device) for case in cases]


def fuzz(
    made: Sequence[Sequence[Any]],
    device: str,
    jobs: int,
    start: Callable[[], None] | None = None,
    of_case: Judge = judge,
) -> Iterator[list[Outcome]]:
    """Outcomes of batches of cases, in `jobs` processes that each call `start` first; in this one for one job."""
    tasks = [(of_case, cases, device) for cases in made]
    with contextlib.ExitStack() as stack:
        if jobs == 1:
            yield from map(_judge_all, tasks)
        else:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(jobs, start))
            yield from pool.imap_unordered(_judge_all, tasks)
