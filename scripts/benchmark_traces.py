"""Decode attention over traces by each route, and by an oracle that takes the best route of every step.

A trace is played through a batch of `--max-active` rows; of its steps, `--steps` at even distances are measured: one
call of each layer on pages in random order, planning included. Wall time ends with a synchronisation; GPU time is of
replays of a CUDA graph. The first of those steps is compared with float64 before anything is timed: an error above
2e-3, or 3e-4 in the mean, ends the run and nothing is recorded.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pkv_hf.benchmark import read_bandwidth
from pkv_hf.errors import TraceError
from pkv_hf.kernels.reference import paged_attention
from pkv_hf.kernels.split import decode_split
from pkv_hf.kernels.workqueue import decode_workqueue, make_plan
from pkv_hf.records import append_record, environment
from pkv_hf.tables import table
from pkv_hf.traces import FAMILIES, HELD_OUT_SEEDS, block_tables, decode_steps, load, synthetic

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MAX_ERROR, MEAN_ERROR = 2e-3, 3e-4


class Step:
    """One step of a trace: queries, and pools of every layer that its rows' pages lie in."""

    def __init__(self, lengths: list[int], arguments: argparse.Namespace, rng: np.random.Generator) -> None:
        self.lengths = lengths
        dtype, device = DTYPES[arguments.dtype], arguments.device
        tables, pages = block_tables(lengths, arguments.page_size, arguments.holes, rng)
        shape = (arguments.kv_heads, pages, arguments.page_size, arguments.head_dim)
        pools = [torch.randn(shape, dtype=dtype, device=device).transpose(0, 1) for _ in range(2 * arguments.layers)]
        self.layers = list(zip(pools[::2], pools[1::2]))
        self.table = torch.from_numpy(tables).to(device)
        self.starts = torch.zeros(len(lengths), dtype=torch.int32, device=device)
        self.ends = torch.tensor(lengths, dtype=torch.int32, device=device)
        heads = arguments.kv_heads * arguments.group
        self.q = torch.randn((len(lengths), heads, 1, arguments.head_dim), dtype=dtype, device=device)
        self.scale = arguments.head_dim**-0.5
        self.kv_bytes = sum(lengths) * arguments.kv_heads * arguments.head_dim * 2 * dtype.itemsize

    def split(self) -> list[torch.Tensor]:
        rows = self.table, self.starts, self.ends
        return [decode_split(self.q, *kv, *rows, scale=self.scale, longest=max(self.lengths)) for kv in self.layers]

    def workqueue(self) -> list[torch.Tensor]:
        rows = self.table, self.starts, self.ends
        plan = make_plan(self.q, self.layers[0][0], self.starts, self.ends)
        return [decode_workqueue(self.q, *kv, *rows, plan, scale=self.scale) for kv in self.layers]

    def errors(self, run: Callable[[], list[torch.Tensor]]) -> tuple[float, float]:
        """Largest and mean absolute error of the first layer against float64."""
        exact = paged_attention(
            self.q.double(), *self.layers[0], self.table, self.starts, self.ends, scale=self.scale
        )  # fmt: skip
        error = (run()[0].double() - exact).abs()
        return float(error.max()), float(error.mean())


def wall_ms(run: Callable[[], object], device: str, samples: int) -> float:
    times = []
    for _ in range(samples):
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    return float(np.median(times))


