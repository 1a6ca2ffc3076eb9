"""One model on one GPU, its layers on all GPUs (accelerate's device_map), and tensor parallel over them (tp_plan).

Each way is measured unpatched and patched, and its tokens are compared with those of one GPU, unpatched: in float32 a
difference is an error. Tensor parallel runs under torchrun, which this script starts on itself with the model in a
temporary folder. On a CPU there are one device, and two processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from pkv_hf.arguments import count, device
from pkv_hf.bench import benchmark
from pkv_hf.bench.compare import check_patchable
from pkv_hf.bench.inputs.models import DTYPES, quieten
from pkv_hf.bench.inputs.shapes import SHAPES
from pkv_hf.bench.results.records import OUT_FOLDER, append_record, environment, output
from pkv_hf.errors import UsageError, status
from pkv_hf.tables import table

ENGINES = ("dynamic", "patched")
FOLDER = "PKV_HF_FOLDER"
"""Where torchrun's processes find the model; what names it in their environment makes this script one of them."""


def measure(model: Any, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Times and tokens of each engine, of JSON types."""
    inputs, found = benchmark.prompts(arguments.model, model, arguments.lengths), {}
    for engine in ENGINES:
        summary = benchmark.measure(model, inputs, arguments.new_tokens, engine)
        found[engine] = {**summary.figures(), "tokens": summary.run.sequences.tolist()}
    return found


def tensor_parallel(arguments: argparse.Namespace) -> int:
    """One of torchrun's processes; the first prints what it measured."""
    model = AutoModelForCausalLM.from_pretrained(os.environ[FOLDER], dtype=DTYPES[arguments.dtype], tp_plan="auto")
    found = measure(model, arguments)
    if os.environ["RANK"] == "0":
        print(json.dumps(found))
    torch.distributed.destroy_process_group()
    return 0


def everywhere(arguments: argparse.Namespace, devices: int, processes: int) -> dict[str, dict[str, dict[str, Any]]]:
    """What `measure` finds, by where the model is. Raises CalledProcessError where tensor parallel fails.

    Raises UsageError, before anything is measured, for a model that cannot be.
    """
    dtype, found = DTYPES[arguments.dtype], {}
    with tempfile.TemporaryDirectory() as folder:
        print("one device ...", file=sys.stderr)
        model = benchmark.load(arguments.model, dtype, arguments.device)
        benchmark.check_lengths(model, [arguments.lengths], arguments.new_tokens)
        check_patchable(model)
        kv_heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
        if kv_heads % processes:
            raise UsageError(f"--model {arguments.model} has {kv_heads} KV heads, which {processes} processes cannot "
                             "share: pass another")  # fmt: skip
        model.save_pretrained(folder)
        found["one device"] = measure(model, arguments)
        del model
        if devices > 1:
            torch.cuda.empty_cache()
            print(f"layers on {devices} ...", file=sys.stderr)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="balanced")
            found["layers on several"] = measure(model, arguments)
            del model
            torch.cuda.empty_cache()
        print(f"tensor parallel, {processes} processes ...", file=sys.stderr)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        environ = {**os.environ, FOLDER: folder}
        if arguments.device == "cpu":
            environ["CUDA_VISIBLE_DEVICES"] = ""  # tp_plan takes GPUs where there are any
        command = [*launch, __file__, *sys.argv[1:]]
        done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
        found["tensor parallel"] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b", help=f"smollm2, {', '.join(SHAPES)}, or a folder")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--lengths", nargs="+", type=count, default=[4096], metavar="N", help="the prompt of each row")
    parser.add_argument("--new-tokens", type=count, default=48, metavar="N")
    parser.add_argument(
        "--device", type=device, choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--out", type=output, default=f"{OUT_FOLDER}/devices.jsonl")
    arguments = parser.parse_args()
    if arguments.new_tokens <= benchmark.WARM_STEPS + 1:
        parser.error(f"--new-tokens {arguments.new_tokens}: pass more than {benchmark.WARM_STEPS + 1}")
    devices = torch.cuda.device_count() if arguments.device == "cuda" else 1
    if arguments.device == "cuda" and devices < 2:
        parser.error("--device cuda: there is one GPU, and this compares several")
    quieten()
    if FOLDER in os.environ:
        return tensor_parallel(arguments)
    return status("benchmark_devices", lambda: compare(arguments, devices))


def compare(arguments: argparse.Namespace, devices: int) -> int:
    """Measures every way, and compares. Returns 1 where one gives other tokens than transformers on one device."""
    processes = max(devices, 2)
    records = []
    ways = everywhere(arguments, devices, processes)
    expected = ways["one device"]["dynamic"]["tokens"]
    for way, engines in ways.items():
        for engine, found in engines.items():
            match = found.pop("tokens") == expected
            if not match and arguments.dtype == "float32":
                print(f"error: {engine}, {way}: other tokens than transformers on one device", file=sys.stderr)
                return 1
            records.append({
                "bench": "devices", "way": way, "engine": engine, "model": arguments.model, "dtype": arguments.dtype,
                "devices": 1 if way == "one device" else processes, "lengths": arguments.lengths,
                "new_tokens": arguments.new_tokens, **found, "tokens_match": match, **environment(),
            })  # fmt: skip
    for record in records:
        append_record(arguments.out, record)
    header = ("way", "engine", "p20 ms", "p50 ms", "p80 ms", "first ms", "GiB on the first", "route", "tokens match")
    rows = [
        (r["way"], r["engine"], f"{r['step_ms_p20']:.2f}", f"{r['step_ms_p50']:.2f}", f"{r['step_ms_p80']:.2f}",
         f"{r['first_token_ms']:,.0f}", f"{r['peak_gib']:.1f}", r["route"] or "", r["tokens_match"])
        for r in records
    ]  # fmt: skip
    print(table(header, rows), end="\n\n")
    match = all(r["tokens_match"] for r in records)
    print(json.dumps({"model": arguments.model, "records": len(records), "tokens_match": match}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
