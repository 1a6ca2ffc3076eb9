"""Speed of model.generate() on the prompts of a dataset or the lengths of a trace, with and without pages.

Requests run in the order of their arrival, `--max-active` at a time: a batch is generated to the end of its longest
request before the next begins, as a script around generate() does. A request's latency goes from the start of its
batch to its own last token; waiting for a turn is not counted. tokens/s counts the tokens that were asked for, over
the time of all batches, prompts included. A short call comes first; after it every batch is the first one of its
lengths, as in real traffic (transformers' growing cache is slower then than on lengths that it has seen). Tokens are
compared: in float32 a difference is an error, and nothing is recorded.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pkv_hf.bench import compare
from pkv_hf.bench.compare import check_patchable
from pkv_hf.bench.inputs import models, texts, workload
from pkv_hf.bench.inputs.traces import load
from pkv_hf.bench.measure import run_generate
from pkv_hf.bench.results.records import OUT_FOLDER, append_record, check_out, environment
from pkv_hf.bench.results.resume import Store, digest
from pkv_hf.errors import UsageError, status
from pkv_hf.tables import mebibytes, table

ENGINES = ("unpatched", "patched")


def prompts_of(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[list[workload.Prompt], int]:
    """The workload, and how many requests of the trace were too long for it."""
    for option in ("requests", "max_active", "new_tokens", "max_length"):
        least = 2 if option == "new_tokens" else 1
        if getattr(arguments, option) is not None and getattr(arguments, option) < least:
            flag = f"--{option.replace('_', '-')}"
            raise UsageError(f"{flag} {getattr(arguments, option)}: pass at least {least}")
    longest = arguments.max_length or models.positions_of(model)
    if longest is None:
        raise UsageError(f"--max-length: the model {arguments.model} sets no limit itself, pass one")
    models.check_positions(model, longest, f"--max-length {longest}")
    if arguments.trace_file is None:
        if arguments.new_tokens >= longest:
            raise UsageError(f"--new-tokens {arguments.new_tokens} leaves no prompt in {longest} tokens: pass fewer")
        found = texts.load_texts(arguments)
        prompts = workload.from_texts(tokenizer, found, arguments.requests, arguments.new_tokens, longest)
        if not prompts:
            raise UsageError(f"--text-file {arguments.text_file} holds no text: pass another")
        return prompts, 0
    requests = load(arguments.trace_file)[: arguments.requests]
    prompts = workload.from_trace(requests, texts.token_ids(tokenizer, texts.load_texts(arguments)), longest)
    if not prompts:
        raise UsageError(f"--trace-file {arguments.trace_file}: no request fits {longest} tokens: pass --max-length, "
                         "for more than the model's positions with --rope-scaling yarn:2")  # fmt: skip
    return prompts, len(requests) - len(prompts)


def generate_batch(model: Any, batch: list[workload.Prompt], pad: int) -> dict[str, Any]:
    inputs = workload.padded(batch, pad, model.device)
    run = run_generate(model, inputs, max(2, *(prompt.new_tokens for prompt in batch)))
    return {
        "first_token_s": run.first_token_s, "step_s": list(run.step_s), "latencies_s": workload.latencies(run, batch),
        "peak_bytes": run.peak_bytes, "kv_bytes": run.kv_bytes, "answers": workload.answers(run, batch),
    }  # fmt: skip


def measure(arguments: argparse.Namespace) -> None:
    check_out(arguments.out)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = models.load(arguments.model, models.DTYPES[arguments.dtype], device, arguments.rope_scaling)
    prompts, too_long = prompts_of(arguments, model, tokenizer)
    batches = workload.batches(prompts, arguments.max_active)
    case = {
        "bench": "dataset", "model": arguments.model, "dtype": arguments.dtype, "rope_scaling": arguments.rope_scaling,
        "source": arguments.trace_file.name if arguments.trace_file else texts.source_name(arguments),
        "max_active": arguments.max_active, "requests": len(prompts), "too_long": too_long,
        "prompt_tokens": sum(len(prompt.ids) for prompt in prompts),
        "new_tokens": sum(prompt.new_tokens for prompt in prompts),
    }  # fmt: skip
    check_patchable(model)
    wanted = digest([[*prompt.ids.tolist(), prompt.new_tokens] for prompt in prompts])
    store = Store(arguments.out, {**case, "prompts": wanted}, model)
    pad = model.config.pad_token_id or 0
    short = [workload.Prompt(prompt.ids[:64], 3) for prompt in batches[0]]
    warm_up = functools.partial(generate_batch, model, short, pad)
    turns = {}
    for engine in ENGINES:
        parts = [
            (f"{engine}-{index}", functools.partial(generate_batch, model, batch, pad))
            for index, batch in enumerate(batches)
        ]
        turns[engine] = compare.Engine(engine == "patched", parts, warm_up)
    results = compare.run(model, turns, store, "batches")
    pairs = [pair for a, b in zip(*(results[engine] for engine in ENGINES)) for pair in zip(a["answers"], b["answers"])]
    same = sum(a == b for a, b in pairs) / len(pairs)
    if same < 1 and arguments.dtype == "float32":
        raise SystemExit(f"error: {1 - same:.1%} of the requests got other tokens than from transformers")
    shared = {"same_tokens": same, **environment()}
    ran = {"unpatched": {"route": None, "left": []}, "patched": compare.served(results["patched"])}
    records = [
        {**case, "engine": engine, **figures(results[engine], case["new_tokens"]), **ran[engine], **shared}
        for engine in ENGINES
    ]
    for record in records:
        append_record(arguments.out, record)
    store.remove()
    show(records)


def figures(results: list[dict[str, Any]], new_tokens: int) -> dict[str, Any]:
    latencies = [latency for result in results for latency in result["latencies_s"]]
    firsts = [result["first_token_s"] for result in results for _ in result["latencies_s"]]
    steps = [step for result in results for step in result["step_s"]]
    return {
        "tokens_per_s": new_tokens / sum(result["first_token_s"] + sum(result["step_s"]) for result in results),
        **{f"latency_s_p{p}": float(np.percentile(latencies, p)) for p in (50, 95, 99)},
        **{f"first_token_s_p{p}": float(np.percentile(firsts, p)) for p in (50, 95)},
        "step_ms_p50": float(np.median(steps)) * 1e3,
        "peak_bytes": max(result["peak_bytes"] for result in results),
        "kv_bytes": max(result["kv_bytes"] for result in results),
    }


def show(records: list[dict[str, Any]]) -> None:
    header = ("engine", "tokens/s", "latency p50 s", "p95", "p99", "first token p50 s", "p95", "step ms", "peak",
              "KV cache")  # fmt: skip
    keys = ("latency_s_p50", "latency_s_p95", "latency_s_p99", "first_token_s_p50", "first_token_s_p95")
    rows = [
        (r["engine"], f"{r['tokens_per_s']:,.1f}", *(f"{r[key]:.2f}" for key in keys), f"{r['step_ms_p50']:.1f}",
         mebibytes(r["peak_bytes"]), mebibytes(r["kv_bytes"]))
        for r in records
    ]  # fmt: skip
    print(table(header, rows), end="\n\n")
    before, after = records
    speedup = after["tokens_per_s"] / before["tokens_per_s"]
    shown = ("model", "source", "requests", "too_long", "same_tokens", "tokens_per_s", "latency_s_p50", "route")
    print(json.dumps({**{key: after[key] for key in shown}, "speedup": speedup}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_arguments(parser)
    texts.add_arguments(parser)
    parser.add_argument("--trace-file", type=Path, metavar="FILE", help="CSV or JSON of lengths; texts give the tokens")
    parser.add_argument("--requests", type=int, default=32, metavar="N", help="the first N requests")
    parser.add_argument("--max-active", type=int, default=4, metavar="N", help="rows of a batch at most")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="of each request of a dataset")
    parser.add_argument(
        "--max-length", type=int, metavar="N",
        help="tokens of prompt and answer at most: texts are cut, requests of a trace left out; default: the model's",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=f"{OUT_FOLDER}/dataset.jsonl")
    arguments = parser.parse_args()
    return status("benchmark_dataset", lambda: measure(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
