"""The norm that a decoder ends with: by our kernel in the steps that fuse layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pkv_hf.compat import logger
from pkv_hf.patches.description import Norm, bind
from pkv_hf.patches.judged import JUDGED, excess
from pkv_hf.patches.parts.norms import norm_of
from pkv_hf.patches.reading import drawn, drawn_vectors, twin_of
from pkv_hf.patches.stream import take_norm
from pkv_hf.patches.trace import Call
from pkv_hf.replaced import original
from pkv_hf.runtime.step import current_step


def norms_of(decoder: nn.Module) -> list[nn.Module]:
    """The decoder's own modules that hold vectors alone."""
    held = [(child, list(child.parameters())) for child in decoder.children() if not list(child.children())]
    return [child for child, parameters in held if parameters and all(each.ndim == 1 for each in parameters)]


def norm_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of such a module's `forward`: by the kernel in the steps that fuse layers."""
    step: Any = None if torch.compiler.is_compiling() else current_step()
    norm = None if step is None else step.fusion.norms.get(self)
    if norm is None or len(args) != 1 or kwargs:
        return original(self, "forward")(*args, **kwargs)
    x = args[0]
    return take_norm(norm, x.reshape(-1, x.shape[-1]).contiguous()).view(x.shape)


def fused_norms(decoder: Any) -> dict[nn.Module, Norm]:
    """The norms of a decoder that our kernel computes as their own code does; all others run as they are."""
    found = {}
    for module in norms_of(decoder):
        try:
            norm = _read(module)
            if norm is not None and _agrees(module, norm):
                found[module] = norm
        except Exception as error:  # of a module that came after patch(), of a kernel, for memory
            logger.debug("pkv_hf: a %s runs as it is: %s", type(module).__name__, error)
    return found


def _read(module: nn.Module) -> Norm | None:
    twin = twin_of(module)
    vector = next(twin.parameters())
    x = drawn(1, 4, len(vector), like=vector)
    with drawn_vectors(twin):
        norm = norm_of(Call("", twin, (x,), {}, x, twin(x)))
    return None if norm is None else bind(norm, module)


def _agrees(module: nn.Module, norm: Norm) -> bool:
    vector = next(module.parameters())
    x = drawn(max(2, -(-JUDGED // len(vector))), len(vector), like=vector)
    exact = twin_of(module)(x.float()).double()
    own, ours = (
        float((found.double() - exact).square().mean().sqrt())
        for found in (original(module, "forward")(x), take_norm(norm, x))
    )
    return excess(ours, own, float(exact.square().mean().sqrt())) <= 1
