"""The experts of a mixture's layer in a decode step: our kernels, cut in several ways, beside transformers' own.

A case is a shape and a number of rows, whose experts are drawn evenly, anew for each call: weights come from memory.
transformers' are `batched_mm`, which gathers the chosen experts' weights into a copy, and `grouped_mm`; its loop over
experts waits for the device and cannot be replayed. Every candidate is first compared with float64. Times are of
CUDA-graph replays, GB/s count the weights of the experts that any row chose once. The last line names the fastest.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from benchmark_linear import times_us

from pkv_hf.arguments import count, needs
from pkv_hf.bench.benchmark import read_bandwidth
from pkv_hf.bench.inputs.shapes import SHAPES
from pkv_hf.bench.results.records import OUT_FOLDER, append_record, environment, output
from pkv_hf.compat import decoder_of
from pkv_hf.errors import UsageError, first_line, status
from pkv_hf.patches.experts.described import holds_experts, stacked
from pkv_hf.patches.experts.served import Believed
from pkv_hf.tables import table

if TYPE_CHECKING:
    from pkv_hf.kernels.experts.blocks import Block
    from pkv_hf.kernels.experts.reference import Stacked

MIXTURES = ("qwen3-30b-a3b", "gpt-oss-20b", "mixtral-8x7b")
OWN = ("batched_mm", "grouped_mm")
ERROR = 2**-6
"""Of a result, relative: what lies between the products is rounded."""

DRAWS = 12
"""Calls of a case, each with rows and choices of its own."""

Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""x, index, weights."""


def candidates(rows: int, transposed: bool) -> Iterator[Block]:
    """Ways to cut a product's launch."""
    from pkv_hf.kernels.experts.blocks import Block

    if rows == 1 and transposed:
        for outputs in (32, 64, 128):
            for inputs, stages in ((32, 4), (64, 3), (64, 4), (128, 3)):
                yield Block(outputs, inputs, stages)
    elif rows == 1:
        for outputs in (4, 8, 16):
            for inputs, stages in ((256, 3), (256, 5), (512, 1), (512, 3), (1024, 2)):
                yield Block(outputs, inputs, stages)
    else:
        for outputs in (32, 64, 128):
            for inputs, stages in ((64, 4), (64, 6), (128, 3), (128, 4)):
                yield Block(outputs, inputs, stages)


def cuts(rows: int, of: Stacked) -> Iterator[tuple[str, tuple[Block, Block] | None]]:
    """What is measured of ours, by name: as it is by itself, and either product cut in another way."""
    from pkv_hf.kernels.experts.experts import choose_blocks

    yield "pkv_hf", None
    up, down = choose_blocks(rows, of, of.up.device)
    for block in candidates(rows, of.form.transposed):
        named = f"{block.outputs}x{block.inputs}x{block.num_stages}"
        yield f"pkv_hf, up {named}", (block, down)
        yield f"pkv_hf, down {named}", (up, block)


def draws(rows: int, choices: int, of: Stacked) -> list[Call]:
    """Calls of a case: what a router gives."""
    device, experts = of.up.device, len(of.up)
    return [
        (
            torch.randn(rows, of.hidden, device=device, dtype=of.up.dtype),
            torch.rand(rows, experts, device=device).argsort(1)[:, :choices].contiguous(),
            torch.rand(rows, choices, device=device).softmax(1).to(of.up.dtype),
        )
        for _ in range(DRAWS)
    ]


