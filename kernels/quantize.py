"""K and V in 8 bits: one scale for each token and head, as pages hold them."""

from __future__ import annotations

import torch

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Quantised dtypes, and the value that the largest element of a vector becomes."""

AT_ONCE = 1 << 23
"""Elements whose float32 copies stand side by side."""


def quantize(states: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors `[..., tokens, head_dim]` as `dtype` (int8 or float8_e4m3fn) times a scale each, float32 `[..., tokens]`.

    scale = max |x| / largest, values = x / scale, to nearest even; a vector of zeros has scale 0.
    """
    if states.numel() <= AT_ONCE:
        return _quantize(states, dtype)
    values = torch.empty(states.shape, dtype=dtype, device=states.device)
    scales = torch.empty(states.shape[:-1], dtype=torch.float32, device=states.device)
    count = max(AT_ONCE * states.shape[-2] // states.numel(), 1)
    for some, *of_some in zip(states.split(count, dim=-2), values.split(count, dim=-2), scales.split(count, dim=-1)):
        for held, made in zip(of_some, _quantize(some, dtype)):
            held.copy_(made)
    return values, scales


def _quantize(states: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    exact = states.float()
    largest = exact.abs().amax(dim=-1)
    scales = largest / torch.full_like(largest, LARGEST[dtype])  # CUDA multiplies by the inverse of a number
    values = torch.where(scales[..., None] > 0, exact / scales[..., None], 0.0)
    return (values.round() if dtype == torch.int8 else values).to(dtype), scales


def dequantize(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The vectors `[..., head_dim]` that `quantize` stands for, multiplied in float32 (in float64 for that dtype)."""
    wide = torch.promote_types(torch.float32, dtype)
    return (values.to(wide) * scales.to(wide)[..., None]).to(dtype)
