"""Decode speed of model.generate() with and without pages, and the time that a step's bytes need at least.

The floor of a step is (weights that it reads + live K and V + states, `bench/floor.py`) / read bandwidth, the bandwidth
measured in the same run.
Every engine is measured on its second call of a case; its first, with what it compiles and captures, is `setup_s`.
`dynamic-cold` is the first call of `dynamic`: a growing cache asks for new sizes at each step, which are slow until the
allocator holds blocks of them.
Tokens are compared with transformers' own first: in float32 a difference is an error, and nothing is recorded.
`logit error` is how far the logits of an engine's first decode step are from those of wider arithmetic (float32; for a
float32 model float64): the root mean square of the difference, relative. It says what other tokens are worth. In half
precision a patched engine's may be twice that of transformers' default cache in the same run: more is an error.
An engine of transformers that raises is recorded with its error.

`--weights` and `--lora` are measured beside transformers' own kernels and the library's: `dynamic`, and in our graphs
`patched-no-fuse`.

`--mode beams` times the steps of beam search; the floor reads the prompt, which the beams share, once.
`--mode assisted` times rounds: `--assistant` drafts `--draft-tokens` tokens one by one, then the model verifies them in
one step. The time of a round hardly depends on how many of them were right; "tokens a step" says how many came of it.
Random weights agree on next to none: with a draft of your own, divide the time of a round by the tokens that it gets
right and one more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pkv_hf.arguments import count, device
from pkv_hf.bench import benchmark, logits
from pkv_hf.bench.compare import check_patchable
from pkv_hf.bench.floor import Floor
from pkv_hf.bench.inputs.models import DTYPES, quieten
from pkv_hf.bench.inputs.shapes import SHAPES
from pkv_hf.bench.inputs.weights import WEIGHTS
from pkv_hf.bench.measure import run_generate
from pkv_hf.bench.results.records import OUT_FOLDER, append_record, environment, output
from pkv_hf.errors import first_line, status
from pkv_hf.tables import table

COLD = "dynamic-cold"


def measure(
    model: Any, inputs: dict[str, torch.Tensor], new_tokens: int, engine: str, mode: dict[str, Any]
) -> benchmark.Summary:
    if engine != COLD:
        judged = not mode and logits.can_be_judged(model, inputs["attention_mask"])
        return benchmark.measure(model, inputs, new_tokens, engine, judged, **mode)
    started = time.perf_counter()
    run = run_generate(model, inputs, new_tokens, **mode)
    return benchmark.Summary(run, time.perf_counter() - started, benchmark.UNPATCHED)


def case_of(text: str) -> list[int]:
    return [count(length) for length in text.split(",")]


def kernels_are_cached() -> bool:
    """Whether an earlier process has left compiled kernels in Triton's cache."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    return folder.is_dir() and any(folder.iterdir())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help=f"smollm2, {', '.join(SHAPES)}, hub id or folder")
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
    parser.add_argument("--mode", default="greedy", choices=("greedy", "beams", "assisted"))
    parser.add_argument("--num-beams", type=count, default=4, metavar="N", help="of --mode beams")
    parser.add_argument("--assistant", help="the model that drafts in --mode assisted, named as --model is")
    parser.add_argument("--draft-tokens", type=count, default=5, metavar="N", help="of a round of --mode assisted")
    parser.add_argument("--engines", nargs="+", default=["dynamic", "patched"], choices=[COLD, *benchmark.ENGINES])
    parser.add_argument("--weights", choices=WEIGHTS, help="by bitsandbytes, or by torchao (int4), but for the head")
    parser.add_argument(
        "--lora", type=count, metavar="RANK", help="random adapters of this rank around all linear layers but the head"
    )
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=output, default=f"{OUT_FOLDER}/generate.jsonl")
    arguments = parser.parse_args()
    cases = arguments.lengths
    engines = [COLD] if COLD in arguments.engines else []  # it is cold only before the others
    engines += ["dynamic", *(engine for engine in arguments.engines if engine not in (COLD, "dynamic"))]
    beams = arguments.num_beams if arguments.mode == "beams" else 1
    drafted = arguments.draft_tokens if arguments.mode == "assisted" else 0
    least = (benchmark.WARM_STEPS + 1) * (drafted + 1)
    if arguments.new_tokens <= least:
        parser.error(f"--new-tokens {arguments.new_tokens}: pass more than {least}")
    if arguments.mode == "beams" and beams < 2:
        parser.error(f"--num-beams {beams}: pass 2 or more")
    if arguments.mode == "assisted":
        if arguments.assistant is None or drafted < 1:
            parser.error("--mode assisted: pass --assistant, and 1 or more --draft-tokens")
        if max(len(lengths) for lengths in cases) > 1 or "static-compile" in engines:
            parser.error("--mode assisted: transformers takes one row, and no static cache")
    return status("benchmark_generate", lambda: run(arguments, engines, beams, drafted))


