"""Fast long-context `generate()` for HuggingFace transformers: KV caches in pages, decode kernels that read them there.

`patch(model)` is all that an existing script needs. See `PagedCache` for the cache alone and `report` for what ran.
"""

from pkv_hf.cache import CacheMemory, PagedCache
from pkv_hf.errors import PoolAllocationError, RouteError, UnsupportedModelError, UnsupportedVersionError
from pkv_hf.patch import patch, patched, unpatch
from pkv_hf.report import Report, report
from pkv_hf.version import __version__

__all__ = [
    "CacheMemory",
    "PagedCache",
    "PoolAllocationError",
    "Report",
    "RouteError",
    "UnsupportedModelError",
    "UnsupportedVersionError",
    "__version__",
    "patch",
    "patched",
    "report",
    "unpatch",
]
