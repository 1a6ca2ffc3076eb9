"""Draws decode attention: bandwidth over context by route, and tokens a second over traces beside FlashInfer's.

Reads the records of benchmark_attention.py and benchmark_traces.py, the newest of a case. One PNG a GPU for each.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pkv_hf.arguments import folder, needs, output_folder
from pkv_hf.bench.results.charts import pyplot, write
from pkv_hf.bench.results.records import read_records
from pkv_hf.errors import UsageError, status

Record = dict[str, Any]
BASELINE = "flashinfer"
ATTENTION_CASE = (
    "rows",
    "length",
    "query_heads",
    "group",
    "head_dim",
    "page_size",
    "holes",
    "dtype",
    "kv_dtype",
    "splits",
    "engine",
)
TRACE_CASE = (
    "trace",
    "seed",
    "max_active",
    "group",
    "head_dim",
    "page_size",
    "holes",
    "dtype",
    "layers",
    "graph",
    "engine",
)


def newest(path: Path, case: tuple[str, ...], drawn: tuple[str, ...]) -> dict[str, list[Record]]:
    """The newest record of every case, by GPU; each has the fields that are `drawn`."""
    found: dict[tuple, Record] = {}
    fields = ("gpu", *case, *drawn)
    for r in read_records(path, f"--results: {path}", fields) if path.exists() else []:
        key = (r["gpu"], *(r[name] for name in case))
        found[key] = r
    by_gpu = defaultdict(list)
    for (gpu, *_), record in found.items():
        by_gpu[gpu].append(record)
    return by_gpu


def draw_bandwidth(records: list[Record], gpu: str, path: Path) -> bool:
    """Percent of the read bandwidth over context, a panel for each number of rows. False where nothing was timed."""
    plain = [
        r
        for r in records
        if r["gpu_us"] and r["group"] == 4 and r["head_dim"] == 128 and (r["splits"], r["kv_dtype"]) == (0, "same")
    ]
    rows = sorted({r["rows"] for r in plain})
    if not rows:
        return False
    figure, panels = pyplot().subplots(1, len(rows), figsize=(3.2 * len(rows) + 1, 4), sharey=True, squeeze=False)
    for axes, count in zip(panels[0], rows):
        for engine in dict.fromkeys(r["engine"] for r in plain):
            points = sorted(
                (r["length"], r["percent_of_read"]) for r in plain if (r["rows"], r["engine"]) == (count, engine)
            )
            axes.plot(*zip(*points), "o-", label=engine)
        axes.set(title=f"{count} row{'s' * (count > 1)}", xlabel="tokens a row", xscale="log", ylim=(0, 105))
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("percent of the read bandwidth")
    figure.suptitle(f"decode attention, 32 query heads, 8 KV heads of 128; {gpu}")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=5, fontsize=8)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    write(figure, path)
    return True


def draw_traces(records: list[Record], gpu: str, path: Path) -> bool:
    """Wall tokens a second over the planned FlashInfer's, mean and spread over seeds. False where that did not run."""
    cases: dict[tuple, dict[str, dict[Any, float]]] = defaultdict(lambda: defaultdict(dict))
    for r in records:
        cases[r["trace"], r["max_active"], r["group"], r["layers"], r["graph"]][r["engine"]][r["seed"]] = r[
            "tokens_per_s_wall"
        ]
    compared = {case: engines for case, engines in cases.items() if BASELINE in engines}
    if not compared:
        return False
    names = list(dict.fromkeys(engine for engines in compared.values() for engine in engines if engine != BASELINE))
    figure, axes = pyplot().subplots(figsize=(max(7, 1.1 * len(compared) + 2), 4.5), layout="constrained")
    width = 0.8 / len(names)
    for i, engine in enumerate(names):
        ratios = [
            [engines[engine][seed] / engines[BASELINE][seed] for seed in engines.get(engine, {})]
            for engines in compared.values()
        ]
        means, spreads = ([float(of(r)) if r else 0.0 for r in ratios] for of in (np.mean, np.std))
        places = np.arange(len(compared)) + (i + 0.5) * width - 0.4
        axes.bar(places, means, width, yerr=spreads, label=engine)
    axes.axhline(1, color="k", linewidth=0.8)
    labels = [
        f"{trace}:{active}\nG {group}, {layers} layer{'s' * (layers > 1)}\n{'replayed' if graph else 'launched'}"
        for trace, active, group, layers, graph in compared
    ]
    axes.set_xticks(range(len(compared)), labels, fontsize=7)
    axes.set(ylabel=f"wall tokens/s over {BASELINE}'s", title=gpu)
    axes.legend(ncols=3, fontsize=8)
    write(figure, path)
    return True


CHARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[list[Record], str, Path], bool]]] = {
    "attention": (ATTENTION_CASE, ("gpu_us", "percent_of_read"), draw_bandwidth),
    "traces": (TRACE_CASE, ("tokens_per_s_wall",), draw_traces),
}
"""Of each file of records: what tells its cases apart, what is drawn of them, and how."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=folder, default=Path("benchmarks/results"), help="folder of the JSONL files")
    parser.add_argument("--out", type=output_folder, default=Path("benchmarks/plots"), help="folder of the PNG files")
    arguments = parser.parse_args()
    return status("plot_attention", lambda: plot(arguments))


def plot(arguments: argparse.Namespace) -> None:
    needs("matplotlib")
    if not any((arguments.results / f"{name}.jsonl").exists() for name in CHARTS):
        raise UsageError(f"--results {arguments.results} has no {' and no '.join(f'{name}.jsonl' for name in CHARTS)}: "
                         "name the folder that benchmark_attention.py and benchmark_traces.py write to")  # fmt: skip
    files = []
    for name, (case, drawn, draw) in CHARTS.items():
        for gpu, records in newest(arguments.results / f"{name}.jsonl", case, drawn).items():
            path = arguments.out / f"{name}-{gpu.split(' (')[0].replace(' ', '-').lower()}.png"
            if draw(records, gpu, path):
                files.append(path)
                print(path)
    print(json.dumps({"plots": [str(file) for file in files]}))


if __name__ == "__main__":
    raise SystemExit(main())