def run(arguments: argparse.Namespace, engines: list[str], beams: int, drafted: int) -> int:
    """Measures every case by every engine. Returns 1 where one gives other tokens or logits than it may."""
    quieten()
    triton_cache = "warm" if kernels_are_cached() else "empty"
    dtype = DTYPES[arguments.dtype]
    model = benchmark.load(arguments.model, dtype, arguments.device, arguments.weights, arguments.lora)
    used = [model]
    mode: dict[str, Any] = {"num_beams": beams} if beams > 1 else {}
    if drafted:
        used.append(benchmark.load_draft(arguments.assistant, drafted, dtype, model))
        mode = {"assistant_model": used[-1]}
    for each in used:
        benchmark.check_lengths(each, arguments.lengths, arguments.new_tokens)
        if any(engine.startswith("patched") for engine in engines):
            check_patchable(each)
    bandwidth = benchmark.read_bandwidth(arguments.device)
    of_run = {
        "bench": "generate",
        "mode": arguments.mode,
        "num_beams": beams,
        "assistant": arguments.assistant if drafted else None,
        "draft_tokens": drafted,
        "model": arguments.model,
        "dtype": arguments.dtype,
        "weights": arguments.weights,
        "adapter": f"lora-r{arguments.lora}" if arguments.lora else None,
        "new_tokens": arguments.new_tokens,
        "triton_cache": triton_cache,
        "read_gb_s": bandwidth / 1e9,
        **environment(),
    }
    records: list[dict[str, Any]] = []
    wrong = False
    for lengths in arguments.lengths:
        floor = Floor.of(model, lengths, arguments.new_tokens, beams)
        drafts = drafted * Floor.of(used[-1], lengths, arguments.new_tokens).total if drafted else 0
        of_case = {
            "weight_bytes": floor.weights,
            "batch": len(lengths),
            "lengths": lengths,
            "floor_ms": (floor.total + drafts) / bandwidth * 1e3,
            "floor_bytes": {**asdict(floor), "drafts": drafts},
        }
        for record in by_engine(arguments, model, lengths, engines, mode):
            if "step_ms_p50" in record:
                rate = len(lengths) * record["tokens_per_step"] * 1e3 / record["step_ms_p50"]
                share = 100 * of_case["floor_ms"] / record["step_ms_p50"]
                record |= {"tokens_per_s": rate, "percent_of_floor": share}
            if record["tokens_match"] is False and arguments.dtype == "float32":
                print(f"error: {record['engine']} gave other tokens than transformers on {lengths}", file=sys.stderr)
                return 1
            if record["logits_right"] is False:
                print(f"error: {record['engine']}: logit error {record['logit_error']:.1e} on {lengths} is more than "
                      "twice that of transformers", file=sys.stderr)  # fmt: skip
                wrong = True
            append_record(arguments.out, {**of_run, **of_case, **record})
            records.append({**of_case, **record})
    show(records)
    ran = [record for record in records if "error" not in record]
    best = {engine: [r["step_ms_p50"] for r in ran if r["engine"] == engine] for engine in engines}
    print(json.dumps({"model": arguments.model, "records": len(records), "step_ms_p50": best}))
    return 1 if wrong else 0


def by_engine(
    arguments: argparse.Namespace, model: Any, lengths: list[int], engines: list[str], mode: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """What a record says of each engine on a case. What comes after `dynamic` is compared with it."""
    inputs = benchmark.prompts(arguments.model, model, lengths)
    expected: torch.Tensor | None = None
    judge: tuple[torch.Tensor, torch.Tensor] | None = None
    own_error: float | None = None
    for engine in engines:
        print(f"{lengths} {engine} ...", file=sys.stderr)
        record: dict[str, Any] = {"engine": engine, "tokens_match": None, "logit_error": None, "logits_right": None}
        try:
            summary = measure(model, inputs, arguments.new_tokens, engine, mode)
        except Exception as error:  # of transformers, torch or a compiler: that this engine does not run is the result
            if engine.startswith("patched"):
                raise
            print(f"{engine} raised {type(error).__name__}: {first_line(error)}", file=sys.stderr)
            yield {**record, "error": f"{type(error).__name__}: {first_line(error)}"}
            continue
        if expected is None and not engine.startswith("patched"):
            expected = summary.run.sequences
        if expected is not None:
            record["tokens_match"] = torch.equal(summary.run.sequences, expected)
        if summary.first_step is not None:
            tokens, found = summary.first_step
            if judge is None or not torch.equal(tokens, judge[0]):
                judge = tokens, logits.expected(model, tokens, inputs["attention_mask"])
            record["logit_error"] = logits.error(found, judge[1])
            if engine == "dynamic":
                own_error = record["logit_error"]
            elif own_error is not None and engine.startswith("patched") and arguments.dtype != "float32":
                record["logits_right"] = record["logit_error"] <= 2 * own_error
        yield {**record, **summary.figures(), "tokens_per_step": summary.run.tokens_per_step}


def show(records: list[dict[str, Any]]) -> None:
    """Prints a table of what ran, and which engine did not."""
    header = ("case", "engine", "p20 ms", "p50 ms", "p80 ms", "floor ms", "of floor", "tokens a step", "tokens/s",
              "first ms", "peak GiB", "setup s", "KV MiB", "logit error", "tokens match")  # fmt: skip
    rows = [
        (f"{r['batch']} x {max(r['lengths']):,}", r["engine"], f"{r['step_ms_p20']:.2f}", f"{r['step_ms_p50']:.2f}",
         f"{r['step_ms_p80']:.2f}", f"{r['floor_ms']:.2f}", f"{r['percent_of_floor']:.0f} %",
         f"{r['tokens_per_step']:.2f}", f"{r['tokens_per_s']:,.0f}", f"{r['first_token_ms']:,.0f}",
         f"{r['peak_gib']:.1f}", f"{r['setup_s']:.1f}", f"{r['kv_bytes'] / 2**20:,.1f}",
         "-" if r["logit_error"] is None else f"{r['logit_error']:.1e}", r["tokens_match"])
        if "error" not in r else (f"{r['batch']} x {max(r['lengths']):,}", r["engine"], r["error"], *[""] * 12)
        for r in records
    ]  # fmt: skip
    print(table(header, rows), end="\n\n")


if __name__ == "__main__":
    raise SystemExit(main())
