"""Checks the decode kernels against float64 on random cases, and appends one record a route to a results file.

Every case poisons outputs and scratch with NaN, unread page slots with NaN or infinity. A route passes where its RMS
error is at most twice that of torch's scaled_dot_product_attention in the same dtype, on every case. Where a case
fails, nothing is recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys

import numpy as np
import torch
from tqdm import tqdm

from pkv_hf.arguments import count, device, natural, needs
from pkv_hf.bench.results.records import OUT_FOLDER, append_record, environment, output
from pkv_hf.errors import UsageError, status
from pkv_hf.kernels.checks.attention import DTYPES, ROUTES
from pkv_hf.kernels.checks.fuzz import BOUND, batches, fuzz


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=count, default=100, help="random cases a dtype")
    parser.add_argument("--longest", type=count, default=131_072, help="tokens of the longest row")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=count, default=1, help="processes; most of a case's time is its compilation")
    parser.add_argument("--seed", type=natural, default=None, help="drawn afresh where it is not given")
    parser.add_argument("--out", type=output, default=f"{OUT_FOLDER}/kernels.jsonl")
    arguments = parser.parse_args()
    return status("check_kernels", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    """Checks every case. Returns 1 where one fails."""
    needs("triton")
    if arguments.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UsageError("--device cpu needs Triton's interpreter: set TRITON_INTERPRET=1 (its bfloat16 is not exact)")
    seed = secrets.randbits(32) if arguments.seed is None else arguments.seed
    made = batches(np.random.default_rng(seed), len(DTYPES) * arguments.cases, 1, arguments.longest, DTYPES)
    failures = 0
    results: dict[tuple[str, torch.dtype], list[float]] = {(r, dtype): [] for r in ROUTES for dtype in DTYPES}
    for outcomes in tqdm(fuzz(made, arguments.device, arguments.jobs), total=len(made), file=sys.stderr):
        for outcome in outcomes:
            for route, result in outcome.results.items():
                results[route, outcome.case.dtype].append(result.ratio)
            for route in outcome.failed:
                failures += 1
                print(f"FAILED {route} {outcome.case} {outcome.results[route]}")
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
