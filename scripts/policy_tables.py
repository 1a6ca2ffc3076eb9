"""Writes the tables of docs/policy.md, between `<!-- generated: NAME -->` and `<!-- end -->` marks, from results.

The newest record of a case counts. `--check` changes nothing and fails where the page is stale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from pkv_hf.bench.results import published
from pkv_hf.bench.results.published import NO_GPU_RUN, Record, markdown, measured_on

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def newest(name: str, case: Iterable[str], **defaults: Any) -> list[Record]:
    return published.newest(RESULTS / name, case, **defaults)


PAPER_CUDA_WALL = {
    "bucketed:1": (1.471, 1.403), "bimodal:4": (1.0, 1.0), "bimodal:8": (1.106, 1.080),
    "uniform:8": (1.076, 1.044), "zipf:8": (1.105, 1.068),
}  # fmt: skip
"""Throughput of PersistentKV's policy over FlashInfer's planned wrapper, by CUDA and by wall time: the main table of
arXiv 2606.26666."""

FLASHINFER = ("flashinfer", "flashinfer_tc", "flashinfer_xqa")
TRACE_CASE = ("trace", "seed", "max_active", "group", "head_dim", "page_size", "holes", "dtype", "layers", "graph")


Cases = dict[tuple[str, bool], dict[str, list[Record]]]
"""Records by trace and rows, and whether they were replayed; of each engine, one a seed (one of a file's trace)."""


def traces_by_case(gpu: str, layers: int, group: int = 4) -> Cases:
    groups: Cases = {}
    for r in newest("traces.jsonl", (*TRACE_CASE, "engine", "gpu")):
        if r["gpu"] == gpu and r["layers"] == layers and r["group"] == group and r["holes"] == 0:
            of_case = groups.setdefault((f"{r['trace']}:{r['max_active']}", r["graph"]), {})
            of_case.setdefault(r["engine"], []).append(r)
    return groups


def of_families(gpu: str, layers: int) -> Cases:
    return {case: engines for case, engines in traces_by_case(gpu, layers).items() if engines["policy"][0]["seed"]}


def mean(records: list[Record], key: str) -> float:
    return sum(r[key] for r in records) / len(records)


def trace_speed_table(gpu: str) -> str:
    rows, used = [], []
    for (case, graph), engines in of_families(gpu, 1).items():
        used += engines["policy"]
        speeds = {engine: mean(records, "tokens_per_s_wall") for engine, records in engines.items()}
        alone = {engine: mean(records, "tokens_per_s_gpu") for engine, records in engines.items()}
        best, best_alone = (max(FLASHINFER, key=by.__getitem__) for by in (speeds, alone))
        paper_cuda, paper_wall = PAPER_CUDA_WALL.get(case, (None, None))
        rows.append([
            case, "replayed" if graph else "launched",
            *(f"{speeds[engine]:,.0f}" for engine in ("split", "workqueue", *FLASHINFER, "policy")),
            f"{speeds['policy'] / speeds['flashinfer']:.2f}", "-" if paper_wall is None else f"{paper_wall:.2f}",
            f"{speeds['policy'] / speeds[best]:.2f}",
            f"{alone['policy'] / alone['flashinfer']:.2f}", "-" if paper_cuda is None else f"{paper_cuda:.2f}",
            f"{alone['policy'] / alone[best_alone]:.2f}",
        ])  # fmt: skip
    header = ["trace:rows", "kernels", "split", "workqueue", *FLASHINFER, "policy", "wall, policy / `flashinfer`",
              "the paper's", "/ best FlashInfer", "GPU time, policy / `flashinfer`", "the paper's",
              "/ best FlashInfer"]  # fmt: skip
    return markdown(header, rows) + measured_on(used) if rows else ""


def trace_counters_table(gpu: str) -> str:
    rows, used = [], []
    for (case, graph), engines in of_families(gpu, 1).items():
        if not graph:
            continue
        used += engines["policy"]
        policy, routes = engines["policy"], ("split", "workqueue", *FLASHINFER)
        shares = {e: 100 * mean(engines[e], "gb_s") / mean(engines[e], "read_gb_s") for e in routes}
        rows.append([
            case,
            *(f"{mean(engines[e], 'gpu_us_p50'):,.0f} us, {shares[e]:.0f} %" for e in routes),
            f"{mean(policy, 'regret_gpu_mean'):.1%}, {mean(policy, 'regret_gpu_p95'):.1%}",
            *(" / ".join(f"{mean(engines[e], key):.1f}" for e in ("split", "workqueue"))
              for key in ("launches", "programs_per_sm", "merge_mb")),
            f"{mean(engines['split'], 'kv_mb'):,.0f}",
        ])  # fmt: skip
    header = ["trace:rows", "split", "workqueue", *FLASHINFER, "policy over the oracle, mean and p95",
              "launches, split / workqueue", "programs an SM", "merge MB", "KV MB"]  # fmt: skip
    return markdown(header, rows) + measured_on(used) if rows else ""


def model_table(gpu: str) -> str:
    """Steps of 32 layers: the engines in tokens a second of wall time."""
    rows, used = [], []
    for (case, graph), engines in of_families(gpu, 32).items():
        used += engines["policy"]
        speeds = {engine: mean(records, "tokens_per_s_wall") for engine, records in engines.items()}
        rows.append([
            case, "replayed" if graph else "launched",
            *(f"{speeds[engine]:,.0f}" for engine in ("split", "workqueue", *FLASHINFER, "policy")),
            f"{speeds['policy'] / max(speeds[engine] for engine in FLASHINFER):.2f}",
        ])  # fmt: skip
    header = ["trace:rows", "kernels", "split", "workqueue", *FLASHINFER, "policy", "policy / best FlashInfer"]
    return markdown(header, rows) + measured_on(used) if rows else ""


def real_table(gpu: str) -> str:
    """A file of real requests: wall time, and what the policy's choices cost over the best of every step."""
    rows, used = [], []
    for (case, graph), engines in traces_by_case(gpu, 1).items():
        (policy, *_) = engines["policy"]
        if policy["seed"]:
            continue
        used.append(policy)
        speeds = {engine: mean(records, "tokens_per_s_wall") for engine, records in engines.items()}
        rows.append([
            case, "replayed" if graph else "launched",
            *(f"{speeds[engine]:,.0f}" for engine in ("split", "workqueue", *FLASHINFER, "policy")),
            f"{speeds['policy'] / max(speeds[engine] for engine in FLASHINFER):.2f}",
            f"{policy['regret_gpu_mean']:.1%}, {policy['regret_gpu_p95']:.1%}" if graph else "-",
        ])  # fmt: skip
    header = ["trace:rows", "kernels", "split", "workqueue", *FLASHINFER, "policy", "policy / best FlashInfer",
              "GPU time over the oracle, mean and p95"]  # fmt: skip
    return markdown(header, rows) + measured_on(used) if rows else ""


def groups_table(gpu: str) -> str:
    """Groups of another size: GPU time of a layer, replayed."""
    rows: list[list[str]] = []
    used: list[Record] = []
    for group in (1, 8):
        for (case, graph), engines in traces_by_case(gpu, 1, group).items():
            if not graph:
                continue
            used += engines["policy"]
            times = {engine: mean(records, "gpu_us_p50") for engine, records in engines.items()}
            theirs, ours = ([times[e] for e in names if e in times] for names in (FLASHINFER, ("split", "workqueue")))
            cells = [f"{times[e]:,.0f} us" if e in times else "-" for e in ("split", "workqueue", *FLASHINFER)]
            rows.append([f"{case}, G {group}", *cells, f"{min(theirs) / min(ours):.2f}"])
    header = ["trace:rows", "split", "workqueue", *FLASHINFER, "ours / best FlashInfer"]
    return markdown(header, rows) + measured_on(used) if rows else ""


ATTENTION_CASE = ("rows", "length", "query_heads", "group", "head_dim", "page_size", "holes", "order", "dtype",
                  "kv_dtype", "splits")  # fmt: skip
PLAIN = {"query_heads": 32, "group": 4, "head_dim": 128, "page_size": 16, "holes": 0.0, "order": "scattered",
         "dtype": "float16", "kv_dtype": "same", "splits": 0}  # fmt: skip


def attention_records(gpu: str, **wanted: Any) -> dict[tuple, dict[str, Record]]:
    """Records of equal rows by case and engine, plain but for what is wanted: a value, one of several, None for any."""
    settings = {**PLAIN, **wanted}
    groups: dict[tuple, dict[str, Record]] = {}
    for r in newest("attention.jsonl", (*ATTENTION_CASE, "engine", "gpu"), order="scattered"):
        fits = (r[key] in value if isinstance(value, tuple) else value in (None, r[key])
                for key, value in settings.items())  # fmt: skip
        if r["gpu"] == gpu and all(fits):
            groups.setdefault(tuple(r[key] for key in ATTENTION_CASE), {})[r["engine"]] = r
    return groups


def attention_table(name: str, gpu: str, **wanted: Any) -> str:
    """A line for each case, in order of the fields that `name`, a format, names it by."""
    rows: list[list[str]] = []
    used: list[Record] = []
    cases = attention_records(gpu, **wanted).values()
    swept = [key for key in ATTENTION_CASE if "{" + key in name]
    for engines in sorted(cases, key=lambda engines: [next(iter(engines.values()))[key] for key in swept]):
        ours = [engines[engine]["gpu_us"] for engine in ("split", "workqueue") if engine in engines]
        theirs = [engines[engine]["gpu_us"] for engine in FLASHINFER if engine in engines]
        if len(ours) < 2:
            continue
        used += engines.values()
        cells = [
            f"{engines[e]['gpu_us']:,.1f} us, {engines[e]['percent_of_read']:.0f} %" if e in engines else "-"
            for e in ("split", "workqueue", *FLASHINFER)
        ]
        ahead = f"{min(theirs) / min(ours):.2f}" if theirs else "-"
        rows.append([name.format(**next(iter(engines.values()))), *cells, ahead])
    header = ["", "split", "workqueue", *FLASHINFER, "ours / best FlashInfer"]
    return markdown(header, rows) + measured_on(used) if rows else ""


def splits_table(gpu: str) -> str:
    """Parts that `split` cuts a row into, GPU time in microseconds; 0 is its own choice."""
    found = {
        (r["rows"], r["length"], r["splits"]): r["gpu_us"]
        for engines in attention_records(gpu, splits=None).values()
        for r in engines.values()
        if r["engine"] == "split"
    }
    counts = sorted({splits for *_, splits in found if splits})
    rows = [
        [f"{count} x {length:,}", *(f"{found[count, length, splits]:,.1f}" for splits in (*counts, 0))]
        for count, length in dict.fromkeys((count, length) for count, length, splits in found if splits)
        if (count, length, 0) in found
    ]
    return markdown(["", *(f"{splits} parts" for splits in counts), "its own choice"], rows) if rows else ""


LENGTHS = "{rows} x {length:,}"
OF_A_GPU: dict[str, Callable[[str], str]] = {
    "trace-speed": trace_speed_table,
    "trace-counters": trace_counters_table,
    "trace-model": model_table,
    "trace-real": real_table,
    "trace-groups": groups_table,
    "attention-lengths": partial(attention_table, LENGTHS),
    "attention-groups": partial(
        attention_table, "G {group}, {query_heads} heads", rows=8, length=16_384, group=None, query_heads=(32, 42)
    ),
    "attention-pages": partial(
        attention_table, LENGTHS + ", pages of {page_size}, holes {holes:.0%}",
        rows=(1, 8), length=16_384, page_size=None, holes=None,
    ),
    "attention-order": partial(
        attention_table, LENGTHS + ", {order}", rows=(1, 8), length=(8192, 8240), order=None,
    ),
    "attention-heads": partial(
        attention_table, LENGTHS + ", heads of {head_dim}, {dtype}",
        rows=(1, 8), length=16_384, head_dim=None, dtype=None,
    ),
    "attention-splits": splits_table,
}  # fmt: skip


def on_every_gpu(table_of: Callable[[str], str]) -> str:
    """A table for each GPU that there are records of, most recent GPUs last."""
    gpus = dict.fromkeys(r["gpu"] for name in ("traces.jsonl", "attention.jsonl") for r in newest(name, ("gpu",)))
    return "\n".join(filter(None, map(table_of, gpus))) or NO_GPU_RUN


TABLES = {name: partial(on_every_gpu, table_of) for name, table_of in OF_A_GPU.items()}


def main() -> int:
    return published.main(__doc__, TABLES, [ROOT / "docs" / "policy.md"])


if __name__ == "__main__":
    raise SystemExit(main())
