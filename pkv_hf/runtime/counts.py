"""How often a patched model's decoder ran, and by what: numbers that `report` gives."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple


@dataclass(frozen=True)
class Calls:
    """Forwards of a patched model's decoder that returned, by what served them."""

    pages: int
    """On a `PagedCache`; those that a queued step ran too far are counted too."""
    transformers: int
    """By transformers' own path, with a cache or without, in training too."""
    masked: int
    """Prompts of those on pages whose attention was transformers' own, under masks that the model made: of images, say,
    whose tokens see each other."""


@dataclass(frozen=True)
class Steps:
    """Decode steps on pages (of at most 8 tokens a row, after the prompt), by how they ran."""

    captured: int
    """By replaying a CUDA graph."""
    static: int
    """On buffers that stay where they are, launched one by one: on a CPU, and the first of a shape on a GPU."""
    eager: int
    """Through transformers' layers, attention on pages."""


How = Literal["captured", "static", "eager"]


class LastStep(NamedTuple):
    """How the last decode step on pages ran."""

    how: How
    why: str
    """Why not better; empty for a captured one."""


class Counts:
    """Counts of one patched model, which several threads may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: Counter[str] = Counter()
        self.last_step: LastStep | None = None

    def add(self, what: Literal["pages", "transformers", "masked"] | How) -> None:
        with self._lock:
            self._numbers[what] += 1

    def add_step(self, how: How, why: str) -> None:
        """Counts a decode step and notes why it ran no better."""
        self.add(how)
        self.last_step = LastStep(how, why)

    @property
    def calls(self) -> Calls:
        return Calls(*(self._numbers[field.name] for field in fields(Calls)))

    @property
    def steps(self) -> Steps:
        return Steps(*(self._numbers[field.name] for field in fields(Steps)))
