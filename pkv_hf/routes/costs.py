"""What a decode step costs on a route: PersistentKV's model, and the constants that it takes of a GPU."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from pkv_hf.kernels.launch import PROGRAMS_PER_SM

MODES = ("graph", "eager")
"""A launch costs the device's time where a CUDA graph replays it, and the host's where Python makes it."""

FALLBACK_BANDWIDTH = 0.5e12
"""Bytes a second that a GPU is taken to read where neither a calibration nor its properties say."""


@dataclass(frozen=True)
class Work:
    """What a route makes of one layer of a step."""

    kv_bytes: int
    """K and V that are read."""
    parallel: float
    """C_r, programs a multiprocessor that read all the time: all tokens over those of the longest program, by
    multiprocessors. Where one program has more to do than the others, it decides."""
    launches: float
    """L_r; what is launched once a step counts by its share in a layer."""
    merge_bytes: int = 0
    """Partial results, written and read."""


@dataclass(frozen=True)
class RouteConstants:
    """What a route reaches on a GPU, in one mode, for one number of query heads a KV head."""

    bandwidth: float
    """β, bytes a second."""
    min_parallel: float
    """C_min, programs a multiprocessor that it takes to reach β."""
    launch_s: float
    """λ, seconds a launch, a kernel's ramp-up included."""
    plan_s: float = 0.0
    """Seconds of planning on the host, once a step."""


@dataclass(frozen=True)
class Constants:
    """A GPU's constants: by mode, by query heads a KV head, by route."""

    routes: dict[str, dict[int, dict[str, RouteConstants]]]
    source: str
    """Where they come from, in words."""

    def of(self, mode: str, group: int) -> dict[str, RouteConstants]:
        """By route, those of the group nearest (in ratio) to the one asked for."""
        groups = self.routes[mode]
        return groups[min(groups, key=lambda measured: abs(math.log(measured / group)))]


def predict(work: Work, constants: RouteConstants, layers: int = 1) -> float:
    """Seconds that a layer's attention takes: KVBytes/β · max(1, C_min/C_r) + L_r·λ + MergeBytes_r/β.

    The model of PersistentKV (arXiv 2606.26666), with constants for each route, and planning on the host shared by the
    step's layers.
    """
    read = work.kv_bytes * max(1.0, constants.min_parallel / work.parallel) + work.merge_bytes
    return read / constants.bandwidth + work.launches * constants.launch_s + constants.plan_s / layers


def from_properties(device: torch.device) -> Constants:
    """Constants for a GPU that was never calibrated: nine tenths of its memory's rate, and launches as usual ones.

    The workqueue's, which look for their rows first, take 1 us more (two a layer took 2 to 3 more on an H100).
    """
    bandwidth = 0.9 * (_memory_rate(device) or FALLBACK_BANDWIDTH)
    launch_s = {"graph": {"split": 4e-6, "workqueue": 5e-6}, "eager": {"split": 20e-6, "workqueue": 20e-6}}
    routes = {
        mode: {
            4: {route: RouteConstants(bandwidth, PROGRAMS_PER_SM, seconds) for route, seconds in launch_s[mode].items()}
        }
        for mode in MODES
    }
    return Constants(routes, "the device's properties; `pkv-hf calibrate` measures")


@functools.cache
def _memory_rate(device: torch.device) -> float:
    """Bytes a second of a GPU's memory by its clock and width, 0 where the driver does not say."""
    if device.type != "cuda":
        return 0.0
    try:
        from triton.runtime import driver

        properties = driver.active.utils.get_device_properties(device.index or 0)
    except (ImportError, RuntimeError):
        return 0.0
    return properties.get("mem_clock_rate", 0) * 1e3 * 2 * properties.get("mem_bus_width", 0) / 8
