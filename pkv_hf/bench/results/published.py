"""Committed records as tables of markdown pages, between `<!-- generated: NAME -->` and `<!-- end -->` marks."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pkv_hf.bench.results.records import read_records
from pkv_hf.errors import status

Record = dict[str, Any]

MARKS = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
NO_GPU_RUN = "No record of a GPU run is committed yet.\n"


def newest(path: Path, case: Iterable[str], **defaults: Any) -> list[Record]:
    """The newest record of every case, in the order in which the cases first came, none if there is no such file.

    Fields of later records may miss; `defaults` are what they count as.
    """
    fields = list(case)
    records: dict[str, Record] = {}
    for read in read_records(path, str(path)) if path.exists() else ():
        record = {**defaults, **read}
        records[json.dumps([record.get(key) for key in fields])] = record
    return list(records.values())


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def measured_on(records: Iterable[Record]) -> str:
    places: dict[tuple[str, str, str], set[str]] = {}
    for r in records:
        places.setdefault((r["gpu"], r["torch"], r["transformers"]), set()).add(r["commit"])
    return "".join(
        f"\nMeasured on: {gpu}; torch {torch}, transformers {transformers}, "
        f"commit{'s' * (len(commits) > 1)} {', '.join(sorted(commits))}.\n"
        for (gpu, torch, transformers), commits in sorted(places.items())
    )


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
        after = MARKS.sub(lambda found: f"{found[1]}{tables[found[2]]()}{found[3]}", before)
        if after != before:
            stale.append(page.name)
            if not check:
                page.write_text(after)
    if check and stale:
        print(f"{', '.join(stale)} stale: run make readme")
        return 1
    return 0
