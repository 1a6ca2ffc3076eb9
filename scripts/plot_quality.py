"""Draws what pages change in perplexity, in percent, with its standard error and bound, from perplexity.py's records.

`perplexity.png`: chunk mode, which scores enough tokens to tell.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pages import GPU
from pages.quality import PERPLEXITY_CASE

from pkv_hf.arguments import file, needs, output_folder
from pkv_hf.bench.results import charts
from pkv_hf.bench.results.published import values
from pkv_hf.bench.results.records import read_records
from pkv_hf.errors import UsageError, status

FIELDS = ("gpu", "model", "dtype", "text", "mode", "context", "windows", "difference_percent")
PAGES = (None, "int8", "fp8")
"""What pages hold, in the order of the lines; None is the model's dtype."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=file, default=Path("benchmarks/results/perplexity.jsonl"))
    parser.add_argument("--gpu", default=GPU, help="whose records to draw, as they name it (default: %(default)s)")
    parser.add_argument("--out", type=output_folder, default=Path("benchmarks/plots"), help="folder of the PNG file")
    arguments = parser.parse_args()
    return status("plot_quality", lambda: plot(arguments))


def plot(arguments: argparse.Namespace) -> None:
    needs("matplotlib")
    records = read_records(arguments.results, f"--results {arguments.results}", FIELDS)
    newest = {values(r, PERPLEXITY_CASE): r for r in records}.values()
    chunks = [r for r in charts.of_gpu(newest, arguments.gpu, arguments.results) if r["mode"] == "chunk"]
    if not chunks:
        raise UsageError(f"--results {arguments.results} has nothing of chunk mode: run perplexity.py with it")
    path = arguments.out / "perplexity.png"
    ordered = sorted(chunks, key=lambda r: (PAGES.index(r.get("kv_dtype")), r["context"]))
    charts.perplexity_chart(ordered, f"{ordered[0]['model']}, {ordered[0]['text']}, {arguments.gpu}", path)
    print(path)
    print(json.dumps({"plots": [str(path)]}))


if __name__ == "__main__":
    raise SystemExit(main())
