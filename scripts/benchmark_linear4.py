"""Linear layers with 4-bit weights in a decode step: our kernels, cut in several ways, beside those of libraries.

A case is what one launch of ours covers: q, k and v side by side, gate and up with SwiGLU, an output or down projection
with its residual. For bitsandbytes it is the same products alone, by `matmul_4bit`, and for one row by `gemv_4bit` too;
for int4 those of torch's tinygemm, whose tiles ours read.
Weights are too large to stay in cache. Every candidate is first compared with float64. Times are of CUDA-graph replays,
GB/s count the weights and scales as they are stored. The last line names the fastest of each case.
"""

from __future__ import annotations

import argparse
import functools
import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmark_linear import BYTES, cases, times_us
from torch.nn import functional

from pkv_hf.arguments import count, needs
from pkv_hf.bench.benchmark import read_bandwidth
from pkv_hf.bench.inputs.shapes import SHAPES
from pkv_hf.bench.results.records import OUT_FOLDER, append_record, environment, output
from pkv_hf.errors import UsageError, first_line, status
from pkv_hf.tables import table

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
INPUTS = 128
"""Of one scale of int4."""
ERROR = 2**-6
"""Of a result, relative: values and scales are rounded before they are multiplied."""


def candidates(rows: int, weights: int, layout: str) -> Iterator[Any]:
    """Ways to cut a launch; None is how it is cut by itself."""
    from pkv_hf.kernels.quantized.blocks import OF_WARP, Block4

    yield None
    if rows == 1 and layout == "bytes":
        for outputs in (2, 4, 8, 16):
            for warps in (1, 2, 4, 8):
                yield Block4(outputs, OF_WARP * warps, 1, "threads", num_warps=warps)
        return
    for inputs, stages in ((128, 3), (128, 4), (256, 2), (256, 3), (256, 4), (512, 2)):
        for parts in (1, 2, 4) if weights == 1 and rows > 1 else (1,):
            yield Block4(64, inputs, stages, "weights", parts=parts)
    for outputs, warps in ((32, 2), (16, 1), (128, 8)):
        yield Block4(outputs, 256, 3, "weights", num_warps=warps)
    if rows <= 8:
        yield Block4(64, 256, 3, "columns")
    if rows == 1:
        yield Block4(4, 2048, 1, "sums")
        yield Block4(8, 1024, 1, "sums")


