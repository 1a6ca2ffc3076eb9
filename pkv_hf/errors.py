"""The errors that this package raises on purpose; each message names the argument, its value and the way out.

And what a command makes of others: one line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch


class PoolAllocationError(torch.OutOfMemoryError):
    """A page pool did not fit. A `torch.OutOfMemoryError`, so that code which retries smaller still works."""


class UnsupportedModelError(ValueError):
    """`patch` found nothing in the model that it can serve; the message says why."""


class UnsupportedVersionError(ImportError):
    """The installed transformers is too old, or names caches as no release did that is known here."""


class RouteError(RuntimeError):
    """A route that the caller named cannot serve a step; the message gives every route's reason."""


class NotServed(Exception):
    """A call that pages cannot serve exactly, which transformers' own path then takes: no user sees it.

    Its message is the reason, empty where there is nothing to say.
    """


class LayerNotServed(NotServed):
    """What a layer asks of attention cannot be had from pages, in this call or, unless its caller asked, in any."""


class UsageError(ValueError):
    """A command was asked for something that cannot be done; the message is one line with the way out."""


class TraceError(ValueError):
    """A trace file holds something that is not a request; the message names the file and the line."""


class WrongResultError(RuntimeError):
    """A benchmark found a result that is not right, and measures nothing."""


def first_line(error: BaseException) -> str:
    """What an error says, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def status(command: str, run: Callable[[], int | None]) -> int:
    """Runs a command. Returns its exit status (0 for None), or 2 for what cannot be served (one line on stderr)."""
    try:
        return run() or 0
    except (RouteError, TraceError, UnsupportedModelError, UnsupportedVersionError, UsageError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
