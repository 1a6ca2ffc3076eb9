"""Writes the tables of docs/policy.md, between `<!-- generated: NAME -->` and `<!-- end -->` marks, from results.

The newest record of a case counts. `--check` changes nothing and fails where the page is stale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pkv_hf import published
from pkv_hf.published import NO_GPU_RUN, Record, markdown, measured_on

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


def traces_by_case(layers: int, group: int = 4) -> dict[tuple[str, bool], dict[str, list[Record]]]:
    """Records by trace and rows, launched or replayed; of each engine, one a seed (one of a file's trace)."""
    groups: dict[tuple[str, bool], dict[str, list[Record]]] = {}
    for r in newest("traces.jsonl", (*TRACE_CASE, "engine", "gpu")):
        if r["layers"] == layers and r["group"] == group and r["holes"] == 0:
            of_case = groups.setdefault((f"{r['trace']}:{r['max_active']}", r["graph"]), {})
            of_case.setdefault(r["engine"], []).append(r)
    return groups


def of_families(layers: int) -> dict[tuple[str, bool], dict[str, list[Record]]]:
    return {case: engines for case, engines in traces_by_case(layers).items() if engines["policy"][0]["seed"]}


def mean(records: list[Record], key: str) -> float:
    return sum(r[key] for r in records) / len(records)


def trace_speed_table() -> str:
    rows, used = [], []
    for (case, graph), engines in of_families(1).items():
        used += engines["policy"]
        speeds = {engine: mean(records, "tokens_per_s_wall") for engine, records in engines.items()}
        gpu = {engine: mean(records, "tokens_per_s_gpu") for engine, records in engines.items()}
        best, best_gpu = (max(FLASHINFER, key=by.__getitem__) for by in (speeds, gpu))
        paper_cuda, paper_wall = PAPER_CUDA_WALL.get(case, (None, None))
        rows.append([
            case, "replayed" if graph else "launched",
            *(f"{speeds[engine]:,.0f}" for engine in ("split", "workqueue", *FLASHINFER, "policy")),
            f"{speeds['policy'] / speeds['flashinfer']:.2f}", "-" if paper_wall is None else f"{paper_wall:.2f}",
            f"{speeds['policy'] / speeds[best]:.2f}",
            f"{gpu['policy'] / gpu['flashinfer']:.2f}", "-" if paper_cuda is None else f"{paper_cuda:.2f}",
            f"{gpu['policy'] / gpu[best_gpu]:.2f}",
        ])  # fmt: skip
    header = ["trace:rows", "kernels", "split", "workqueue", *FLASHINFER, "policy", "wall, policy / `flashinfer`",
              "the paper's", "/ best FlashInfer", "GPU time, policy / `flashinfer`", "the paper's",
              "/ best FlashInfer"]  # fmt: skip
    return markdown(header, rows) + measured_on(used)


def trace_counters_table() -> str:
    rows = []
    for (case, graph), engines in of_families(1).items():
        if not graph:
            continue
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
    return markdown(header, rows)


def model_table() -> str:
    """Steps of 32 layers: the engines in tokens a second of wall time."""
    rows, used = [], []
    for (case, graph), engines in of_families(32).items():
        used += engines["policy"]
        speeds = {engine: mean(records, "tokens_per_s_wall") for engine, records in engines.items()}
        rows.append([
            case, "replayed" if graph else "launched",
            *(f"{speeds[engine]:,.0f}" for engine in ("split", "workqueue", *FLASHINFER, "policy")),
            f"{speeds['policy'] / max(speeds[engine] for engine in FLASHINFER):.2f}",
        ])  # fmt: skip
    header = ["trace:rows", "kernels", "split", "workqueue", *FLASHINFER, "policy", "policy / best FlashInfer"]
    return markdown(header, rows) + measured_on(used) if rows else NO_GPU_RUN


def real_table() -> str:
    """A file of real requests: wall time, and what the policy's choices cost over the best of every step."""
    rows, used = [], []
    for (case, graph), engines in traces_by_case(1).items():
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
    return markdown(header, rows) + measured_on(used) if rows else NO_GPU_RUN


def groups_table() -> str:
    """Groups of another size: GPU time of a layer, replayed."""
    rows: list[list[str]] = []
    used: list[Record] = []
    for group in (1, 8):
        for (case, graph), engines in traces_by_case(1, group).items():
            if not graph:
                continue
            used += engines["policy"]
            times = {engine: mean(records, "gpu_us_p50") for engine, records in engines.items()}
            theirs, ours = ([times[e] for e in names if e in times] for names in (FLASHINFER, ("split", "workqueue")))
            cells = [f"{times[e]:,.0f} us" if e in times else "-" for e in ("split", "workqueue", *FLASHINFER)]
            rows.append([f"{case}, G {group}", *cells, f"{min(theirs) / min(ours):.2f}"])
    header = ["trace:rows", "split", "workqueue", *FLASHINFER, "ours / best FlashInfer"]
    return markdown(header, rows) + measured_on(used) if rows else NO_GPU_RUN


ATTENTION_CASE = ("rows", "length", "query_heads", "group", "head_dim", "page_size", "holes", "dtype", "kv_dtype",
                  "splits")  # fmt: skip
PLAIN = {"query_heads": 32, "group": 4, "head_dim": 128, "page_size": 16, "holes": 0.0, "dtype": "float16",
         "kv_dtype": "same", "splits": 0}  # fmt: skip


def attention_records(**wanted: Any) -> dict[tuple, dict[str, Record]]:
    """Records of equal rows by case and engine, plain ones but for what is wanted (None: any)."""
    settings = {**PLAIN, **wanted}
    groups: dict[tuple, dict[str, Record]] = {}
    for r in newest("attention.jsonl", (*ATTENTION_CASE, "engine", "gpu")):
        if all(value is None or r[key] == value for key, value in settings.items()):
            groups.setdefault(tuple(r[key] for key in ATTENTION_CASE), {})[r["engine"]] = r
    return groups


def attention_table(name: Callable[[Record], str], **wanted: Any) -> str:
    rows: list[list[str]] = []
    used: list[Record] = []
    for engines in attention_records(**wanted).values():
        used += engines.values()
        theirs = [engines[engine]["gpu_us"] for engine in FLASHINFER if engine in engines]
        if not theirs:
            continue
        ours = min(engines[engine]["gpu_us"] for engine in ("split", "workqueue"))
        cells = [
            f"{engines[e]['gpu_us']:,.1f} us, {engines[e]['percent_of_read']:.0f} %" if e in engines else "-"
            for e in ("split", "workqueue", *FLASHINFER)
        ]
        rows.append([name(next(iter(engines.values()))), *cells, f"{min(theirs) / ours:.2f}"])
    header = ["", "split", "workqueue", *FLASHINFER, "ours / best FlashInfer"]
    return markdown(header, rows) + measured_on(used) if rows else NO_GPU_RUN


def lengths_table() -> str:
    return attention_table(lambda r: f"{r['rows']} x {r['length']:,}")


def splits_table() -> str:
    """Parts that `split` cuts a row into, GPU time in microseconds; 0 is its own choice."""
    found = {
        (r["rows"], r["length"], r["splits"]): r["gpu_us"]
        for engines in attention_records(splits=None).values()
        for r in engines.values()
        if r["engine"] == "split"
    }
    counts = sorted({splits for *_, splits in found if splits})
    rows = [
        [f"{count} x {length:,}", *(f"{found[count, length, splits]:,.1f}" for splits in (*counts, 0))]
        for count, length in dict.fromkeys((count, length) for count, length, splits in found if splits)
        if (count, length, 0) in found
    ]
    return markdown(["", *(f"{splits} parts" for splits in counts), "its own choice"], rows) if rows else NO_GPU_RUN


TABLES: dict[str, Callable[[], str]] = {
    "trace-speed": trace_speed_table,
    "trace-counters": trace_counters_table,
    "trace-model": model_table,
    "trace-real": real_table,
    "trace-groups": groups_table,
    "attention-lengths": lengths_table,
    "attention-splits": splits_table,
}


def main() -> int:
    return published.main(__doc__, TABLES, [ROOT / "docs" / "policy.md"])


if __name__ == "__main__":
    raise SystemExit(main())
