"""Whether a mixer's steps are those of its module: both on the same random tokens and states, beside float32."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from pkv_hf import compat
from pkv_hf.cache.linear import LinearLayer
from pkv_hf.patches.mixers import Mixer
from pkv_hf.runtime.step import launching_on

STEPS = 3
"""Tokens, one after the other: the states that a step leaves are read by the next."""

PROMPT = 8
"""Tokens that states are made by, which are then drawn anew."""

ROUNDING = 2e-6
"""Of float32, relative to the root mean square: the device's exponentials are a few bits coarser than torch's."""


@torch.no_grad()
def agrees(mixer: Mixer, module: Any, layer_idx: int) -> bool:
    """Whether the mixer errs at most twice as much as its module does in its own dtype, beside it in float32.

    In results and in states, of one row; plus the rounding of float32. `layer_idx` is the module's own, by which it
    asks a cache. Holds the module once more, in float32, and leaves no trace of what it drew.
    """
    weight = next(parameter for parameter in module.parameters() if parameter.ndim == 2)
    device, dtype = weight.device, weight.dtype
    random = torch.Generator(device).manual_seed(layer_idx)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, device=device, dtype=torch.float32).to(dtype)

    with launching_on(device), torch.inference_mode(False):
        width = (module.o_proj if hasattr(module, "o_proj") else module.out_proj).out_features
        prompt, tokens = drawn(1, PROMPT, width), [drawn(1, 1, width) for _ in range(STEPS)]
        caches = [_cache(layer_idx) for _ in range(3)]
        try:
            _run(module, prompt, caches[0])
        except TypeError:  # it takes other arguments
            return False
        first: LinearLayer = caches[0].layers[layer_idx]
        for tensor in first.tensors:
            tensor.copy_(torch.randn(tensor.shape, generator=random, device=device))
        for cache in caches[1:]:
            cache.layers[layer_idx].copy_states(first)
        exact: LinearLayer = caches[2].layers[layer_idx]
        for held in (exact.conv_states, exact.recurrent_states):
            held.update({i: None if state is None else state.float() for i, state in held.items()})
        own = [_run(module, x, caches[0]) for x in tokens]
        try:
            ours = [mixer.step(x, caches[1].layers[layer_idx]) for x in tokens]
        except ValueError:  # for states or dtypes that no kernel takes
            return False
        in_float32 = copy.deepcopy(module).float()
        expected = [_run(in_float32, x.float(), caches[2]) for x in tokens]
        parts = [(torch.cat(ours), torch.cat(own), torch.cat(expected))]
        parts += zip(*(cache.layers[layer_idx].tensors for cache in (caches[1], caches[0], caches[2])))
    return all(_close(*part) for part in parts)


def _cache(layer_idx: int) -> Any:
    return Cache(layers=[LinearLayer(1) for _ in range(layer_idx + 1)])


def _run(module: nn.Module, x: torch.Tensor, cache: Any) -> torch.Tensor:
    """The module's own forward."""
    return module(x, **{compat.mixer_cache(module): cache})


def _close(ours: torch.Tensor, own: torch.Tensor, expected: torch.Tensor) -> bool:
    def rms(tensor: torch.Tensor) -> float:
        return float(tensor.double().square().mean().sqrt())

    bound = 2 * rms(own.double() - expected) + ROUNDING * rms(expected)
    return ours.shape == expected.shape and ours.dtype == own.dtype and rms(ours.double() - expected) <= bound
