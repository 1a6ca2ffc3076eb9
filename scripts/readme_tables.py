"""Writes the tables of README.md, between `<!-- generated: NAME -->` and `<!-- end -->` marks, from committed results.

The newest record of a case counts. `--check` changes nothing and fails where README.md is stale.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKS = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def newest(name: str, case: Iterable[str]) -> list[dict[str, Any]]:
    """The newest record of every case, in the order in which the cases first came."""
    records: dict[str, dict[str, Any]] = {}
    for line in (RESULTS / name).read_text().splitlines():
        record = json.loads(line)
        records[json.dumps([record[key] for key in case])] = record
    return list(records.values())


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def measured_on(records: list[dict[str, Any]]) -> str:
    places = {(r["gpu"], r["torch"], r["transformers"], r["commit"]) for r in records}
    return "".join(
        f"\nMeasured on: GPU {gpu}; torch {torch}, transformers {transformers}, commit {commit}.\n"
        for gpu, torch, transformers, commit in sorted(places)
    )


def generate_table() -> str:
    records = newest("generate.jsonl", ("model", "dtype", "lengths", "engine", "gpu"))
    rows = []
    for r in records:
        alike = [b for b in records if all(b[key] == r[key] for key in ("model", "dtype", "lengths", "gpu"))]
        base = next(b for b in alike if b["engine"] == "dynamic")
        rows.append([
            f"{r['model']} {r['dtype']}, {r['batch']} x {max(r['lengths']):,}",
            r["engine"] + (f" ({r['route']})" if r["route"] else ""),
            f"{r['step_ms_p50']:.1f} ({r['step_ms_p20']:.1f} to {r['step_ms_p80']:.1f})",
            f"{base['step_ms_p50'] / r['step_ms_p50']:.2f}x",
            f"{r['percent_of_floor']:.0f} %",
            f"{r['first_token_ms'] / 1e3:.2f} s",
            f"{r['kv_bytes'] / 2**20:,.1f} MiB",
            "yes" if r["tokens_match"] else "no",
        ])  # fmt: skip
    header = ["case", "engine", "step ms, p50 (p20 to p80)", "speed", "of the memory floor", "first token", "KV cache",
              "same tokens"]  # fmt: skip
    return markdown(header, rows) + measured_on(records)


def kernels_table() -> str:
    if not (RESULTS / "kernels.jsonl").exists():
        return "No record of a GPU run is committed yet; the tests run such cases in Triton's interpreter.\n"
    records = newest("kernels.jsonl", ("route", "dtype", "gpu"))
    rows = [
        [
            r["route"],
            r["dtype"],
            f"{r['cases']}",
            f"{r['longest']:,}",
            f"{r['error_over_sdpa_p50']:.2f}",
            f"{r['error_over_sdpa_max']:.2f}",
        ]
        for r in records
    ]
    header = ["route", "dtype", "random cases", "longest row", "error / SDPA's, p50", "worst"]
    return markdown(header, rows) + measured_on(records)


def demo_output() -> str:
    return f"```\n{(RESULTS / 'demo.txt').read_text()}```\n"


TABLES: dict[str, Callable[[], str]] = {"generate": generate_table, "kernels": kernels_table, "demo": demo_output}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = MARKS.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", before)
    if arguments.check:
        if after != before:
            print("README.md is stale: run make readme")
        return int(after != before)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
