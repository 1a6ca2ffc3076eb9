"""The linear layers of a decode step on 1 to 80 rows: our kernels beside cuBLAS, on weights too large to stay in cache.

A case is what one launch of ours covers: q, k and v side by side, gate and up with SwiGLU, an output or down projection
with its residual, the head. For cuBLAS it is the same products alone, without norm, SwiGLU or residual. With adapters
every weight has one of that rank, in float32, and each engine is measured with it too. Every case is first compared
with torch. Times are of CUDA-graph replays, GB/s count the weights. The last line says up to how many of
the rows measured ours are no slower, case by case.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from pkv_hf.arguments import count, needs
from pkv_hf.bench.benchmark import read_bandwidth
from pkv_hf.bench.inputs.shapes import SHAPES
from pkv_hf.bench.results.records import OUT_FOLDER, append_record, environment, output
from pkv_hf.errors import UsageError, status
from pkv_hf.kernels.reference import adapted
from pkv_hf.tables import table

if TYPE_CHECKING:
    from pkv_hf.kernels.products.adapters import Adapter, Adapters

BYTES = 300 << 20
"""Weights of a case are repeated to so many bytes, which no cache holds."""


def cases(shape: dict) -> dict[str, tuple[int, tuple[int, ...]]]:
    hidden, intermediate = shape["hidden_size"], shape["intermediate_size"]
    head_dim = shape.get("head_dim", hidden // shape["num_attention_heads"])
    heads, kv = shape["num_attention_heads"] * head_dim, shape["num_key_value_heads"] * head_dim
    return {
        "qkv": (hidden, (heads, kv, kv)),
        "output": (heads, (hidden,)),
        "gate-up": (hidden, (intermediate, intermediate)),
        "down": (intermediate, (hidden,)),
        "head": (hidden, (shape["vocab_size"],)),
    }


Lora = Sequence[tuple[torch.Tensor, torch.Tensor, float]]
"""An adapter for each weight; empty for none."""


def ours(
    name: str, x: torch.Tensor, weights: list[torch.Tensor], residual: torch.Tensor, adapters: Adapters | None = None
) -> torch.Tensor:
    from pkv_hf.kernels.linear import gated, linear

    if name == "gate-up":
        return gated(x, *weights, adapters=adapters)
    return linear(x, weights, residual=residual if name in ("output", "down") else None, adapters=adapters)


def drawn_adapters(inputs: int, outputs: Sequence[int], rank: int) -> list[Adapter]:
    """One for each weight, on the GPU."""
    from pkv_hf.kernels.products.adapters import Adapter

    shapes = [((rank, inputs), (count, rank)) for count in outputs]
    return [Adapter(*(torch.randn(shape, device="cuda") * shape[1] ** -0.5 for shape in pair), 0.5) for pair in shapes]


def products(x: torch.Tensor, weights: list[torch.Tensor], lora: Lora = ()) -> list[torch.Tensor]:
    """As transformers and PEFT launch them."""
    return [
        adapted(functional.linear(x, weight), x, lora[i : i + 1]) if lora else functional.linear(x, weight)
        for i, weight in enumerate(weights)
    ]


def expected(
    name: str, x: torch.Tensor, weights: list[torch.Tensor], residual: torch.Tensor, lora: Lora
) -> torch.Tensor:
    wide = [(a.double(), b.double(), scaling) for a, b, scaling in lora]
    exact = products(x.double(), [weight.double() for weight in weights], wide)
    if name == "gate-up":
        return functional.silu(exact[0]) * exact[1]
    return exact[0] + residual if name in ("output", "down") else torch.cat(exact, dim=1)


def times_us(calls: list[Callable[[], object]], samples: int = 15) -> np.ndarray:
    """Microseconds of a call, by replays of a graph of all of them: p20, p50, p80."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(calls) * 1e3)
    return np.percentile(times[2:], (20, 50, 80))


