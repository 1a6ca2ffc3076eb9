"""Decode attention over traces: every route, the policy, and an oracle that takes the best route of every step.

A case is a trace played through a batch of some rows (bimodal:8); of its steps, `--steps` at even distances are
measured. Wall time is a whole step of `--layers` layers, planned and launched by the host, and once more with the
launches replayed from a CUDA graph; the policy's includes its decision, by its share: it is asked when rows come or go,
and every 64 steps. GPU time is a layer's, by replays over pools that do not fit the device's cache together.

The first step of a case is compared with float64, and with FlashInfer where it is installed, before anything is timed:
an error above 2e-3, or 3e-4 in the mean, ends the run, and nothing of the case is recorded.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from pkv_hf.arguments import count, device, natural, needs, share
from pkv_hf.bench.attention_steps import AttentionShape
from pkv_hf.bench.benchmark import read_bandwidth
from pkv_hf.bench.inputs.models import DTYPES
from pkv_hf.bench.inputs.traces import FAMILIES, HELD_OUT_SEEDS, load, synthetic
from pkv_hf.bench.results.records import OUT_FOLDER, append_record, environment, output
from pkv_hf.bench.trace_benchmark import Record, measure
from pkv_hf.cache.sizes import PAGE_SIZES
from pkv_hf.errors import WrongResultError, status
from pkv_hf.tables import table


def summary(records: list[Record]) -> str:
    """A table of the mean over the seeds, and the standard deviation beside the wall's."""
    groups: dict[tuple, list[Record]] = {}
    for r in records:
        groups.setdefault((f"{r['trace']}:{r['max_active']}", r["graph"], r["engine"]), []).append(r)
    rows = []
    for (case, graph, engine), of_engine in groups.items():
        walls = [r["tokens_per_s_wall"] for r in of_engine]
        regret = "gpu" if graph else "wall"
        rows.append((
            case, "replayed" if graph else "launched", engine,
            *(_mean(of_engine, key) for key in ("gpu_us_p50", "gb_s")),
            f"{np.mean(walls):,.0f} ± {np.std(walls):,.0f}",
            f"{np.mean([r[f'regret_{regret}_mean'] for r in of_engine]):.1%}",
            f"{max(r['max_abs_err'] for r in of_engine):.0e}",
        ))  # fmt: skip
    return table(("case", "", "engine", "GPU us", "GB/s", "wall tokens/s", "over the oracle", "error"), rows)


def _mean(records: list[Record], key: str) -> str:
    return "-" if records[0][key] is None else f"{np.mean([r[key] for r in records]):,.1f}"


def case_of(text: str) -> tuple[str, int]:
    """`bimodal:8` as a trace family and a number of rows."""
    family, _, rows = text.partition(":")
    if family not in FAMILIES or not rows.isdecimal() or int(rows) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not FAMILY:ROWS with a family of {', '.join(FAMILIES)}")
    return family, int(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = ["bucketed:1", "homogeneous:2", "bimodal:4", "bimodal:8", "uniform:8", "zipf:8"]
    parser.add_argument("--cases", nargs="+", type=case_of, default=[case_of(case) for case in cases])
    parser.add_argument("--trace-file", type=Path, help="CSV or JSON of requests, instead of --cases")
    parser.add_argument("--max-active", nargs="+", type=count, default=[1, 4, 8, 16], help="rows, with --trace-file")
    parser.add_argument("--seeds", nargs="+", type=natural, default=list(HELD_OUT_SEEDS))
    parser.add_argument("--requests", type=count, default=64, help="requests of a trace, the first of a file's")
    parser.add_argument("--steps", type=count, default=12, help="steps of a trace that are measured")
    parser.add_argument("--layers", type=count, default=1)
    parser.add_argument("--kv-heads", type=count, default=8)
    parser.add_argument("--group", type=count, default=4, help="query heads of a KV head")
    parser.add_argument("--head-dim", type=count, default=128)
    parser.add_argument("--page-size", type=int, choices=PAGE_SIZES, default=16)
    parser.add_argument("--holes", type=share, default=0.0, help="share of the pool's pages that no row has")
    parser.add_argument("--dtype", default="float16", choices=DTYPES)
    parser.add_argument("--samples", type=count, default=7)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=output, default=f"{OUT_FOLDER}/traces.jsonl")
    arguments = parser.parse_args()
    return status("benchmark_traces", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    needs("triton")
    played = [(name, seed, rows) for name, rows in arguments.cases for seed in arguments.seeds]
    if arguments.trace_file:
        played = [(arguments.trace_file.stem, None, rows) for rows in arguments.max_active]
    shape = AttentionShape(
        arguments.kv_heads, arguments.group, arguments.head_dim, arguments.page_size, DTYPES[arguments.dtype],
        torch.device(arguments.device), arguments.layers, arguments.holes,
    )  # fmt: skip
    bandwidth = read_bandwidth(arguments.device) / 1e9
    records = []
    try:
        for name, seed, max_active in played:
            if seed is None:
                requests = load(arguments.trace_file)[: arguments.requests]
            else:
                requests = synthetic(name, arguments.requests, seed)
            case = {
                "bench": "traces", "trace": name, "seed": seed, "max_active": max_active, "group": shape.group,
                "kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "page_size": shape.page_size,
                "holes": shape.holes, "dtype": arguments.dtype, "layers": shape.layers,
            }  # fmt: skip
            of_case = measure(
                requests, max_active, shape, arguments.steps, arguments.samples, seed,
                f"{name}:{max_active} {seed or ''}",
            )  # fmt: skip
            for record in of_case:
                records.append({**case, **record, "read_gb_s": bandwidth, **environment()})
                append_record(arguments.out, records[-1])
    except WrongResultError as error:
        raise SystemExit(f"error: {error}") from error
    print(summary(records), end="\n\n")
    print(json.dumps({"records": len(records), "read_gb_s": bandwidth}))


if __name__ == "__main__":
    raise SystemExit(main())
