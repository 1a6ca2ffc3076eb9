"""Whether a model finds a number hidden in a long text, with and without pages, over lengths and depths.

A cell of the table is a length and a depth: the share of `--trials` keys that each finds, and the share of answers in
which every token is the same. The filler repeats: the task shows that all of a long past is read, not how well.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import torch

from pkv_hf.arguments import needs, output_folder
from pkv_hf.bench import compare
from pkv_hf.bench.compare import check_patchable
from pkv_hf.bench.inputs import models
from pkv_hf.bench.inputs.passkey import answer_tokens, key_of, prompt
from pkv_hf.bench.measure import run_generate
from pkv_hf.bench.results.charts import passkey_chart
from pkv_hf.bench.results.records import OUT_FOLDER, append_record, check_out, environment
from pkv_hf.bench.results.resume import Store
from pkv_hf.errors import UsageError, status
from pkv_hf.tables import table


def ask(model: Any, tokenizer: Any, ids: torch.Tensor, key: str) -> dict[str, Any]:
    """The model's greedy answer to a prompt."""
    inputs = {"input_ids": ids[None].to(model.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    run = run_generate(model, inputs, answer_tokens(tokenizer, key))
    tokens = run.sequences[0, len(ids) :].tolist()
    return {"tokens": tokens, "found": key in tokenizer.decode(tokens)}


def measure(arguments: argparse.Namespace) -> None:
    check_out(arguments.out)
    needs("matplotlib")
    if arguments.trials < 1:
        raise UsageError(f"--trials {arguments.trials}: pass at least 1")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = models.load(arguments.model, models.DTYPES[arguments.dtype], device, arguments.rope_scaling)
    cells = [(length, depth) for length in arguments.lengths for depth in arguments.depths]
    for length, depth in cells:
        longest = length + answer_tokens(tokenizer, key_of(0))
        models.check_positions(model, longest, f"--lengths {length} and an answer, {longest} tokens,")
        prompt(tokenizer, length, depth, key_of(0))
    case = {"bench": "passkey", "model": arguments.model, "dtype": arguments.dtype,
            "rope_scaling": arguments.rope_scaling, "trials": arguments.trials}  # fmt: skip
    check_patchable(model)
    store = Store(arguments.out, case, model)
    turns = {}
    for engine in ("unpatched", "patched"):
        parts = []
        for (length, depth), trial in itertools.product(cells, range(arguments.trials)):
            key = key_of(trial)
            compute = functools.partial(ask, model, tokenizer, prompt(tokenizer, length, depth, key), key)
            parts.append((f"{engine}-{length}-{depth}-{trial}", compute))
        turns[engine] = compare.Engine(engine == "patched", parts, parts[0][1])
    answers = compare.run(model, turns, store, "keys")
    ran = compare.served(answers["patched"])
    records = []
    for index, (length, depth) in enumerate(cells):
        of_cell = slice(index * arguments.trials, (index + 1) * arguments.trials)
        before, after = answers["unpatched"][of_cell], answers["patched"][of_cell]
        shares = {
            "found_unpatched": [answer["found"] for answer in before],
            "found": [answer["found"] for answer in after],
            "same_tokens": [a["tokens"] == b["tokens"] for a, b in zip(before, after)],
        }
        means = {key: sum(values) / len(values) for key, values in shares.items()}
        records.append({**case, "length": length, "depth": depth, **means, **ran, **environment()})
        append_record(arguments.out, records[-1])
    store.remove()
    show(arguments, records)


def show(arguments: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    chart = arguments.plots / f"passkey-{Path(arguments.model).name}-{arguments.dtype}.png"
    passkey_chart(records, f"{Path(arguments.model).name}, {arguments.dtype}", chart)
    keys = ("found_unpatched", "found", "same_tokens")
    rows = [(f"{r['length']:,}", f"{r['depth']:.2f}", *(f"{r[key]:.2f}" for key in keys)) for r in records]
    print(table(("prompt", "depth", "found, transformers", "found, patched", "same tokens"), rows), end="\n\n")
    means = {key: sum(r[key] for r in records) / len(records) for key in keys}
    print(json.dumps({"model": arguments.model, "cells": len(records), **means, "plot": str(chart)}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_arguments(parser)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096], metavar="N")
    parser.add_argument("--depths", nargs="+", type=float, default=[0.0, 0.25, 0.5, 0.75, 1.0], metavar="SHARE")
    parser.add_argument("--trials", type=int, default=2, metavar="N", help="keys of a cell")
    parser.add_argument("--out", type=Path, default=f"{OUT_FOLDER}/passkey.jsonl")
    parser.add_argument("--plots", type=output_folder, default=Path("benchmarks/plots"), help="folder of the PNG files")
    arguments = parser.parse_args()
    return status("passkey", lambda: measure(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
