"""Activations that the linear and the elementwise kernels share; `kernels.reference.ACTIVATIONS` defines them."""

from __future__ import annotations

import triton
import triton.language as tl

NAMES = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def check_activation(name: str) -> None:
    """Raises ValueError for an activation that the kernels do not have."""
    if name not in NAMES:
        raise ValueError(f"activation={name!r} is not one of {', '.join(NAMES)}")


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """The activation of a float32 x."""
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh z) is 1 / (1 + exp(-2 z))
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        y = tl.where(x < 0, 0.0, x)  # NaN stays
        if ACTIVATION == "relu2":
            y = y * y
    return y
