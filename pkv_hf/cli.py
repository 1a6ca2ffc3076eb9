"""The `pkv-hf` command."""

from __future__ import annotations

import argparse

from pkv_hf import compat
from pkv_hf.errors import status
from pkv_hf.version import __version__


def main() -> int:
    """Runs a subcommand. Returns the exit status: 0, or 2 for arguments that cannot be served (one line on stderr)."""
    if not compat.SUPPORTED:
        return status("pkv-hf", compat.refuse)
    from pkv_hf.bench import calibrate, demo

    parser = argparse.ArgumentParser(prog="pkv-hf", description="Long-context generate() on pages, for transformers.")
    parser.add_argument("--version", action="version", version=f"pkv-hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo.add_arguments(commands.add_parser("demo", help="generate with and without pages, and compare"))
    calibrate.add_arguments(commands.add_parser("calibrate", help="measure this GPU for route='auto'"))
    arguments = parser.parse_args()
    command = {"demo": demo.main, "calibrate": calibrate.main}[arguments.command]
    return status(f"pkv-hf {arguments.command}", lambda: command(arguments))
