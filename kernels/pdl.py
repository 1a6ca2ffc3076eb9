"""Programmatic dependent launch (sm_90 and newer): a kernel is set up while the one before it still runs.

Every kernel of a decode step calls `wait` before it touches what the kernel before it wrote or reads, and `release`,
only after that, where the next one may be set up: small kernels at once, those that fill the device when their loop is
done, since a kernel that waits holds registers and shared memory. So what the kernel before the one before wrote is
there when a kernel begins: bounds and block tables, which are there before a layer's projections, need no wait.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.launch import capability


@triton.jit
def wait(PDL: tl.constexpr):
    """Waits for the kernel before to have finished."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release(PDL: tl.constexpr):
    """Lets the next kernel be set up."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@functools.cache
def overlaps(device: torch.device) -> bool:
    """What kernels are given as PDL."""
    return device.type == "cuda" and capability(device) >= (9, 0)


@functools.cache
def options(device: torch.device) -> dict[str, bool]:
    """What launches of such kernels are given beside."""
    return {"launch_pdl": True} if overlaps(device) else {}
