"""Draws decode step time and percent of the memory floor over context length, from benchmark_generate.py's records.

One PNG a model and GPU; the newest record of a case counts. Batches of several rows are drawn apart, as points.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from pkv_hf.arguments import file, needs, output_folder
from pkv_hf.bench.results.charts import pyplot, write
from pkv_hf.bench.results.records import read_records
from pkv_hf.errors import status

Record = dict[str, Any]
FIELDS = ("model", "dtype", "gpu", "lengths", "engine", "batch", "step_ms_p50", "floor_ms", "percent_of_floor")


def load(path: Path) -> dict[tuple[str, str, str], list[Record]]:
    """Records of greedy decoding by model, dtype of activations (and of quantised weights) and GPU."""
    newest: dict[tuple, Record] = {}
    for r in read_records(path, f"--results {path}", FIELDS):
        if r.get("mode", "greedy") != "greedy":
            continue
        dtype = f"{r['dtype']}-nf4" if r.get("weight_bits") else r["dtype"]
        newest[r["model"], dtype, r["gpu"], tuple(r["lengths"]), r["engine"]] = r
    groups = defaultdict(list)
    for (model, dtype, gpu, *_), record in newest.items():
        groups[model, dtype, gpu].append(record)
    return groups


def draw(records: list[Record], title: str, path: Path) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, (times, percents) = pyplot().subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    engines = list(dict.fromkeys(r["engine"] for r in records))
    for engine in engines:
        single = sorted((r for r in records if r["engine"] == engine and r["batch"] == 1), key=lambda r: r["lengths"])
        several = [r for r in records if r["engine"] == engine and r["batch"] > 1]
        (line,) = times.plot([r["lengths"][0] for r in single], [r["step_ms_p50"] for r in single], "o-", label=engine)
        percents.plot([r["lengths"][0] for r in single], [r["percent_of_floor"] for r in single], "o-")
        for axes, key in ((times, "step_ms_p50"), (percents, "percent_of_floor")):
            for r in several:
                axes.plot(max(r["lengths"]), r[key], "s", color=line.get_color(), fillstyle="none")
                axes.annotate(f"{r['batch']} rows", (max(r["lengths"]), r[key]), xytext=(6, 0), fontsize=7,
                              textcoords="offset points", va="center")  # fmt: skip
    floors = sorted(
        {(r["lengths"][0], r["floor_ms"]) for r in records if r["batch"] == 1 and r["engine"] == engines[0]}
    )
    times.plot([length for length, _ in floors], [floor for _, floor in floors], "k--", label="memory floor")
    times.set(ylabel="decode step, ms (median)", yscale="log", title=title)
    percents.set(ylabel="percent of the memory floor", ylim=(0, 100))
    for axes in (times, percents):
        axes.set(xlabel="prompt tokens", xscale="log")
        lengths = sorted({max(r["lengths"]) for r in records})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30, fontsize=8)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    for set_formatter in (times.yaxis.set_major_formatter, times.yaxis.set_minor_formatter):
        set_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    figure.legend(*times.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    write(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=file, default=Path("benchmarks/results/generate.jsonl"))
    parser.add_argument("--out", type=output_folder, default=Path("benchmarks/plots"), help="folder of the PNG files")
    arguments = parser.parse_args()
    return status("plot_results", lambda: plot(arguments))


def plot(arguments: argparse.Namespace) -> None:
    needs("matplotlib")
    files = []
    for (model, dtype, gpu), records in load(arguments.results).items():
        name = (
            "-".join(part for part in (Path(model).name, dtype, gpu.split(" (")[0]) if part).replace(" ", "-").lower()
        )
        files.append(arguments.out / f"{name}.png")
        draw(records, f"{Path(model).name}, {dtype}, {'CPU' if gpu.startswith('none') else gpu}", files[-1])
        print(files[-1])
    print(json.dumps({"plots": [str(path) for path in files]}))


if __name__ == "__main__":
    raise SystemExit(main())
