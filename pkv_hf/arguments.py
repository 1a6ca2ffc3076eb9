"""Checks that public functions share: what is wrong is named with its value and what to pass instead."""

from __future__ import annotations

import argparse
import operator
from pathlib import Path
from typing import Any

import torch


def whole(name: str, value: Any, least: int, instead: str) -> int:
    """A whole number of `least` or more, also one that a tensor holds. Raises ValueError for anything else."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise ValueError(f"{name}={value!r} is not a whole number of at least {least}: {instead}")
    return number


def flags(**named: Any) -> None:
    """Raises ValueError for what is neither True nor False."""
    for name, value in named.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is neither True nor False")


def token_ids(name: str, given: Any) -> torch.Tensor:
    """Token ids of one row as int64 `[length]`. Raises ValueError for anything else."""
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is {given!r}, not text and not token ids: {error}") from None
    if ids.ndim != 1 or (len(ids) and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)):
        raise ValueError(f"{name} has a row of {ids.dtype} {list(ids.shape)}: want token ids, integers [length]")
    return ids.long()


def count(text: str) -> int:
    """A command's argument that counts something, for argparse: 1 or more."""
    try:
        return whole("it", int(text), 1, "")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1") from None


def share(text: str) -> float:
    """A command's argument from 0 to below 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to below 1")
    return value


def existing(text: str) -> Path:
    """A command's argument that names a file or folder to read, for argparse."""
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text!r} does not exist")
    return Path(text)


def device(text: str) -> str:
    """A command's argument that names a device of this machine, for argparse."""
    try:
        kind, index = torch.device(text).type, torch.device(text).index or 0
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of torch: use cpu, cuda or cuda:N") from None
    if kind != "cpu" and not (kind == "cuda" and index < torch.cuda.device_count()):
        raise argparse.ArgumentTypeError(f"{text!r} is not on this machine, which has {torch.cuda.device_count()} GPUs")
    return text
