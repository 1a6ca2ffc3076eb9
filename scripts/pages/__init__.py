"""The tables of the generated pages, a page a file: PAGE is where it lies, TABLES has a function for each mark."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pkv_hf.bench.results import published
from pkv_hf.bench.results.published import Record

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
GPU = "NVIDIA H100 80GB HBM3"
"""What README.md and the pictures are of."""


def read(name: str, **defaults: Any) -> list[Record]:
    return published.read(RESULTS / name, **defaults)


def newest(name: str, case: Iterable[str]) -> list[Record]:
    return published.newest(RESULTS / name, case)