def crossings(records: list[dict]) -> dict[str, int]:
    """The most rows up to which ours are never slower than cuBLAS, of those measured; 0 where they are on the first."""
    us = {(r["shape"], r["case"], r["rows"], r["engine"]): r["us_p50"] for r in records}
    most: dict[str, int] = {}
    crossed = set()
    for shape, case, rows, _ in sorted(key for key in us if key[3] == "pkv_hf"):
        name = f"{shape} {case}"
        most.setdefault(name, 0)
        if us[shape, case, rows, "pkv_hf"] > us[shape, case, rows, "cublas"]:
            crossed.add(name)
        elif name not in crossed:
            most[name] = rows
    return most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-3.1-8b", "llama-3.2-1b"], choices=SHAPES)
    parser.add_argument("--rows", nargs="+", type=count, default=[1, 2, 4, 8, 16, 24, 32, 48, 64, 80])
    parser.add_argument("--adapters", type=count, help="measure with adapters of this rank as well")
    parser.add_argument("--out", type=output, default=f"{OUT_FOLDER}/linear.jsonl")
    arguments = parser.parse_args()
    return status("benchmark_linear", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    """Measures every case. Returns 1 where one is wrong."""
    needs("triton")
    from pkv_hf.kernels.products.adapters import Adapters

    if not torch.cuda.is_available():
        raise UsageError("there is no GPU here, and it times kernels of one: run it where torch finds CUDA")
    bandwidth = read_bandwidth("cuda") / 1e9
    records = []
    for shape in arguments.shapes:
        for name, (inputs, outputs) in cases(SHAPES[shape].text).items():
            nbytes = sum(outputs) * inputs * 2
            sets = [
                [torch.randn(count, inputs, device="cuda", dtype=torch.bfloat16) * inputs**-0.5 for count in outputs]
                for _ in range(max(2, -(-BYTES // nbytes)))
            ]
            lora = drawn_adapters(inputs, outputs, arguments.adapters) if arguments.adapters else []
            adapters = Adapters([[adapter] for adapter in lora]) if lora else None
            for rows in arguments.rows:
                x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
                residual = torch.randn(rows, outputs[0], device="cuda", dtype=torch.bfloat16)
                for given, read in ((), None), *([(lora, adapters)] if lora else []):
                    exact = expected(name, x, sets[0], residual, given)
                    off = ours(name, x, sets[0], residual, read) - exact
                    error = off.square().mean().sqrt() / exact.square().mean().sqrt()
                    if not error < 2**-8:
                        print(
                            f"error: {shape} {name} on {rows} rows, {len(given)} adapters, is off by {float(error):.2g}"
                        )
                        return 1
                engines: dict[str, list[Callable[[], object]]] = {
                    "cublas": [functools.partial(products, x, weights) for weights in sets],
                    "pkv_hf": [functools.partial(ours, name, x, weights, residual) for weights in sets],
                }
                if lora:
                    engines["cublas, adapters"] = [functools.partial(products, x, weights, lora) for weights in sets]
                    engines["pkv_hf, adapters"] = [
                        functools.partial(ours, name, x, weights, residual, adapters) for weights in sets
                    ]
                for engine, calls in engines.items():
                    p20, p50, p80 = times_us(calls)
                    record = {
                        "bench": "linear", "shape": shape, "dtype": "bfloat16", "case": name, "rows": rows,
                        "engine": engine, "us_p20": p20, "us_p50": p50, "us_p80": p80, "gb_s": nbytes / p50 / 1e3,
                        "percent_of_floor": 100 * nbytes / p50 / 1e3 / bandwidth, "relative_error": float(error),
                        "rank": arguments.adapters if "adapters" in engine else None,
                        "read_gb_s": bandwidth, **environment(),
                    }  # fmt: skip
                    append_record(arguments.out, record)
                    records.append(record)
            del sets
    header = ("shape", "case", "rows", "engine", "us", "GB/s", "of floor")
    rows_of_table = [
        (r["shape"], r["case"], r["rows"], r["engine"], f"{r['us_p50']:.1f}", f"{r['gb_s']:,.0f}",
         f"{r['percent_of_floor']:.0f} %")
        for r in records
    ]  # fmt: skip
    print(table(header, rows_of_table), end="\n\n")
    print(json.dumps({"records": len(records), "read_gb_s": bandwidth, "ours_up_to_rows": crossings(records)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
