"""The `pkv-hf` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from pkv_hf import compat
from pkv_hf.errors import RouteError, TraceError, UnsupportedModelError, UnsupportedVersionError, UsageError
from pkv_hf.version import __version__


def main() -> int:
    """Runs a subcommand. Returns the exit status: 0, or 2 for arguments that cannot be served (one line on stderr)."""
    if not compat.SUPPORTED:
        return status("pkv-hf", compat.refuse)
    from pkv_hf import calibrate, demo

    parser = argparse.ArgumentParser(prog="pkv-hf", description="Long-context generate() on pages, for transformers.")
    parser.add_argument("--version", action="version", version=f"pkv-hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo.add_arguments(commands.add_parser("demo", help="generate with and without pages, and compare"))
    calibrate.add_arguments(commands.add_parser("calibrate", help="measure this GPU for route='auto'"))
    arguments = parser.parse_args()
    command = {"demo": demo.main, "calibrate": calibrate.main}[arguments.command]
    return status(f"pkv-hf {arguments.command}", lambda: command(arguments))


def status(command: str, run: Callable[[], int | None]) -> int:
    """Runs a command. Returns its exit status (0 for None), or 2 for what cannot be served (one line on stderr)."""
    try:
        return run() or 0
    except (RouteError, TraceError, UnsupportedModelError, UnsupportedVersionError, UsageError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
