"""Result records: what they were measured on, appended to JSONL files that are only ever added to."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

from pkv_hf.arguments import writable
from pkv_hf.errors import UsageError
from pkv_hf.version import __version__

OUT_FOLDER = "results"
"""Where scripts append records unless --out names a file; of the current folder, and ignored by git.

Their defaults are texts, since argparse checks those as it checks what is given.
"""

OF_BITS = {None: None, 4: "nf4"}
"""Names of weights, by the `weight_bits` that records once had."""


def environment() -> dict[str, Any]:
    """GPU (or processor), library versions, commit and UTC date, for a record."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"none ({platform.machine()} CPU)"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton,
        "transformers": transformers.__version__,
        "pkv_hf": __version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def commit() -> str:
    """The checkout's commit, with "-dirty" where its code differs; PKV_HF_COMMIT where there is no repository."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", ":!benchmarks/results")  # records go there while we run
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("PKV_HF_COMMIT", "unknown")
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str:
    root = Path(__file__).parents[3]
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def check_out(path: Path) -> None:
    """Raises UsageError where records cannot be written to a path, before anything is measured for them."""
    if path.is_dir() or not writable(path.parent) or (path.exists() and not os.access(path, os.W_OK)):
        raise UsageError(f"--out {path} cannot be written: name a file in a folder that can")


def output(text: str) -> Path:
    """A command's argument that names a file of records, for argparse."""
    try:
        check_out(Path(text))
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def read_records(path: Path, named: str, fields: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The records of a file that `append_record` has written, each with these fields.

    Raises UsageError for any other file, by what the caller `named` it and by the line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{named} cannot be read as records: {error}") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{named}, line {number} is not JSON: take it out ({error})") from error
        if not isinstance(record, dict):
            raise UsageError(f"{named}, line {number} is {line[:40]}, not a record: pass a file of records")
        if "weight_bits" in record:
            record["weights"] = OF_BITS[record.pop("weight_bits")]
        missing = [field for field in fields if field not in record]
        if missing:
            raise UsageError(f"{named}, line {number} has no {', '.join(missing)}: pass what a benchmark has recorded")
        records.append(record)
    return records


def append_record(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
