"""Finished parts of a long run on disk, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from pkv_hf.bench.results.records import environment


def digest(value: Any) -> str:
    """A short name for a value of JSON types, or for bytes."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def weights_digest(model: nn.Module) -> str:
    """A name for a model's weights: the first values of every parameter."""
    firsts = [parameter.detach().flatten()[:64].float().cpu().numpy().tobytes() for parameter in model.parameters()]
    return digest(b"".join(firsts))


class Store:
    """A folder with a JSON file for every finished part of a run.

    A file appears whole or not at all. Runs that differ in `settings`, in the weights or device of the model, or in
    what `environment()` says, have folders of their own, beside the file `out` that their records go to.
    """

    def __init__(self, out: Path, settings: dict[str, Any], model: Any) -> None:
        machine = {key: value for key, value in environment().items() if key != "date"}
        run = {**settings, **machine, "device": model.device.type, "weights": weights_digest(model)}
        self.folder = out.with_suffix(".partial") / digest(run)

    def part(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The part of this name, computed (a dict of JSON types) where no run before has finished it."""
        path = self.folder / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())
        value = compute()
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        with temporary.open("w") as file:
            json.dump(value, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        return value

    def remove(self) -> None:
        """Forgets the parts, once what was made of them is written."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()
