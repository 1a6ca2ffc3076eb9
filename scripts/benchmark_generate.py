"""Decode speed of model.generate() with and without pages, and the time that a step's bytes need at least.

The floor of a step is (weights that it reads + live K and V) / read bandwidth, the bandwidth measured in the same run.
Every engine is measured on its second call of a case; its first, with what it compiles and captures, is `setup_s`.
`dynamic-cold` is the first call of `dynamic`: a growing cache asks for new sizes at each step, which are slow until the
allocator holds blocks of them.
Tokens are compared with transformers' own first: in float32 a difference is an error, and nothing is recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from pkv_hf import benchmark
from pkv_hf.arguments import count, device
from pkv_hf.measure import generate
from pkv_hf.models import DTYPES
from pkv_hf.records import append_record, environment, output
from pkv_hf.tables import table

COLD = "dynamic-cold"


def measure(model: Any, inputs: dict[str, torch.Tensor], new_tokens: int, engine: str) -> benchmark.Summary:
    if engine != COLD:
        return benchmark.measure(model, inputs, new_tokens, engine)
    started = time.perf_counter()
    run = generate(model, inputs, new_tokens)
    return benchmark.Summary(run, time.perf_counter() - started, None)


def case_of(text: str) -> list[int]:
    return [count(length) for length in text.split(",")]


def kernels_are_cached() -> bool:
    """Whether an earlier process has left compiled kernels in Triton's cache."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    return folder.is_dir() and any(folder.iterdir())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help=f"smollm2, {', '.join(benchmark.SHAPES)}, hub id or folder")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=case_of,
        default=[[1024]],
        metavar="N[,N...]",
        help="cases: the prompt length of each row",
    )
    parser.add_argument("--new-tokens", type=count, default=64, metavar="N")
    parser.add_argument("--engines", nargs="+", default=["dynamic", "patched"], choices=[COLD, *benchmark.ENGINES])
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=output, default=Path("benchmarks/results/generate.jsonl"))
    arguments = parser.parse_args()
    cases = arguments.lengths
    engines = [COLD] if COLD in arguments.engines else []  # it is cold only before the others
    engines += ["dynamic", *(engine for engine in arguments.engines if engine not in (COLD, "dynamic"))]
    if arguments.new_tokens <= benchmark.WARM_STEPS + 1:
        parser.error(f"--new-tokens {arguments.new_tokens}: pass more than {benchmark.WARM_STEPS + 1}")
    transformers.utils.logging.set_verbosity_error()
    compiled_before = kernels_are_cached()
    bandwidth = benchmark.read_bandwidth(arguments.device)
    model = benchmark.load(arguments.model, DTYPES[arguments.dtype], arguments.device)
    records = []
    for lengths in cases:
        inputs = benchmark.prompts(arguments.model, model, lengths)
        floor_ms = benchmark.step_bytes(model, lengths, arguments.new_tokens) / bandwidth * 1e3
        expected = None
        for engine in engines:
            print(f"{lengths} {engine} ...", file=sys.stderr)
            summary = measure(model, inputs, arguments.new_tokens, engine)
            expected = summary.run.sequences if expected is None else expected
            match = torch.equal(summary.run.sequences, expected)
            if not match and arguments.dtype == "float32":
                print(f"error: {engine} gave other tokens than transformers on {lengths}", file=sys.stderr)
                return 1
            p20, p50, p80 = summary.percentiles_ms()
            record = {
                "bench": "generate",
                "model": arguments.model,
                "dtype": arguments.dtype,
                "batch": len(lengths),
                "lengths": lengths,
                "new_tokens": arguments.new_tokens,
                "engine": engine,
                "route": summary.route,
                "step_ms_p20": p20,
                "step_ms_p50": p50,
                "step_ms_p80": p80,
                "floor_ms": floor_ms,
                "percent_of_floor": 100 * floor_ms / p50,
                "tokens_per_s": len(lengths) * 1e3 / p50,
                "first_token_ms": summary.run.first_token_s * 1e3,
                "peak_gib": summary.run.peak_bytes / 2**30,
                "kv_bytes": summary.run.kv_bytes,
                "setup_s": summary.setup_s,
                "triton_cache": "warm" if compiled_before else "empty",
                "tokens_match": match,
                "read_gb_s": bandwidth / 1e9,
                **environment(),
            }
            append_record(arguments.out, record)
            records.append(record)
    header = ("case", "engine", "p20 ms", "p50 ms", "p80 ms", "floor ms", "of floor", "tokens/s", "first ms",
              "peak GiB", "setup s", "KV MiB", "tokens match")  # fmt: skip
    rows = [
        (f"{r['batch']} x {max(r['lengths']):,}", r["engine"], f"{r['step_ms_p20']:.2f}", f"{r['step_ms_p50']:.2f}",
         f"{r['step_ms_p80']:.2f}", f"{r['floor_ms']:.2f}", f"{r['percent_of_floor']:.0f} %",
         f"{r['tokens_per_s']:,.0f}", f"{r['first_token_ms']:,.0f}", f"{r['peak_gib']:.1f}", f"{r['setup_s']:.1f}",
         f"{r['kv_bytes'] / 2**20:,.1f}", r["tokens_match"])
        for r in records
    ]  # fmt: skip
    print(table(header, rows), end="\n\n")
    best = {engine: [r["step_ms_p50"] for r in records if r["engine"] == engine] for engine in engines}
    print(json.dumps({"model": arguments.model, "records": len(records), "step_ms_p50": best}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
