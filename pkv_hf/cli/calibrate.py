"""`pkv-hf calibrate`: measures this GPU's constants for the policy's cost model, and stores them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pkv_hf.arguments import needs
from pkv_hf.bench import calibrate
from pkv_hf.errors import UsageError
from pkv_hf.policy.calibration import check_writable, constants_for, path_for, reset, save
from pkv_hf.routes.costs import Constants
from pkv_hf.tables import table


def main(arguments: argparse.Namespace) -> None:
    """Raises UsageError where there is no such GPU, or what it measures cannot be stored."""
    try:
        device = torch.device(arguments.device)
    except RuntimeError as error:
        raise UsageError(f"--device {arguments.device!r} is no device of torch: use cuda or cuda:N") from error
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UsageError(f"--device {arguments.device}: no such GPU here; on a CPU there is nothing to calibrate")
    if (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {arguments.device}: there are {torch.cuda.device_count()} GPUs, from cuda:0 on")
    path = path_for(device)
    if arguments.reset:
        with _writing(path):
            deleted = reset(device)
        print(json.dumps({"path": str(path), "deleted": deleted}))
        return
    if not arguments.show:
        needs("triton")
        with _writing(path):
            check_writable(device)  # before the minute that measuring takes
        constants, quality = calibrate.calibrate(device, calibrate.measure)
        with _writing(path):
            save(device, constants, quality)
    constants = constants_for(device)
    print(show(constants), end="\n\n")
    print(json.dumps({"path": str(path), "stored": path.exists()}))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}): name another folder in PKV_HF_CACHE") from error


def show(constants: Constants) -> str:
    rows = [
        (
            f"{mode} G{group} {route}",
            f"{c.bandwidth / 1e9:,.0f}",
            f"{c.min_parallel:.2f}",
            f"{c.launch_s * 1e6:.1f}",
            f"{c.plan_s * 1e6:.1f}",
        )
        for mode, groups in constants.routes.items()
        for group, routes in sorted(groups.items())
        for route, c in routes.items()
    ]
    header = ("constants", "GB/s", "programs an SM for it", "launch us", "plan us")
    return f"constants: {constants.source}\n\n{table(header, rows)}"
