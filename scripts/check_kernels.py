"""Checks the decode kernels against float64 on random cases, and appends one record a route to a results file.

Every case poisons outputs, scratch and unread page slots with NaN. A route passes where its RMS error is at most twice
that of torch's scaled_dot_product_attention in the same dtype, on every case. Where a case fails, nothing is recorded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pkv_hf.kernels.check import DTYPES, ROUTES, Case, Result, measure, random_case
from pkv_hf.records import append_record, environment

BOUND = 2.0


def results_of(task: tuple[Case, str]) -> tuple[Case, dict[str, Result]]:
    case, device = task
    return case, {route: measure(case, route, device) for route in ROUTES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100, help="random cases a dtype")
    parser.add_argument("--longest", type=int, default=131_072, help="tokens of the longest row")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes; most of a case's time is its compilation")
    parser.add_argument("--seed", type=int, default=None, help="drawn afresh where it is not given")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernels.jsonl"))
    arguments = parser.parse_args()
    if arguments.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--device cpu needs Triton's interpreter: set TRITON_INTERPRET=1 (its bfloat16 is not exact)")
    seed = secrets.randbits(32) if arguments.seed is None else arguments.seed
    rng = np.random.default_rng(seed)
    failures = 0
    results: dict[tuple[str, torch.dtype], list[float]] = {(r, dtype): [] for r in ROUTES for dtype in DTYPES}
    tasks = [
        (random_case(rng, int(2 ** rng.uniform(0, np.log2(arguments.longest))), dtype), arguments.device)
        for dtype in DTYPES
        for _ in range(arguments.cases)
    ]
    with contextlib.ExitStack() as stack:
        outcomes: Iterator[tuple[Case, dict[str, Result]]] = map(results_of, tasks)
        if arguments.jobs > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(arguments.jobs))
            outcomes = pool.imap_unordered(results_of, tasks)
        for case, by_route in tqdm(outcomes, total=len(tasks), file=sys.stderr):
            for route, result in by_route.items():
                results[route, case.dtype].append(result.ratio)
                if not result.written or not result.ratio <= BOUND:
                    failures += 1
                    print(f"FAILED {route} {case} {result}")
    if failures:
        print(json.dumps({"passed": False, "seed": seed, "failures": failures}))
        return 1
    records = []
    for (route, dtype), ratios in results.items():
        record = {
            "bench": "kernels",
            "route": route,
            "dtype": str(dtype).removeprefix("torch."),
            "cases": len(ratios),
            "longest": arguments.longest,
            "seed": seed,
            "error_over_sdpa_p50": float(np.median(ratios)),
            "error_over_sdpa_max": max(ratios),
            "bound": BOUND,
            **environment(),
        }
        append_record(arguments.out, record)
        records.append(record)
        print(f"{route:10} {record['dtype']:9} {len(ratios)} cases, error / sdpa's: "
              f"p50 {record['error_over_sdpa_p50']:.3f}, max {record['error_over_sdpa_max']:.3f}")  # fmt: skip
    print(json.dumps({"passed": True, "seed": seed, "worst": max(r["error_over_sdpa_max"] for r in records)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
