"""Checks that public functions share: what is wrong is named with its value and what to pass instead."""

from __future__ import annotations

import argparse
import importlib
import operator
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.modeling import convert_file_size_to_int

from pkv_hf.errors import UsageError, first_line


def whole(name: str, value: Any, least: int, instead: str) -> int:
    """A whole number of `least` or more, also one that a tensor holds. Raises ValueError for anything else."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise ValueError(f"{name}={value!r} is not a whole number of at least {least}: {instead}")
    return number


def memory_size(name: str, value: Any, example: str) -> int:
    """Bytes, by a whole number of them or by a string as `example`. Raises ValueError for anything else."""
    try:
        nbytes = convert_file_size_to_int(value) if isinstance(value, str) else whole(name, value, 1, "")
    except (ValueError, OverflowError):
        nbytes = 0
    if nbytes < 1:
        raise ValueError(f"{name}={value!r} is no size: pass bytes, or {example!r} say")
    return nbytes


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
    if ids.is_meta or ids.layout != torch.strided:
        raise ValueError(f"{name} is a {ids.layout} tensor on {ids.device}: want token ids, integers [length]")
    if ids.ndim != 1 or (len(ids) and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)):
        raise ValueError(f"{name} has a row of {ids.dtype} {list(ids.shape)}: want token ids, integers [length]")
    return ids.long()


def needs(*packages: str) -> None:
    """Raises UsageError, with the command that installs it, where a package that a command needs is not there."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            reason = first_line(error)
            raise UsageError(f"this needs the package {package}: pip install {package} ({reason})") from error


def count(text: str, least: int = 1) -> int:
    """A command's argument that counts something, for argparse: `least` or more."""
    try:
        return whole("it", int(text), least, "")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}") from None


def natural(text: str) -> int:
    """A command's argument that may be 0 too, such as a seed, for argparse."""
    return count(text, 0)


def share(text: str) -> float:
    """A command's argument from 0 to below 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to below 1")
    return value


def file(text: str) -> Path:
    """A command's argument that names a file to read, for argparse."""
    if not os.path.isfile(text):
        reason = "is a folder: name a file in it" if os.path.isdir(text) else "does not exist"
        raise argparse.ArgumentTypeError(f"{text!r} {reason}")
    return Path(text)


def folder(text: str) -> Path:
    """A command's argument that names a folder to read, for argparse."""
    if not os.path.isdir(text):
        reason = "is a file: name its folder" if os.path.exists(text) else "does not exist"
        raise argparse.ArgumentTypeError(f"{text!r} {reason}")
    return Path(text)


def output_folder(text: str) -> Path:
    """A command's argument that names a folder to write to, for argparse."""
    if not writable(Path(text)):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: name a folder that can")
    return Path(text)


def writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which need not be there yet."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.exists(place))
    return there.is_dir() and os.access(there, os.W_OK)


def device(text: str) -> str:
    """A command's argument that names a device of this machine, for argparse."""
    try:
        kind, index = torch.device(text).type, torch.device(text).index or 0
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of torch: use cpu, cuda or cuda:N") from None
    if kind != "cpu" and not (kind == "cuda" and index < torch.cuda.device_count()):
        raise argparse.ArgumentTypeError(f"{text!r} is not on this machine, which has {torch.cuda.device_count()} GPUs")
    return text
