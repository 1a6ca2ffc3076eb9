"""Draws decode steps of the 8B shape in bfloat16, on pages and with transformers' caches, from records of
benchmark_generate.py.

`decode.png`: one row, step time over the context. `batches.png`: several rows. What is compared comes from one run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pages import GPU, readme
from pages.performance import MODE, PEERS, compared

from pkv_hf.arguments import file, needs, output_folder
from pkv_hf.bench.results import charts
from pkv_hf.bench.results.charts import COLOURS, LIMIT, NAMES, Record
from pkv_hf.bench.results.published import RUN
from pkv_hf.bench.results.records import read_records
from pkv_hf.errors import UsageError, status

FIELDS = ("model", "dtype", *RUN, "lengths", "engine", "step_ms_p50", "floor_ms")
ENGINES = (*PEERS, "patched")


def load(path: Path, gpu: str) -> list[dict[str, Record]]:
    """Greedy decoding of the shape on a GPU: of each case its engines."""
    records = [{**MODE, **r} for r in read_records(path, f"--results {path}", FIELDS)]
    of_shape = [
        r
        for r in charts.of_gpu(records, gpu, path)
        if r["mode"] == "greedy" and all(r.get(key) == value for key, value in readme.SHAPE.items())
    ]
    return compared(of_shape)


def draw_decode(runs: list[dict[str, Record]], gpu: str, path: Path) -> None:
    from matplotlib.ticker import FuncFormatter

    title = f"A decode step of Llama-3.1-8B's shape, one row, bfloat16, {gpu}"
    figure, axes = charts.panel(
        4.6, title, xlabel="context, tokens (log scale)", ylabel="ms a token, median (log scale)"
    )
    lines = {
        engine: [(run[engine]["lengths"][0], run[engine]["step_ms_p50"]) for run in runs if engine in run]
        for engine in ENGINES
    }
    labels = {}
    for engine, points in lines.items():
        if points:
            axes.plot(*zip(*points), "o-", color=COLOURS[engine], linewidth=2)
            labels[NAMES[engine]] = (*points[-1], COLOURS[engine])
    floor = [(run["patched"]["lengths"][0], run["patched"]["floor_ms"]) for run in runs]
    axes.plot(*zip(*floor), "--", color=LIMIT)
    labels["memory floor"] = (*floor[-1], LIMIT)
    lengths = [length for length, _ in floor]
    charts.length_ticks(axes, lengths)
    axes.set_xlim(lengths[0] * 0.85, lengths[-1] * 2.2)
    axes.set_yscale("log")
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200) if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]]
    axes.set_yticks(ticks)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    figure.draw_without_rendering()
    charts.end_labels(axes, labels)
    charts.write(figure, path)


def rows_of(r: Record) -> str:
    lengths = r["lengths"]
    if len(set(lengths)) == 1:
        return f"{len(lengths)} rows of {lengths[0]:,}"
    return f"{len(lengths)} ragged rows,\n{min(lengths):,} to {max(lengths):,}"


def draw_batches(runs: list[dict[str, Record]], gpu: str, path: Path) -> None:
    title = f"A decode step of several rows, Llama-3.1-8B's shape, bfloat16, {gpu}"
    figure, axes = charts.panel(1.6 + 1.3 * len(runs), title, xlabel="ms a step, median")
    axes.grid(visible=False, axis="y")
    for place, run in enumerate(reversed(runs)):
        shown = [engine for engine in ENGINES if engine in run]
        for line, engine in enumerate(shown):
            at, ms = place + 0.25 * ((len(shown) - 1) / 2 - line), run[engine]["step_ms_p50"]
            axes.barh(at, ms, 0.23, color=COLOURS[engine])
            axes.annotate(f"{NAMES[engine]}, {ms:.1f}", (ms, at), xytext=(5, 0), textcoords="offset points",
                          va="center", fontsize=10)  # fmt: skip
        floor = run["patched"]["floor_ms"]
        axes.plot([floor, floor], [place - 0.42, place + 0.42], "--", color=LIMIT, label="memory floor")
    axes.set_yticks(range(len(runs)), [rows_of(run["patched"]) for run in reversed(runs)])
    axes.margins(x=0.25)
    axes.set_xlim(left=0)
    axes.legend(*([handles[0]] for handles in axes.get_legend_handles_labels()), loc="lower right", fontsize=10)
    charts.write(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=file, default=Path("benchmarks/results/generate.jsonl"))
    parser.add_argument("--gpu", default=GPU, help="whose records to draw, as they name it (default: %(default)s)")
    parser.add_argument("--out", type=output_folder, default=Path("benchmarks/plots"), help="folder of the PNG files")
    arguments = parser.parse_args()
    return status("plot_results", lambda: plot(arguments))


def plot(arguments: argparse.Namespace) -> None:
    needs("matplotlib")
    runs = load(arguments.results, arguments.gpu)
    several = [run for run in runs if len(run["patched"]["lengths"]) > 1]
    single = [run for run in runs if run not in several]
    files = []
    for name, draw, drawn in (("decode", draw_decode, single), ("batches", draw_batches, several)):
        if drawn:
            files.append(arguments.out / f"{name}.png")
            draw(drawn, arguments.gpu, files[-1])
            print(files[-1])
    if not files:
        raise UsageError(f"--results {arguments.results} has no run of {readme.SHAPE['model']} in bfloat16 on "
                         f"{arguments.gpu}, unpatched and patched: run benchmark_generate.py with it")  # fmt: skip
    print(json.dumps({"plots": [str(path) for path in files]}))


if __name__ == "__main__":
    raise SystemExit(main())
