"""Trials in forked processes, each with a time limit: what one breaks, hangs in or leaves behind touches no other."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from pkv_hf.bench.model_types import trial
from pkv_hf.bench.model_types.cases import Case

LIMIT_S = 120.0
"""The slowest takes some seconds on an idle core; by Triton's interpreter a minute."""

Trial = Callable[[Case, str, trial.Say], dict[str, Any]]


@dataclass
class Running:
    case: Case
    process: Any
    deadline: float
    stage: str = next(iter(trial.STAGES))
    result: dict[str, Any] | None = None


def run_all(
    cases: Iterable[Case], route: str, jobs: int, limit_s: float = LIMIT_S, run: Trial = trial.run
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Each case with what a record says of it, as they end, so many at a time. Processes end with the iterator."""
    waiting, running = deque(cases), dict[Connection, Running]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                connection, began = _start(waiting.popleft(), route, limit_s, run)
                running[connection] = began
            soonest = min(each.deadline for each in running.values())
            ready = wait(list(running), max(soonest - time.monotonic(), 0))
            for connection in [each for each in running if each in ready]:
                if _has_ended(connection, running[connection]):
                    yield _result(connection, running.pop(connection))
            for connection in [each for each in running if running[each].deadline <= time.monotonic()]:
                late = running.pop(connection)
                late.process.kill()
                late.result = trial.failed(late.stage, f"it takes longer than {limit_s:g} s")
                yield _result(connection, late)
    finally:
        for each in running.values():
            each.process.kill()


def _start(case: Case, route: str, limit_s: float, run: Trial) -> tuple[Connection, Running]:
    context = multiprocessing.get_context("fork")  # what is imported is there at once
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, case, route, run), daemon=True)
    process.start()
    theirs.close()  # or the end of the process would not show
    return ours, Running(case, process, time.monotonic() + limit_s)


def _child(connection: Connection, case: Case, route: str, run: Trial) -> None:
    torch.set_num_threads(1)  # a fork has none of its parent's threads, and would wait for them
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    connection.send(run(case, route, connection.send))


def _has_ended(connection: Connection, running: Running) -> bool:
    """Takes the next message of a process. Returns whether it has said all."""
    try:
        said = connection.recv()
    except EOFError:
        return True
    if isinstance(said, str):
        running.stage = said
    else:
        running.result = said
    return False


def _result(connection: Connection, running: Running) -> tuple[Case, dict[str, Any]]:
    connection.close()
    running.process.join()
    if running.result is None:
        running.result = trial.failed(running.stage, f"its process ended with {running.process.exitcode}")
    return running.case, running.result
