"""Where a GPU's constants are kept: one JSON file for each GPU, torch and Triton, in the user's cache directory."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import os
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

from pkv_hf import compat
from pkv_hf.routes.costs import MODES, Constants, RouteConstants, from_properties

FORMAT = 1


def path_for(device: torch.device) -> Path:
    """The file of a device: `$PKV_HF_CACHE`, else `$XDG_CACHE_HOME/pkv_hf`, else `~/.cache/pkv_hf`."""
    folder = os.environ.get("PKV_HF_CACHE")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "pkv_hf")
    name = "-".join(_identity(device).values())
    return Path(folder) / f"calibration-{re.sub(r'[^A-Za-z0-9.+]+', '_', name)}.json"


def _identity(device: torch.device) -> dict[str, str]:
    """What constants hold for."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"gpu": gpu, "torch": torch.__version__, "triton": triton}


def save(device: torch.device, constants: Constants, fit: dict[str, Any]) -> Path:
    """Writes a device's constants, and how well they fit, in place of what was there. Returns the file."""
    path = path_for(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, **_identity(device), "fit": fit, "routes": _as_dict(constants)}
    with _replacing(path) as file:
        json.dump(content, file, indent=1)
    constants_for.cache_clear()
    return path


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[str]]:
    """A file to write, which takes the place of `path` as a whole: readers see the old one or the new one.

    Writers wait for each other. What a killed one leaves is one file at most, which the next one takes over.
    """
    temporary = path.with_suffix(".tmp")
    with _locked(temporary) as file:
        try:
            file.truncate(0)
            yield file
            file.flush()
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    """A file to append to that no other process has."""
    import fcntl  # not on Windows, where there is nothing to calibrate

    while True:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                ours = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                ours = False  # it was another writer's, and is where that one wanted it by now
            if ours:
                yield file
                return


def check_writable(device: torch.device) -> None:
    """Raises OSError where `save` could not write a device's constants."""
    path = path_for(device)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with _locked(temporary):
        temporary.unlink()


def reset(device: torch.device) -> bool:
    """Deletes a device's constants. Returns whether there were any."""
    constants_for.cache_clear()
    try:
        path_for(device).unlink()
    except FileNotFoundError:
        return False
    return True


@functools.cache
def constants_for(device: torch.device) -> Constants:
    """A device's stored constants, else sane ones from its properties; a file of no use is named in a warning."""
    path = path_for(device)
    try:
        content = json.loads(path.read_text())
        _check(content, device)
        return _from_dict(content["routes"], f"measured on {content['gpu']}, {path}")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        compat.logger.warning(
            "pkv_hf: calibration %s is ignored (%s: %s); `pkv-hf calibrate` writes a new one",
            path, type(error).__name__, error,
        )  # fmt: skip
    return from_properties(device)


def _check(content: Any, device: torch.device) -> None:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"not a calibration of format {FORMAT}")
    for key, value in _identity(device).items():
        if content.get(key) != value:
            raise ValueError(f"{key} is {content.get(key)!r}, not {value!r}")


def _as_dict(constants: Constants) -> dict[str, Any]:
    return {
        mode: {
            str(group): {route: dataclasses.asdict(measured) for route, measured in routes.items()}
            for group, routes in groups.items()
        }
        for mode, groups in constants.routes.items()
    }


def _from_dict(routes: dict[str, Any], source: str) -> Constants:
    found: dict[str, dict[int, dict[str, RouteConstants]]] = {}
    for mode in MODES:
        found[mode] = {
            int(group): {route: _constants_of(values) for route, values in of_group.items()}
            for group, of_group in routes[mode].items()
        }
        if not found[mode] or min(found[mode]) < 1:
            raise ValueError(f"no groups for mode {mode!r}")
    return Constants(found, source)


def _constants_of(values: dict[str, Any]) -> RouteConstants:
    constants = RouteConstants(**{key: float(value) for key, value in values.items()})
    if not (0 < constants.bandwidth < float("inf") and all(0 <= v < float("inf") for v in values.values())):
        raise ValueError(f"constants out of range: {values}")
    return constants
