"""`pkv-hf demo`: one prompt, generated with and without pages; the texts and the figures side by side."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
import transformers
from tqdm import tqdm

from pkv_hf.bench.inputs import models
from pkv_hf.bench.inputs.smollm2 import pydoc_text
from pkv_hf.bench.inputs.texts import read_text
from pkv_hf.bench.measure import Run, run_generate
from pkv_hf.errors import UsageError
from pkv_hf.patching import patch, patched, unpatch
from pkv_hf.reporting import report
from pkv_hf.tables import mebibytes, table
from pkv_hf.version import __version__

SHOWN_CHARACTERS = 100


def main(arguments: argparse.Namespace) -> None:
    """Runs the demo. Raises UsageError for what cannot be done."""
    text = _text(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = models.load(arguments.model, torch.float32, device)
    inputs = _prompt(arguments, text, model, tokenizer)
    new_tokens = arguments.new_tokens
    unpatch(patch(model))  # a model that patch refuses is refused before anything is measured
    unpatched = _measured("transformers alone", model, inputs, new_tokens)
    with patched(model):
        run = _measured("patched", model, inputs, new_tokens)
        ran = report(model)
        print(ran)
    for name, sequences in (("transformers", unpatched.sequences), ("patched", run.sequences)):
        shown = tokenizer.decode(sequences[0, arguments.prompt_tokens :])[:SHOWN_CHARACTERS]
        print(f"{name:13} {shown!r}")
    print()
    rows = [
        ("decoding, tokens/s", f"{unpatched.tokens_per_s:.1f}", f"{run.tokens_per_s:.1f}"),
        ("first token, s", f"{unpatched.first_token_s:.2f}", f"{run.first_token_s:.2f}"),
        ("KV cache", mebibytes(unpatched.kv_bytes), mebibytes(run.kv_bytes)),
        ("peak memory", mebibytes(unpatched.peak_bytes), mebibytes(run.peak_bytes)),
        ("route", "-", ran.route),
    ]
    print(table(("", "transformers", "patched"), rows), end="\n\n")
    result = json.dumps(_result(arguments, model, unpatched, run, ran.route))
    if arguments.json:
        arguments.json.write_text(result + "\n")
    print(result)


def _result(arguments: argparse.Namespace, model: Any, unpatched: Run, run: Run, route: str | None) -> dict[str, Any]:
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    return {
        "model": arguments.model,
        "device": device,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "tokens_identical": torch.equal(unpatched.sequences, run.sequences),
        "tokens_per_s_unpatched": unpatched.tokens_per_s,
        "tokens_per_s_patched": run.tokens_per_s,
        "speedup": run.tokens_per_s / unpatched.tokens_per_s,
        "kv_bytes_unpatched": unpatched.kv_bytes,
        "kv_bytes_patched": run.kv_bytes,
        "route": route,
        "first_token_s_unpatched": unpatched.first_token_s,
        "first_token_s_patched": run.first_token_s,
        "total_s_unpatched": unpatched.first_token_s + sum(unpatched.step_s),
        "total_s_patched": run.first_token_s + sum(run.step_s),
        "peak_bytes_unpatched": unpatched.peak_bytes,
        "peak_bytes_patched": run.peak_bytes,
        "pkv_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _measured(name: str, model: Any, inputs: dict[str, torch.Tensor], new_tokens: int) -> Run:
    short = {key: tensor[:, :64] for key, tensor in inputs.items()}
    run_generate(model, short, 3)  # what a first call compiles and allocates stays out of the figures
    with tqdm(total=new_tokens, desc=name, unit="token", file=sys.stderr) as bar:
        return run_generate(model, inputs, new_tokens, on_token=bar.update)


def _text(arguments: argparse.Namespace) -> str:
    for option, value, least in (
        ("--prompt-tokens", arguments.prompt_tokens, 1),
        ("--new-tokens", arguments.new_tokens, 3),
    ):
        if value < least:
            raise UsageError(f"{option} is {value}: pass at least {least}")
    if arguments.json and (arguments.json.is_dir() or not arguments.json.parent.is_dir()):
        raise UsageError(f"--json {arguments.json} cannot be written: name a file in a folder that exists")
    if arguments.text_file is None:
        return pydoc_text()
    return read_text(arguments.text_file)


def _prompt(arguments: argparse.Namespace, text: str, model: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
    length, positions = arguments.prompt_tokens, models.positions_of(model)
    if positions is not None and length + arguments.new_tokens > positions:
        raise UsageError(
            f"--prompt-tokens {length} and --new-tokens {arguments.new_tokens} exceed the model's {positions} positions"
            f": pass at most --prompt-tokens {positions - arguments.new_tokens}"
        )
    input_ids = tokenizer(text, return_tensors="pt").input_ids[:, :length].to(model.device)
    if input_ids.shape[1] < length:
        raise UsageError(
            f"the text has {input_ids.shape[1]} tokens, --prompt-tokens asks for {length}: pass fewer or a longer text"
        )
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
