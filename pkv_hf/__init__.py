"""Fast long-context `generate()` for HuggingFace transformers: KV caches in pages, decode kernels that read them there.

`patch(model)` is all that an existing script needs. See `PagedCache` for the cache alone, `report` for what ran and
`explain` for why it took the route that it took.
"""

from pathlib import Path

if not (Path(__file__).parent / "kernels").is_dir():  # in a clone, which has them beside this folder
    __path__.append(str(Path(__file__).parent.parent))

from pkv_hf import compat
from pkv_hf.errors import PoolAllocationError, RouteError, UnsupportedModelError, UnsupportedVersionError
from pkv_hf.version import __version__

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
    "explain",
    "patch",
    "patched",
    "plan",
    "prefix",
    "report",
    "unpatch",
]

if compat.SUPPORTED:
    from pkv_hf.cache.paged import CacheMemory, PagedCache
    from pkv_hf.memory.planner import MemoryPlan, plan
    from pkv_hf.patch import patch, patched, unpatch
    from pkv_hf.policy.choose import Decision
    from pkv_hf.prefix import Prefix, prefix
    from pkv_hf.report import Report, explain, report
    from pkv_hf.routes.base import StepShape
else:  # importing does not fail, using does
    globals().update(dict.fromkeys(set(__all__) - set(globals()), compat.refuse))