def read_bytes(calls: list[Call], of: Stacked) -> float:
    """Bytes of weights that a call reads, on average."""
    of_expert = sum(stack[0].nbytes for stack in of.tensors if stack is not None)
    return of_expert * sum(index.unique().numel() for _, index, _ in calls) / len(calls)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(MIXTURES), choices=MIXTURES)
    parser.add_argument("--rows", nargs="+", type=count, default=[1, 8, 32])
    parser.add_argument("--sweep", action="store_true", help="measure launches that are cut in other ways as well")
    parser.add_argument("--out", type=output, default=f"{OUT_FOLDER}/experts.jsonl")
    arguments = parser.parse_args()
    return status("benchmark_experts", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    """Measures every case. Returns 1 where ours is wrong as it is by itself."""
    needs("triton")
    if not torch.cuda.is_available():
        raise UsageError("there is no GPU here, and it times kernels of one: run it where torch finds CUDA")
    bandwidth = read_bandwidth("cuda") / 1e9
    records: list[dict[str, Any]] = []
    for shape in arguments.shapes:
        model = SHAPES[shape].build(torch.bfloat16, "cuda", num_hidden_layers=1)
        decoder = decoder_of(model)
        module: Any = next(each for each in decoder.modules() if holds_experts(each))
        with torch.no_grad():
            mixtures = Believed()(decoder)
        if module not in mixtures.forms:
            raise UsageError(f"{shape}: {', '.join(mixtures.own)}")
        of = stacked(module, mixtures.forms[module])
        for rows in arguments.rows:
            found = measured(shape, module, of, draws(rows, model.config.num_experts_per_tok, of), arguments.sweep)
            if found is None:
                return 1
            for record in found:
                record |= {
                    "percent_of_floor": 100 * record["gb_s"] / bandwidth,
                    "read_gb_s": bandwidth,
                    **environment(),
                }
                append_record(arguments.out, record)
            records += found
        del model, decoder, module, of, mixtures
    rows_of_table = [
        (
            r["shape"],
            r["rows"],
            r["engine"],
            f"{r['us_p50']:.1f}",
            f"{r['gb_s']:,.0f}",
            f"{r['percent_of_floor']:.0f} %",
        )
        for r in records
    ]
    print(table(("shape", "rows", "engine", "us", "GB/s", "of floor"), rows_of_table), end="\n\n")
    best: dict[str, str] = {}
    for record in sorted(records, key=lambda each: each["us_p50"]):
        best.setdefault(f"{record['shape']} {record['rows']}", record["engine"])
    print(json.dumps({"records": len(records), "read_gb_s": bandwidth, "fastest": best}))
    return 0


@torch.no_grad()
def measured(shape: str, module: Any, of: Stacked, calls: list[Call], sweep: bool) -> list[dict[str, Any]] | None:
    """The records of a case, without what is the device's; None where ours is wrong."""
    from pkv_hf.kernels.experts.experts import experts
    from pkv_hf.kernels.experts.reference import experts as in_torch

    rows, nbytes = len(calls[0][0]), read_bytes(calls, of)
    exact = in_torch(calls[0][0].double(), *calls[0][1:], of)
    engines: dict[str, Callable[..., torch.Tensor]] = {}
    for name, blocks in cuts(rows, of) if sweep else [("pkv_hf", None)]:
        engines[name] = functools.partial(experts, of=of, blocks=blocks)
    for name in OWN:
        engines[name] = functools.partial(own, module, name)
    records = []
    for name, engine in engines.items():
        try:
            error = float((engine(*calls[0]) - exact).square().mean().sqrt() / exact.square().mean().sqrt())
            if not error < ERROR:
                print(f"error: {shape} on {rows} rows by {name} is off by {error:.2g}")
                if name == "pkv_hf":
                    return None
                continue
            p20, p50, p80 = times_us([functools.partial(engine, *call) for call in calls])
        except Exception as failed:  # of a block that does not fit, of a product that transformers cannot capture
            print(f"error: {shape} on {rows} rows by {name}: {type(failed).__name__}: {first_line(failed)}")
            if name == "pkv_hf":
                return None
            continue
        records.append({
            "bench": "experts", "shape": shape, "dtype": "bfloat16", "rows": rows, "choices": calls[0][1].shape[1],
            "engine": name, "us_p20": p20, "us_p50": p50, "us_p80": p80, "bytes": nbytes, "gb_s": nbytes / p50 / 1e3,
            "relative_error": error,
        })  # fmt: skip
    return records


def own(module: Any, implementation: str, *call: torch.Tensor) -> torch.Tensor:
    """transformers' forward of the module, by one of its implementations."""
    module.config._experts_implementation = implementation
    output: torch.Tensor = module(*call)
    return output


if __name__ == "__main__":
    raise SystemExit(main())
