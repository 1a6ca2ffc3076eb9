"""What the kernels of one step of linear attention share: activations, and checks of arguments."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.launch import DTYPES, Remembered, described

BLOCK_STATES = 4096
"""Elements of a float32 state that a program of four warps holds in registers, 32 a thread."""


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), exact where that is small, which log(1 + u) is not.

    log(1 + u) = 2 atanh(u / (2 + u)), whose series needs eight terms for u up to 1.
    """
    u = tl.exp(-tl.abs(x))
    s = u / (2.0 + u)
    t = s * s
    series = 1 / 9 + t * (1 / 11 + t * (1 / 13 + t / 15))
    series = 1.0 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * series)))
    return tl.maximum(x, 0.0) + 2.0 * s * series


_checked: Remembered[None] = Remembered()


def check(
    rows: dict[str, tuple[torch.Tensor, int]],
    whole: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]],
    state: tuple[torch.Tensor, tuple[int, ...]],
) -> None:
    """Raises ValueError, naming the argument, for what the kernels cannot take.

    `rows` are tensors `[rows, width]` with their widths, of one dtype and any stride between rows; `whole` are
    contiguous tensors, or None, with their shapes, of any dtype; `state` is the state with its shape, contiguous.
    """
    given = [*rows.values(), *whole.values(), state]
    key = (*described(*(tensor for tensor, _ in given)), *(wanted for _, wanted in given))
    if key in _checked:
        return
    first = next(iter(rows.values()))[0]
    for name, (tensor, width) in rows.items():
        if tensor.dtype not in DTYPES or tensor.dtype != first.dtype or tensor.stride(-1) != 1:
            raise ValueError(f"{name} is {tensor.dtype} with strides {tensor.stride()}: want {first.dtype}, contiguous")
        if tensor.shape != (len(first), width):
            raise ValueError(f"{name} is {list(tensor.shape)}: want [{len(first)}, {width}]")
    for name, (part, shape) in {**whole, "state": state}.items():
        if part is not None and (part.shape != shape or not part.is_contiguous() or part.dtype not in DTYPES):
            raise ValueError(f"{name} is {part.dtype} {list(part.shape)}: want contiguous {list(shape)}")
        if part is not None and part.device != first.device:
            raise ValueError(f"{name} is on {part.device}, the rows on {first.device}: move one to the other")
    _checked[key] = None
