"""Random cases by the thousand, in several processes: batches of cases that share what they compile."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from pkv_hf.kernels.check import MAX_DRAWS, ROUTES, Case, Result, measure_routes, random_case, vary

BOUND = 2.0
"""A route's error over that of torch's attention in the same dtype, at most."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    case: Case
    results: dict[str, Result]
    redrawn: bool = False
    """The case was beyond the bound at first, and `results` are those of new random numbers."""

    @property
    def failed(self) -> list[str]:
        """Routes that left an output unwritten or not finite, or erred more than the bound."""
        return [route for route, result in self.results.items() if not (result.written and result.ratio <= BOUND)]


def batches(
    rng: np.random.Generator, count: int, variations: int, longest: int, dtypes: Sequence[torch.dtype]
) -> list[list[Case]]:
    """`count` random cases, `variations` for each configuration that is compiled, the dtypes in turn.

    A case's rows are of up to `longest` tokens; short ones are as likely as long ones, by their logarithm.
    """

    def bound() -> int:
        return int(2 ** rng.uniform(0, np.log2(longest)))

    made: list[list[Case]] = []
    while count > 0:
        first = random_case(rng, bound(), dtypes[len(made) % len(dtypes)])
        made.append([first, *(vary(first, rng, bound()) for _ in range(min(variations, count) - 1))])
        count -= len(made[-1])
    return made


def judge(case: Case, device: str) -> Outcome:
    """All routes on a case. One that is beyond the bound is drawn again, often enough that chance has little part."""
    outcome = Outcome(case, measure_routes(case, ROUTES, device))
    if not outcome.failed or not all(result.written for result in outcome.results.values()):
        return outcome
    other = dataclasses.replace(case, seed=case.seed + MAX_DRAWS)
    return Outcome(case, measure_routes(other, ROUTES, device, draws=MAX_DRAWS), redrawn=True)


def _judge_all(task: tuple[list[Case], str]) -> list[Outcome]:
    cases, device = task
    return [judge(case, device) for case in cases]


def fuzz(
    made: list[list[Case]], device: str, jobs: int, start: Callable[[], None] | None = None
) -> Iterator[list[Outcome]]:
    """Outcomes of batches of cases, in `jobs` processes that each call `start` first; in this one for one job."""
    tasks = [(cases, device) for cases in made]
    with contextlib.ExitStack() as stack:
        if jobs == 1:
            yield from map(_judge_all, tasks)
        else:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(jobs, start))
            yield from pool.imap_unordered(_judge_all, tasks)
