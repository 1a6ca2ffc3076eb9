"""Decode attention of equal rows: every route's time and bandwidth, over whatever is given several values.

GPU time is a layer's, by replays of a CUDA graph over pools that do not fit the device's cache together; wall time one
layer's, planned and launched by the host. Each case is compared with float64, and with FlashInfer where it is
installed, before it is timed; a wrong result ends the run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pkv_hf.arguments import count, device, natural, needs, share
from pkv_hf.bench.attention_steps import RUNNERS, AttentionShape, AttentionStep
from pkv_hf.bench.benchmark import read_bandwidth
from pkv_hf.bench.inputs.models import DTYPES
from pkv_hf.bench.results.records import OUT_FOLDER, append_record, environment, output
from pkv_hf.bench.trace_benchmark import Record, check
from pkv_hf.cache.sizes import KV_DTYPES, PAGE_SIZES
from pkv_hf.errors import UsageError, WrongResultError, status
from pkv_hf.tables import table

SWEPT = ("rows", "length", "query_heads", "group", "head_dim", "page_size", "holes", "order", "dtype", "kv_dtype",
         "splits")  # fmt: skip
ORDERS = ("scattered", "consecutive")


def measure(case: dict[str, Any], arguments: argparse.Namespace, bandwidth: float) -> list[Record]:
    shape = AttentionShape(
        case["query_heads"] // case["group"],
        case["group"],
        case["head_dim"],
        case["page_size"],
        DTYPES[case["dtype"]],
        torch.device(arguments.device),
        holes=case["holes"],
        kv_dtype=None if case["kv_dtype"] == "same" else KV_DTYPES[case["kv_dtype"]],
        scattered=case["order"] == "scattered",
    )
    step = AttentionStep(shape, [case["length"]] * case["rows"], np.random.default_rng(0), case["splits"] or None)
    routes = [route for route in arguments.engines if step.accepts(route)]
    if not routes:
        raise step.refused(arguments.engines)
    errors = check(step, routes)
    records = []
    for route in routes:
        timing = step.time(route, arguments.samples)
        read_gb_s = None if timing.gpu_s is None else step.layer_nbytes / timing.gpu_s / 1e9
        records.append({
            "bench": "attention", **case, "engine": route, "wall_ms": timing.eager_s * 1e3,
            "gpu_us": None if timing.gpu_s is None else timing.gpu_s * 1e6, "gb_s": read_gb_s,
            "percent_of_read": None if read_gb_s is None else 100 * read_gb_s / bandwidth,
            "read_gb_s": bandwidth, "max_abs_err": errors[route], **environment(),
        })  # fmt: skip
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=count, default=[1, 4, 8, 16])
    parser.add_argument("--length", nargs="+", type=count, default=[8192, 32_768])
    parser.add_argument("--query-heads", nargs="+", type=count, default=[32])
    parser.add_argument("--group", nargs="+", type=count, default=[4], help="query heads of a KV head")
    parser.add_argument("--head-dim", nargs="+", type=count, default=[128])
    parser.add_argument("--page-size", nargs="+", type=int, choices=PAGE_SIZES, default=[16])
    parser.add_argument("--holes", nargs="+", type=share, default=[0.0], help="share of the pool that no row has")
    parser.add_argument("--order", nargs="+", default=["scattered"], choices=ORDERS, help="of a row's pages")
    parser.add_argument("--dtype", nargs="+", default=["float16"], choices=DTYPES)
    parser.add_argument("--kv-dtype", nargs="+", default=["same"], choices=("same", "int8", "fp8"), help="of the pages")
    parser.add_argument("--splits", nargs="+", type=natural, default=[0], help="parts of a row in split, 0: its choice")
    parser.add_argument("--engines", nargs="+", choices=RUNNERS, default=list(RUNNERS))
    parser.add_argument("--samples", type=count, default=15)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=output, default=f"{OUT_FOLDER}/attention.jsonl")
    arguments = parser.parse_args()
    cases = [dict(zip(SWEPT, values)) for values in itertools.product(*(getattr(arguments, name) for name in SWEPT))]
    for case in cases:
        if case["group"] < 1 or case["query_heads"] % case["group"]:
            parser.error(f"--query-heads {case['query_heads']} are no multiple of --group {case['group']}")
    return status("benchmark_attention", lambda: run(arguments, cases))


def run(arguments: argparse.Namespace, cases: list[dict[str, Any]]) -> None:
    """Measures every case; one that no engine takes is passed over, but not where there is no other."""
    if {"split", "workqueue"} & set(arguments.engines):
        needs("triton")
    bandwidth = read_bandwidth(arguments.device) / 1e9
    records: list[Record] = []
    for case in tqdm(cases, file=sys.stderr):
        try:
            of_case = measure(case, arguments, bandwidth)
        except UsageError as error:
            refused = error
            continue
        except WrongResultError as error:
            raise SystemExit(f"error: {error}") from error
        for record in of_case:
            append_record(arguments.out, record)
        records += of_case
    if not records:
        raise refused
    swept = [name for name in SWEPT if len(getattr(arguments, name)) > 1]
    lines = [
        (" ".join(f"{name} {r[name]}" for name in swept), r["engine"],
         *("-" if r[key] is None else f"{r[key]:,.1f}" for key in ("gpu_us", "gb_s", "percent_of_read")),
         f"{r['wall_ms']:.3f}")
        for r in records
    ]  # fmt: skip
    print(table(("case", "engine", "GPU us", "GB/s", "% of read", "wall ms"), lines), end="\n\n")
    print(json.dumps({"records": len(records), "read_gb_s": bandwidth}))


if __name__ == "__main__":
    raise SystemExit(main())