def quantised(weight: torch.Tensor, arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """A weight by a library: its bytes, its state or scales, and both as our kernels take them."""
    if arguments.weights == "int4":
        return tiled(weight)
    from bitsandbytes import functional as library

    from pkv_hf.kernels.quantized.weights import Nested, Weight4

    packed, state = library.quantize_4bit(weight, compress_statistics=arguments.nested, quant_type=arguments.weights)
    nested = Nested(state.state2.code, state.state2.absmax, state.offset) if arguments.nested else None
    ours = Weight4(packed, state.absmax, *weight.shape, state.blocksize, arguments.weights, nested)
    return packed, state, ours


def tiled(weight: torch.Tensor) -> tuple[Any, Any, Any]:
    """A bfloat16 weight in tinygemm's tiles, a scale and what is added for 128 inputs each."""
    from pkv_hf.kernels.quantized.weights import PADDED, Int4

    outputs, inputs = weight.shape
    padded = functional.pad(weight.float(), (0, -inputs % PADDED)).unflatten(1, (-1, INPUTS))
    low, high = padded.amin(2, keepdim=True), padded.amax(2, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-6).to(weight.dtype)
    values = ((padded - low) / scale).round().clamp(0, 15).to(torch.int32).flatten(1)
    packed = torch.ops.aten._convert_weight_to_int4pack((values[:, ::2] << 4 | values[:, 1::2]).to(torch.uint8), 8)
    pairs = torch.cat([scale, (low + 8 * scale).to(weight.dtype)], 2).transpose(0, 1).contiguous()
    return packed, pairs, Int4(packed, pairs, None, outputs, inputs, INPUTS, "uint4", "tiles", "pairs")


def ours(name: str, x: torch.Tensor, weights: list[Any], residual: torch.Tensor, block: Any) -> torch.Tensor:
    from pkv_hf.kernels.quantized.linear4 import gated4, linear4

    if name == "gate-up":
        return gated4(x, *(weight for *_, weight in weights), block=block)
    residual_ = residual if name in ("output", "down") else None
    return linear4(x, [weight for *_, weight in weights], residual=residual_, block=block)


def theirs(call: str, x: torch.Tensor, weights: list[Any]) -> list[torch.Tensor]:
    if call == "tinygemm":
        padded = functional.pad(x, (0, 128 * weights[0][0].shape[1] - x.shape[1]))
        return [torch.ops.aten._weight_int4pack_mm(padded, packed, INPUTS, pairs) for packed, pairs, _ in weights]
    import bitsandbytes

    if call == "gemv_4bit":
        return [bitsandbytes.functional.gemv_4bit(x, packed, state=state) for packed, state, _ in weights]
    return [bitsandbytes.matmul_4bit(x, packed, state) for packed, state, _ in weights]


def expected(name: str, x: torch.Tensor, weights: list[Any], residual: torch.Tensor) -> torch.Tensor:
    from pkv_hf.kernels.quantized.weights import dequantized

    exact = [functional.linear(x.double(), dequantized(weight, torch.float64)) for *_, weight in weights]
    if name == "gate-up":
        return functional.silu(exact[0]) * exact[1]
    return exact[0] + residual if name in ("output", "down") else torch.cat(exact, dim=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-3.1-8b"], choices=SHAPES)
    parser.add_argument("--rows", nargs="+", type=count, default=[1, 4, 16, 64])
    parser.add_argument("--weights", default="nf4", choices=("nf4", "fp4", "int4"))
    parser.add_argument("--nested", action="store_true", help="scales of 8 bits, with second scales")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--out", type=output, default=f"{OUT_FOLDER}/linear4.jsonl")
    arguments = parser.parse_args()
    return status("benchmark_linear4", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    """Measures every case. Returns 1 where one is wrong."""
    needs("triton")
    int4 = arguments.weights == "int4"
    needs(*["bitsandbytes"] * (not int4))
    if int4 and (arguments.dtype != "bf16" or arguments.nested):
        raise UsageError("--weights int4 are of bf16 and not nested: leave out --dtype and --nested")
    if not torch.cuda.is_available():
        raise UsageError("there is no GPU here, and it times kernels of one: run it where torch finds CUDA")
    warnings.filterwarnings("ignore")
    bandwidth, dtype = read_bandwidth("cuda") / 1e9, DTYPES[arguments.dtype]
    records: list[dict[str, Any]] = []
    wrong = 0
    for shape in arguments.shapes:
        for name, (inputs, outputs) in cases(SHAPES[shape].text).items():
            if name == "head":  # which bitsandbytes leaves as it is
                continue
            nbytes = sum(outputs) * inputs * 9 // 16
            sets = [
                [
                    quantised(torch.randn(each, inputs, device="cuda", dtype=dtype) * inputs**-0.5, arguments)
                    for each in outputs
                ]
                for _ in range(max(2, -(-BYTES // nbytes)))
            ]
            nbytes = sum(weight.nbytes for *_, weight in sets[0])
            for rows in arguments.rows:
                x = torch.randn(rows, inputs, device="cuda", dtype=dtype)
                residual = torch.randn(rows, outputs[0], device="cuda", dtype=dtype)
                exact = expected(name, x, sets[0], residual)
                engines: dict[str, list[Callable[[], object]]] = {
                    call: [functools.partial(theirs, call, x, weights) for weights in sets]
                    for call in (["tinygemm"] if int4 else ["matmul_4bit", *["gemv_4bit"] * (rows == 1)])
                }
                for block in candidates(rows, len(outputs), sets[0][0][2].layout):
                    engine = "pkv_hf" if block is None else f"pkv_hf {block}"
                    try:
                        difference = ours(name, x, sets[0], residual, block) - exact
                    except Exception as failure:  # of a candidate that a GPU has too little memory for
                        print(f"left out: {shape} {name} on {rows} rows by {block}: {first_line(failure)}")
                        continue
                    error = float(difference.square().mean().sqrt() / exact.square().mean().sqrt())
                    if not error < ERROR:
                        print(f"error: {shape} {name} on {rows} rows by {block} is off by {error:.2g}")
                        wrong += 1
                        continue
                    engines[engine] = [functools.partial(ours, name, x, weights, residual, block) for weights in sets]
                for engine, calls in engines.items():
                    p20, p50, p80 = times_us(calls)
                    records.append({
                        "bench": "linear4", "shape": shape, "dtype": arguments.dtype, "weights": arguments.weights,
                        "nested": arguments.nested, "case": name, "rows": rows, "engine": engine, "us_p20": p20,
                        "us_p50": p50, "us_p80": p80, "gb_s": nbytes / p50 / 1e3, "read_gb_s": bandwidth,
                        "percent_of_floor": 100 * nbytes / p50 / 1e3 / bandwidth, **environment(),
                    })  # fmt: skip
                    append_record(arguments.out, records[-1])
            del sets
    header = ("shape", "case", "rows", "engine", "us", "GB/s", "of floor")
    lines = [
        (r["shape"], r["case"], r["rows"], r["engine"], f"{r['us_p50']:.1f}", f"{r['gb_s']:,.0f}",
         f"{r['percent_of_floor']:.0f} %")
        for r in records
    ]  # fmt: skip
    print(table(header, lines), end="\n\n")
    fastest: dict[str, tuple[float, str]] = {}
    for r in records:
        key = f"{r['shape']} {r['case']} {r['rows']}"
        fastest[key] = min(fastest.get(key, (r["us_p50"], r["engine"])), (r["us_p50"], r["engine"]))
    print(json.dumps({"records": len(records), "wrong": wrong, "read_gb_s": bandwidth, "fastest": fastest}))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
