"""`pkv-hf env`: versions, GPUs and settings, for a bug report."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.utils import collect_env

from pkv_hf import compat
from pkv_hf.version import __version__

PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "flashinfer-python", "bitsandbytes", "peft", "torchao",
    "gptqmodel", "kernels",
)  # fmt: skip
SETTINGS = (
    "PKV_HF_CACHE", "TRITON_INTERPRET", "TRITON_CACHE_DIR", "TRANSFORMERS_VERBOSITY", "HF_HUB_OFFLINE",
    "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
"""Environment variables that change what pkv_hf does, or what it measures."""


def main(_: argparse.Namespace) -> None:
    found = {
        "pkv_hf": __version__,
        "pkv_hf is in": str(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in PACKAGES},
        "transformers tested": f"{compat.OLDEST_TRANSFORMERS} to {compat.NEWEST_TRANSFORMERS}",
        "CUDA": torch.version.cuda,
        "driver": collect_env.get_nvidia_driver_version(collect_env.run) if torch.cuda.is_available() else None,
        **{f"cuda:{index}": _gpu(index) for index in range(torch.cuda.device_count())},
        **{name: os.environ[name] for name in SETTINGS if name in os.environ},
    }
    width = max(map(len, found))
    print(*(f"{name:{width}}  {value or 'none'}" for name, value in found.items()), sep="\n", end="\n\n")
    print(json.dumps(found))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu(index: int) -> str:
    """A GPU's name, kind and memory, and what the policy knows of it."""
    properties = torch.cuda.get_device_properties(index)
    text = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.1f} GiB"
    if not compat.SUPPORTED:
        return text
    from pkv_hf.policy.calibration import constants_for

    return f"{text}; policy's constants: {constants_for(torch.device('cuda', index)).source}"
