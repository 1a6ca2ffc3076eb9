"""Fast long-context `generate()` for HuggingFace transformers: KV caches in pages, decode kernels that read them there.

`patch(model)` is all that an existing script needs. See `PagedCache` for the cache alone, `report` for what ran and
`explain` for why it took the route that it took.

Importing this imports neither torch nor transformers: what it names is loaded when it is first used.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkv_hf.version import __version__

if not (Path(__file__).parent / "kernels").is_dir():  # in a clone, which has them beside this folder
    __path__.append(str(Path(__file__).parent.parent))

if TYPE_CHECKING:
    from pkv_hf.cache.paged import PagedCache
    from pkv_hf.cache.sizes import CacheMemory
    from pkv_hf.errors import PoolAllocationError, RouteError, UnsupportedModelError, UnsupportedVersionError
    from pkv_hf.memory.planner import MemoryPlan, plan
    from pkv_hf.patching import patch, patched, unpatch
    from pkv_hf.policy.choose import Decision
    from pkv_hf.prefixes import Prefix, clear_prefix_cache, prefix
    from pkv_hf.reporting import Report, explain, report
    from pkv_hf.routes.base import StepShape

__all__ = [
    "CacheMemory",
    "Decision",
    "MemoryPlan",
    "PagedCache",
    "PoolAllocationError",
    "Prefix",
    "Report",
    "RouteError",
    "StepShape",
    "UnsupportedModelError",
    "UnsupportedVersionError",
    "__version__",
    "clear_prefix_cache",
    "explain",
    "patch",
    "patched",
    "plan",
    "prefix",
    "report",
    "unpatch",
]

_ERRORS = "pkv_hf.errors"
_PLACES = {
    _ERRORS: ("PoolAllocationError", "RouteError", "UnsupportedModelError", "UnsupportedVersionError"),
    "pkv_hf.cache.paged": ("PagedCache",),
    "pkv_hf.cache.sizes": ("CacheMemory",),
    "pkv_hf.memory.planner": ("MemoryPlan", "plan"),
    "pkv_hf.patching": ("patch", "patched", "unpatch"),
    "pkv_hf.policy.choose": ("Decision",),
    "pkv_hf.prefixes": ("Prefix", "clear_prefix_cache", "prefix"),
    "pkv_hf.reporting": ("Report", "explain", "report"),
    "pkv_hf.routes.base": ("StepShape",),
}
"""Modules by what they give. None is called as a name in it is: importing it would hide that name."""


if not TYPE_CHECKING:  # type checkers would take any name for one

    def __getattr__(name: str) -> Any:
        place = next((module for module, names in _PLACES.items() if name in names), None)
        if place is None:
            raise AttributeError(f"module 'pkv_hf' has no attribute {name!r}")
        compat = importlib.import_module("pkv_hf.compat")
        served = compat.SUPPORTED or place == _ERRORS  # importing does not fail with another transformers, using does
        globals()[name] = getattr(importlib.import_module(place), name) if served else compat.refuse
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
