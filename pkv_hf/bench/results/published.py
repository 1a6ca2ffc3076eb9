"""Committed records as tables of markdown pages, between `<!-- generated: NAME -->` and `<!-- end -->` marks.

A table is of one GPU, and what it compares is of one run: `of_every_gpu` and `of_one_run`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pkv_hf.bench.results.records import read_records
from pkv_hf.errors import UsageError, status

Record = dict[str, Any]

MARKS = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
NO_GPU_RUN = "No record of a GPU run is committed yet.\n"
RUN = ("gpu", "commit", "torch", "transformers")
"""What tells runs apart."""


def read(path: Path, **defaults: Any) -> list[Record]:
    """The records of a file, none if there is no such file. `defaults` stand in for fields that a record lacks."""
    return [{**defaults, **record} for record in (read_records(path, str(path)) if path.exists() else ())]


def newest(path: Path, case: Iterable[str]) -> list[Record]:
    """The newest record of every case, in the order in which the cases first came: for records that compare nothing."""
    fields = list(case)
    return list({values(record, fields): record for record in read(path)}.values())


def of_one_run(
    records: Iterable[Record],
    case: Iterable[str],
    *needs: Sequence[Any],
    engine: str = "engine",
    parts: Sequence[str] = (),
) -> list[list[Record]]:
    """What may be compared: of each case and GPU the records of one run, the newest of every engine and its `parts`.

    Each of `needs` names engines that a run has to have, the most wanted first: the newest run with all of the first
    counts; where there is none, the newest with all of the second. A case without either is left out. A run may measure
    a case several times; the last time that has all that is needed counts, or else all times together. `engine` names
    the field that tells apart what is compared.
    """
    of_case, of_engine = ("gpu", *case), (engine, *parts)
    cases: dict[str, dict[str, list[dict[str, Record]]]] = {}
    for record in records:
        runs = cases.setdefault(values(record, of_case), {})
        times = runs.pop(values(record, RUN), [])
        runs[values(record, RUN)] = times  # at the end: the newest
        if not times or values(record, of_engine) in times[-1]:
            times.append({})
        times[-1][values(record, of_engine)] = record
    chosen = (first_with(runs.values(), needs, engine) for runs in cases.values())
    return [records for records in chosen if records]


def first_with(runs: Iterable[list[dict[str, Record]]], needs: Iterable[Sequence[Any]], engine: str) -> list[Record]:
    """The records of the newest time that has what is needed, of runs that come oldest first; none without one."""
    candidates = []
    for times in reversed(list(runs)):
        together = {name: record for time in times for name, record in time.items()}
        candidates += [list(time.values()) for time in (*reversed(times), together)]
    for wanted in needs:
        for records in candidates:
            if set(wanted) <= {record[engine] for record in records}:
                return records
    return []


def values(record: Record, fields: Iterable[str]) -> str:
    """The values of fields, lists too, as a key."""
    return json.dumps([record.get(field) for field in fields])


def of_every_gpu(records: Iterable[Record], table_of: Callable[[list[Record]], str]) -> str:
    """A table for each GPU, of its records alone, in the order of the GPUs' first records."""
    gpus: dict[str, list[Record]] = {}
    for record in records:
        gpus.setdefault(record["gpu"], []).append(record)
    return "\n".join(filter(None, map(table_of, gpus.values()))) or NO_GPU_RUN


def is_cpu(record: Record) -> bool:
    return record["gpu"].startswith("none")


def table(columns: Mapping[str, Callable[[Any], str]], rows: Sequence[Any], used: Iterable[Record]) -> str:
    """A cell for each row and column, and below what the records `used` were measured on; nothing without rows.

    A column in which every row has "-" is left out.
    """
    if not rows:
        return ""
    cells = {header: [cell(row) for row in rows] for header, cell in columns.items()}
    shown = {header: column for header, column in cells.items() if set(column) != {"-"}}
    return markdown(list(shown), list(zip(*shown.values()))) + measured_on(used)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def measured_on(records: Iterable[Record]) -> str:
    """A paragraph for each GPU with the versions and commits of its runs."""
    places: dict[str, dict[tuple[str, str], set[str]]] = {}
    for r in records:
        places.setdefault(r["gpu"], {}).setdefault((r["torch"], r["transformers"]), set()).add(r["commit"])
    return "".join(
        f"\nMeasured on: {gpu}; {'; '.join(versions_and_commits(*run) for run in sorted(runs.items()))}.\n"
        for gpu, runs in sorted(places.items())
    )


def versions_and_commits(versions: tuple[str, str], commits: set[str]) -> str:
    torch, transformers = versions
    return f"torch {torch}, transformers {transformers}, commit{'s' * (len(commits) > 1)} {', '.join(sorted(commits))}"


def main(doc: str | None, tables: Mapping[str, Callable[[], str]], pages: Sequence[Path]) -> int:
    """The command of a script that writes tables into pages; `--check` changes nothing and fails where one is stale."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    return status(parser.prog, lambda: write(tables, pages, check))


def write(tables: Mapping[str, Callable[[], str]], pages: Sequence[Path], check: bool) -> int:
    """Writes tables into pages, or checks them. Returns 1 where one is stale."""
    stale = []
    for page in pages:
        before = page.read_text()
        unknown = [name for _, name, _ in MARKS.findall(before) if name not in tables]
        if unknown:
            raise UsageError(f"{page.name} asks for {', '.join(unknown)}, which no script makes: take the mark out")
        after = MARKS.sub(lambda found: f"{found[1]}{tables[found[2]]()}{found[3]}", before)
        if after != before:
            stale.append(page.name)
            if not check:
                page.write_text(after)
    if check and stale:
        print(f"{', '.join(stale)} stale: run make readme")
        return 1
    return 0
