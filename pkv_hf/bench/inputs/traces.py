"""Request traces for decode benchmarks: PersistentKV's synthetic families, and files of real traffic.

A trace is a list of requests; `decode_steps` plays it through a batch of limited size, as continuous batching does. The
families are the ones of PersistentKV (arXiv 2606.26666), drawn from a seed: one to calibrate on, others to report.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pkv_hf.errors import TraceError

CALIBRATION_SEED = 20260622
HELD_OUT_SEEDS = (20260623, 20260624, 20260625, 20260626, 20260627)

COLUMNS = {
    "prompt": ("prompt_len", "prompt"),
    "decode": ("decode_len", "decode"),
    "arrival": ("arrival_step", "arrival_s", "arrival"),
}
"""The names that a file may have for a field, the first that is there counts; `arrival` may be missing."""


@dataclass(frozen=True)
class Request:
    """A prompt of so many tokens, the tokens to decode after it, and when it comes (in the trace's own unit)."""

    prompt: int
    decode: int
    arrival: float = 0.0


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high + 1))


def _bucketed(rng: np.random.Generator, index: int) -> Request:
    return Request((8192, 16_384, 32_768, 65_536)[index % 4], _between(rng, 32, 96))


def _homogeneous(rng: np.random.Generator, index: int) -> Request:
    return Request(32_768, _between(rng, 32, 96))


def _bimodal(rng: np.random.Generator, index: int) -> Request:
    if index % 4 == 0:
        return Request(_between(rng, 24_576, 65_536), _between(rng, 32, 128))
    return Request(_between(rng, 2048, 12_288), _between(rng, 8, 64))


def _uniform(rng: np.random.Generator, index: int) -> Request:
    return Request(_between(rng, 4096, 32_768), _between(rng, 16, 96))


def _zipf(rng: np.random.Generator, index: int) -> Request:
    rank = _between(rng, 1, 32)
    return Request(2048 + int(65_536 / rank**0.5) + _between(rng, -512, 512), _between(rng, 8, 128))


FAMILIES: dict[str, Callable[[np.random.Generator, int], Request]] = {
    "bucketed": _bucketed,
    "homogeneous": _homogeneous,
    "bimodal": _bimodal,
    "uniform": _uniform,
    "zipf": _zipf,
}


def synthetic(family: str, count: int, seed: int) -> list[Request]:
    """`count` requests of a family in `FAMILIES`, all there from the start.

    Raises ValueError for an unknown family or a count below 1.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} is not one of {list(FAMILIES)}")
    if count < 1:
        raise ValueError(f"count={count} requests: want at least 1")
    rng = np.random.default_rng(seed)
    return [FAMILIES[family](rng, index) for index in range(count)]


def load(path: Path) -> list[Request]:
    """The requests of a CSV file with a header, or of a JSON list of objects, in order of arrival.

    A request has `prompt_len` or `prompt`, `decode_len` or `decode`, and maybe one of `arrival_step`, `arrival_s` and
    `arrival`.

    Raises TraceError (a ValueError) that names the file and the line (of JSON: the entry) of a bad request.
    """
    try:
        text = path.read_text()
        if path.suffix == ".json":
            entries = json.loads(text)
            if not isinstance(entries, list):
                raise TraceError(f"{path} holds a {type(entries).__name__}, not a list of requests")
            numbered = [(f"entry {index}", entry) for index, entry in enumerate(entries)]
        else:
            reader = csv.DictReader(text.splitlines())
            numbered = [(f"line {reader.line_num}", entry) for entry in reader]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TraceError(f"{path} cannot be read as a trace: {error}") from error
    if not numbered:
        raise TraceError(f"{path} holds no requests")
    return sorted((_request(f"{path}, {where}", entry) for where, entry in numbered), key=lambda r: r.arrival)


def _request(where: str, entry: Any) -> Request:
    if not isinstance(entry, dict):
        raise TraceError(f"{where}: {entry!r} is not a request with prompt_len and decode_len")
    values: dict[str, Any] = {}
    for field, names in COLUMNS.items():
        name = next((name for name in names if entry.get(name) not in (None, "")), None)
        if name is None:
            if field == "arrival":
                continue
            raise TraceError(f"{where}: no {' or '.join(names)}")
        try:
            value = float(entry[name])
        except (TypeError, ValueError):
            value = float("nan")
        whole = field != "arrival"
        if not 0 <= value < float("inf") or (whole and (value < 1 or value != int(value))):
            raise TraceError(
                f"{where}: {name}={entry[name]!r} is not a {'positive whole' if whole else 'finite'} number"
            )
        values[field] = int(value) if whole else value
    return Request(**values)


def decode_steps(requests: Sequence[Request], max_active: int) -> Iterator[list[int]]:
    """Tokens that each active row attends to, step by step, until every request is done.

    Requests join in order as soon as fewer than `max_active` are active: prompts are taken as prefilled elsewhere, and
    arrivals as passed. Raises ValueError for max_active below 1.
    """
    if max_active < 1:
        raise ValueError(f"max_active={max_active}: want at least 1")
    waiting = iter(requests)
    active: list[tuple[int, int]] = []  # tokens now, tokens at the end
    while True:
        while len(active) < max_active and (request := next(waiting, None)) is not None:
            active.append((request.prompt, request.prompt + request.decode))
        if not active:
            return
        active = [(now + 1, end) for now, end in active]
        yield [now for now, _ in active]
        active = [(now, end) for now, end in active if now < end]


def block_tables(
    lengths: Sequence[int], page_size: int, holes: float, rng: np.random.Generator | None
) -> tuple[np.ndarray, int]:
    """Pages of rows of these lengths, scattered by a random permutation, and the number of pages of their pool.

    Without `rng` they are consecutive, as in a cache that `generate()` has just made.
    A fraction `holes` of the pool, from 0 to below 1, is pages that no row has. Returns int32 `[rows, max_pages]`, page
    0 (the null page) beyond a row's end.
    """
    if not 0 <= holes < 1:
        raise ValueError(f"holes={holes} is not a fraction from 0 to below 1")
    counts = [-(-length // page_size) for length in lengths]
    used = sum(counts)
    total = -(-used // (1 - holes)) if holes else used
    chosen = (np.arange(used) if rng is None else rng.permutation(int(total))[:used]) + 1
    tables = np.zeros((len(counts), max(counts)), dtype=np.int32)
    taken = 0
    for row, count in enumerate(counts):
        tables[row, :count] = chosen[taken : taken + count]
        taken += count
    return tables, int(total) + 1
