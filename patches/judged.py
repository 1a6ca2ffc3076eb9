"""When a result of ours is as good as that of a module's own code: both in the model's dtype, beside float32."""

from __future__ import annotations

import math

ERROR = 2.0
"""Our error over that of the model's own code in the same dtype, at most."""

ROUNDING = 1e-6
"""Of the results, what may be lost beside: float32 has no other dtype to be judged by."""

JUDGED = 256
"""Elements of results that errors are taken over, at least."""


def excess(ours: float, own: float, exact: float) -> float:
    """Our error over what it may be, by root mean squares of the errors and of the exact results.

    Infinite where the module's own code overflows, by which nothing can be judged; NaN for a result of ours with one.
    """
    return ours / (ERROR * own + ROUNDING * exact) if math.isfinite(own) else math.inf
