"""`pkv-hf plan`: what a model needs of a GPU's memory, from its configuration."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import torch
from transformers import AutoConfig

from pkv_hf.bench.inputs import smollm2
from pkv_hf.bench.inputs.models import DTYPES, loading
from pkv_hf.errors import UsageError
from pkv_hf.memory.planner import plan


def main(arguments: argparse.Namespace) -> None:
    """Prints the plan. Raises UsageError for what cannot be planned."""
    if arguments.gpu_memory is None and not torch.cuda.is_available():
        raise UsageError("--gpu-memory: there is no GPU here to ask: pass 15GiB, say")
    try:
        made = plan(
            _config(arguments.model),
            prompt_tokens=arguments.prompt_tokens,
            max_new_tokens=arguments.max_new_tokens,
            batch=arguments.batch,
            gpu_memory=arguments.gpu_memory,
            dtype=DTYPES[arguments.dtype] if arguments.dtype else None,
            weight_bits=arguments.weight_bits,
            kv_dtype=arguments.kv_dtype,
            prefill_chunk_size=arguments.prefill_chunk_size,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(made, end="\n\n")
    print(json.dumps({"model": arguments.model, **dataclasses.asdict(made), "total": made.total, "fits": made.fits}))


def _config(name: str) -> Any:
    with loading(f"MODEL {name}", name):
        if name == "smollm2":
            return AutoConfig.from_pretrained(smollm2.folder(), gguf_file=smollm2.FILE)
        return AutoConfig.from_pretrained(name)
