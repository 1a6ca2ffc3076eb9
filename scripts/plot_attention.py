"""Draws the policy and the attention routes beside FlashInfer's, from records of benchmark_attention.py and
benchmark_traces.py.

`attention.png`: bandwidth over context by route. `traces.png`, `traces-model.png`, `traces-real.png`: tokens a second
of the policy over FlashInfer's fastest path, of one layer, of 32 layers, and of requests of real traffic. What is
compared comes from one run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from pages import GPU
from pages.policy import ATTENTION_CASE, FLASHINFER, OURS, TRACE_CASE, Attention, Trace, attention, replayed, traces

from pkv_hf.arguments import folder, needs, output_folder
from pkv_hf.bench.results import charts
from pkv_hf.bench.results.charts import COLOURS, LIMIT, NAMES, Record
from pkv_hf.bench.results.published import RUN
from pkv_hf.bench.results.records import read_records
from pkv_hf.errors import UsageError, status

FIELDS = {
    "attention": (
        *RUN,
        "engine",
        *(field for field in ATTENTION_CASE if field != "order"),
        "gpu_us",
        "percent_of_read",
    ),
    "traces": (*RUN, "engine", *TRACE_CASE, "seed", "tokens_per_s_wall"),
}
"""Of each file what its records need."""

MARKERS = {"split": "o-", "workqueue": "s-", "flashinfer": "^--", "flashinfer_tc": "v--", "flashinfer_xqa": "D--"}
PANELS = (1, 4, 8, 16)
"""Rows of a batch."""

SWEPT = (8192, 16_384, 32_768, 65_536)

SPEED = "tokens_per_s_wall"


def draw_bandwidth(cases: list[Attention], gpu: str, path: Path) -> None:
    """Percent of the read bandwidth over the context, a panel for each number of rows."""
    pyplot = charts.pyplot()
    figure, panels = pyplot.subplots(2, 2, figsize=(charts.WIDTH, 6.0), layout="constrained", sharex=True, sharey=True)
    lengths = sorted({engines["split"]["length"] for engines in cases})
    for axes, rows in zip(panels.flat, PANELS):
        of_rows = sorted((e for e in cases if e["split"]["rows"] == rows), key=lambda e: e["split"]["length"])
        for engine in (*OURS, *FLASHINFER):
            points = [(e[engine]["length"], e[engine]["percent_of_read"]) for e in of_rows if engine in e]
            axes.plot([x for x, _ in points], [y for _, y in points], MARKERS[engine], color=COLOURS[engine],
                      label=NAMES[engine], markersize=5)  # fmt: skip
        axes.set_title(f"{rows} row{'s' * (rows > 1)}", fontsize=10, loc="left")
        charts.length_ticks(axes, lengths)
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylim(top=100)
    for axes in panels[1]:
        axes.set_xlabel("tokens a row")
    for axes in panels[:, 0]:
        axes.set_ylabel("% of the read bandwidth")
    charts.entitle(figure, f"Decode attention, 32 query and 8 KV heads of 128, float16, pages of 16, {gpu}")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    charts.write(figure, path)


def ratios(trace: Trace) -> tuple[str, list[float]]:
    """FlashInfer's fastest path, and how many times its tokens a second the policy reaches with each seed."""
    best = max(FLASHINFER, key=lambda engine: trace.mean(engine, SPEED))
    theirs = {r["seed"]: r[SPEED] for r in trace.engines[best]}
    return best, [r[SPEED] / theirs[r["seed"]] for r in trace.engines["policy"]]


def draw_traces(found: list[Trace], title: str, path: Path) -> None:
    label = "tokens a second of the policy over those of FlashInfer's fastest path"
    figure, axes = charts.panel(1.4 + 0.45 * len(found), title, xlabel=label)
    axes.grid(visible=False, axis="y")
    for place, trace in enumerate(reversed(found)):
        best, values = ratios(trace)
        mean, spread = float(np.mean(values)), float(np.std(values))
        axes.barh(place, mean, 0.6, color=COLOURS["policy"], xerr=spread or None, capsize=3, ecolor=LIMIT)
        axes.annotate(f"{mean:.2f} ({NAMES[best]})", (mean + spread, place), xytext=(6, 0),
                      textcoords="offset points", va="center", fontsize=9)  # fmt: skip
    axes.axvline(1, color=COLOURS["flashinfer"], linewidth=1.5)
    axes.set_yticks(range(len(found)), [words(trace.first) for trace in reversed(found)])
    axes.set_xlim(0, axes.get_xlim()[1] * 1.35)
    charts.write(figure, path)


def words(r: Record) -> str:
    return f"{r['trace'].replace('_', ' ')},\n{r['max_active']} row{'s' * (r['max_active'] > 1)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=folder, default=Path("benchmarks/results"), help="folder of the JSONL files")
    parser.add_argument("--gpu", default=GPU, help="whose records to draw, as they name it (default: %(default)s)")
    parser.add_argument("--out", type=output_folder, default=Path("benchmarks/plots"), help="folder of the PNG files")
    arguments = parser.parse_args()
    return status("plot_attention", lambda: plot(arguments))


def load(results: Path, name: str, gpu: str) -> list[Record]:
    path = results / f"{name}.jsonl"
    if not path.exists():
        return []
    return charts.of_gpu(
        [{"order": "scattered", **r} for r in read_records(path, f"--results: {path}", FIELDS[name])], gpu, path
    )


def plot(arguments: argparse.Namespace) -> None:
    needs("matplotlib")
    if not any((arguments.results / f"{name}.jsonl").exists() for name in FIELDS):
        raise UsageError(f"--results {arguments.results} has no {' and no '.join(f'{name}.jsonl' for name in FIELDS)}: "
                         "name the folder that benchmark_attention.py and benchmark_traces.py write to")  # fmt: skip
    gpu, files = arguments.gpu, []
    equal_rows = attention(load(arguments.results, "attention", gpu), rows=PANELS, length=SWEPT)
    if equal_rows:
        files.append(arguments.out / "attention.png")
        draw_bandwidth(equal_rows, gpu, files[-1])
    played = load(arguments.results, "traces", gpu)
    for name, title, found in (
        ("traces", "Decode attention on traces, one layer a step", traces(played, 1)),
        ("traces-model", "Decode attention on traces, 32 layers a step", traces(played, 32)),
        ("traces-real", "Decode attention on real requests, one layer a step", traces(played, 1, of_file=True)),
    ):
        if replayed(found):
            files.append(arguments.out / f"{name}.png")
            draw_traces(replayed(found), f"{title}, CUDA graphs, {gpu}", files[-1])
    print(*files, sep="\n")
    print(json.dumps({"plots": [str(file) for file in files]}))


if __name__ == "__main__":
    raise SystemExit(main())
