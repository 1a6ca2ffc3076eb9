"""Perplexity of a model on pages beside transformers' own, on windows of a text.

`--mode chunk` feeds a window in chunks, each over the pages of those before. `--mode decode` lets generate() follow the
end of a window token by token after a prompt of the rest. The reference for both is one forward a window without a
cache, the quantity that perplexity is defined by; speed and memory are compared with transformers in the same mode, on
the same tokens, since a forward and a decode loop do different work. `accelerate launch` splits the windows over
processes. A run that was killed goes on where it stopped when it is started again. Of several `--kv-dtype` the windows
are scored by transformers once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from pathlib import Path
from typing import Any

from accelerate import PartialState

import pkv_hf
from pkv_hf.arguments import needs, output_folder
from pkv_hf.bench.inputs import models, texts
from pkv_hf.bench.perplexity import MODES
from pkv_hf.bench.results.charts import perplexity_chart
from pkv_hf.bench.results.records import OUT_FOLDER, append_record, check_out, environment
from pkv_hf.bench.results.resume import Store, digest
from pkv_hf.errors import UsageError, status
from pkv_hf.tables import mebibytes, table


def measure(arguments: argparse.Namespace) -> None:
    check_out(arguments.out)
    needs("datasets", "evaluate", "matplotlib")
    from pkv_hf.bench import metric

    processes = PartialState(cpu=arguments.device == "cpu")
    if arguments.max_windows is not None and arguments.max_windows < 1:
        raise UsageError(f"--max-windows {arguments.max_windows}: pass at least 1, or leave it out for all")
    for mode, context in itertools.product(arguments.mode, arguments.contexts):
        metric.check(mode, context, arguments.chunk, arguments.decode_tokens, arguments.max_windows)
    found_texts = texts.load_texts(arguments)
    device = processes.device if arguments.device in (None, processes.device.type) else arguments.device
    model, tokenizer = models.load(arguments.model, models.DTYPES[arguments.dtype], device, arguments.rope_scaling)
    pages = [None if kv_dtype == "same" else kv_dtype for kv_dtype in arguments.kv_dtype]
    for kv_dtype in pages:
        try:
            pkv_hf.patch(model, kv_dtype=kv_dtype)
        except ValueError as error:  # this GPU has no fp8
            raise UsageError(str(error)) from error
    for context in arguments.contexts:
        models.check_positions(model, context, f"--contexts {context}")
    longest = max(arguments.contexts)
    needed = None if arguments.max_windows is None else arguments.max_windows * longest
    ids = texts.token_ids(tokenizer, found_texts, needed)
    metric.windows(tokenizer, [ids.tolist()], longest, arguments.max_windows)  # which asks for enough text
    case = {
        "bench": "perplexity", "model": arguments.model, "dtype": arguments.dtype, "text": texts.source_name(arguments),
        "rope_scaling": arguments.rope_scaling, "processes": processes.num_processes,
    }  # fmt: skip
    sizes = {"chunk": arguments.chunk, "decode_tokens": arguments.decode_tokens}
    store = Store(arguments.out, {**case, **sizes, "ids": digest(ids.numpy().tobytes())}, model)
    records = []
    for mode, context, kv_dtype in itertools.product(arguments.mode, arguments.contexts, pages):
        pkv_hf.patch(model, kv_dtype=kv_dtype)
        found = metric.PagedPerplexity().compute(
            texts=[ids.tolist()], model=model, tokenizer=tokenizer, context=context, mode=mode,
            chunk=arguments.chunk, decode_tokens=arguments.decode_tokens, max_windows=arguments.max_windows,
            processes=processes, store=store, progress=processes.is_main_process,
        )  # fmt: skip
        size = {name: value if name.startswith(mode) else None for name, value in sizes.items()}
        records.append({**case, "kv_dtype": kv_dtype, **size, **found, **environment()})
    if processes.is_main_process:
        for record in records:
            append_record(arguments.out, record)
        store.remove()
        show(arguments, records)


def show(arguments: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    title = f"{Path(arguments.model).name}, {arguments.dtype}, {records[0]['text']}"
    name = f"perplexity {title} {' '.join(arguments.mode)} {max(arguments.contexts)}"
    chart = arguments.plots / f"{re.sub(r'[^a-zA-Z0-9.]+', '-', name)}.png"
    perplexity_chart(records, title, chart)
    header = ("windows", "mode", "pages", "perplexity", "one forward", "difference %", "transformers' own %",
              "largest log-prob diff", "tokens/s", "transformers", "one forward", "peak",
              "transformers", "one forward")  # fmt: skip
    rows = [
        (f"{r['windows']} x {r['context']:,}", r["mode"], r["kv_dtype"] or "same",
         f"{r['perplexity']:.4f}", f"{r['perplexity_forward']:.4f}",
         f"{r['difference_percent']:+.5f}", f"{r['difference_percent_unpatched']:+.5f}",
         f"{r['largest_log_prob_difference']:.1e}",
         *(f"{r['tokens_per_s' + suffix]:,.1f}" for suffix in ("", "_unpatched", "_forward")),
         *(mebibytes(r["peak_bytes" + suffix]) for suffix in ("", "_unpatched", "_forward")))
        for r in records
    ]  # fmt: skip
    print(table(header, rows), end="\n\n")
    for reason in sorted({reason for r in records for reason in r["left"]}):
        print(f"left to transformers: {reason}")
    keys = ("mode", "kv_dtype", "context", "windows", "perplexity", "perplexity_forward", "difference_percent",
            "largest_log_prob_difference", "tokens_per_s", "tokens_per_s_unpatched", "peak_bytes",
            "peak_bytes_unpatched", "route")  # fmt: skip
    results = [{key: record[key] for key in keys} for record in records]
    print(json.dumps({"model": arguments.model, "results": results, "plot": str(chart)}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_arguments(parser)
    texts.add_arguments(parser)
    parser.add_argument("--mode", nargs="+", default=["chunk"], choices=MODES)
    parser.add_argument("--contexts", nargs="+", type=int, default=[2048, 4096], metavar="N", help="tokens of a window")
    parser.add_argument("--max-windows", type=int, metavar="N", help="windows of each context; default: all")
    parser.add_argument("--chunk", type=int, default=512, metavar="N", help="tokens of a forward in chunk mode")
    parser.add_argument("--decode-tokens", type=int, default=64, metavar="N", help="tokens scored in decode mode")
    parser.add_argument(
        "--kv-dtype", nargs="+", default=["same"], choices=("same", "int8", "fp8"),
        help="what the pages hold: the model's dtype, or quantised to 8 bits",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=f"{OUT_FOLDER}/perplexity.jsonl")
    parser.add_argument("--plots", type=output_folder, default=Path("benchmarks/plots"), help="folder of the PNG files")
    arguments = parser.parse_args()
    return status("perplexity", lambda: measure(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