def gpu_us(run: Callable[[], object], samples: int) -> float:
    """Microseconds of all layers, by replays of a graph; the caches are full of something else before each."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(samples):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return float(np.median(times))


def measure(lengths: list[int], arguments: argparse.Namespace, rng: np.random.Generator, check: bool) -> dict:
    """By engine: wall ms, GPU us (nan on a CPU), and the largest error where it was checked (else 0)."""
    step = Step(lengths, arguments, rng)
    found = {}
    for engine, run in (("split", step.split), ("workqueue", step.workqueue)):
        largest = mean = 0.0
        if check:
            largest, mean = step.errors(run)
            if not (largest < MAX_ERROR and mean < MEAN_ERROR):
                raise SystemExit(f"error: {engine} is off by {largest:.2g} (mean {mean:.2g}) on rows of {lengths}")
        run()
        wall = wall_ms(run, arguments.device, arguments.samples)
        gpu = gpu_us(run, arguments.samples) if arguments.device == "cuda" else float("nan")
        found[engine] = {"wall_ms": wall, "gpu_us": gpu, "error": largest}
    found["oracle"] = {
        key: min(found[engine][key] for engine in ("split", "workqueue")) for key in ("wall_ms", "gpu_us", "error")
    }
    return {"rows": len(lengths), "kv_bytes": step.kv_bytes, "engines": found}


def records_of(name: str, seed: int | None, arguments: argparse.Namespace, bandwidth: float) -> list[dict]:
    requests = load(arguments.trace_file) if seed is None else synthetic(name, arguments.requests, seed)
    steps = list(decode_steps(requests, arguments.max_active))
    chosen = [steps[i] for i in np.linspace(0, len(steps) - 1, min(arguments.steps, len(steps))).astype(int)]
    rng = np.random.default_rng(seed)
    progress = tqdm(chosen, desc=f"{name} {seed or ''}", file=sys.stderr)
    results = [measure(lengths, arguments, rng, check=index == 0) for index, lengths in enumerate(progress)]
    records = []
    for engine in results[0]["engines"]:
        of_engine = [result["engines"][engine] for result in results]
        walls, gpus = ([r[key] for r in of_engine] for key in ("wall_ms", "gpu_us"))
        kv_bytes = arguments.layers * sum(result["kv_bytes"] for result in results)
        records.append({
            "bench": "traces", "trace": name, "seed": seed, "max_active": arguments.max_active,
            "group": arguments.group, "kv_heads": arguments.kv_heads, "head_dim": arguments.head_dim,
            "page_size": arguments.page_size,
            "holes": arguments.holes, "dtype": arguments.dtype, "layers": arguments.layers, "engine": engine,
            "graph": arguments.device == "cuda", "steps": len(results),
            "gpu_us_p50": None if arguments.device == "cpu" else float(np.median(gpus)),
            "wall_ms_p50": float(np.median(walls)), "wall_ms_p95": float(np.percentile(walls, 95)),
            "wall_ms_p99": float(np.percentile(walls, 99)),
            "tokens_per_s_wall": sum(result["rows"] for result in results) * 1e3 / sum(walls),
            "gb_s": None if arguments.device == "cpu" else kv_bytes / sum(gpus) / 1e3,
            "read_gb_s": bandwidth, "max_abs_err": max(r["error"] for r in of_engine), **environment(),
        })  # fmt: skip
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--trace-file", type=Path, help="CSV or JSON of requests, instead of --traces")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(HELD_OUT_SEEDS))
    parser.add_argument("--requests", type=int, default=64, help="requests of a synthetic trace")
    parser.add_argument("--max-active", type=int, default=8)
    parser.add_argument("--steps", type=int, default=24, help="steps of a trace that are measured")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4, help="query heads of a KV head")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--holes", type=float, default=0.0, help="share of the pool's pages that no row has")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/traces.jsonl"))
    arguments = parser.parse_args()
    cases: list[tuple[str, int | None]] = [(name, seed) for name in arguments.traces for seed in arguments.seeds]
    if arguments.trace_file:
        cases = [(arguments.trace_file.stem, None)]
    bandwidth = read_bandwidth(arguments.device) / 1e9
    try:
        records = [record for name, seed in cases for record in records_of(name, seed, arguments, bandwidth)]
    except TraceError as error:
        parser.error(str(error))
    for record in records:
        append_record(arguments.out, record)
    header = ("trace", "seed", "engine", "GPU us", "GB/s", "wall ms", "tokens/s", "largest error")
    rows = [
        (r["trace"], r["seed"], r["engine"],
         *("-" if r[key] is None else f"{r[key]:,.1f}" for key in ("gpu_us_p50", "gb_s")),
         f"{r['wall_ms_p50']:.3f}", f"{r['tokens_per_s_wall']:,.0f}", f"{r['max_abs_err']:.1e}")
        for r in records
    ]  # fmt: skip
    print(table(header, rows), end="\n\n")
    print(json.dumps({"records": len(records), "read_gb_s": bandwidth}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
