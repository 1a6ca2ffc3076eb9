"""The residual stream of a layer in a decode step: norms, and sums with what branches give, in few launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pkv_hf.patches.description import Branch, Norm

TAKEN = "pkv_hf_normed"
"""The attribute of a layer's result that holds the norm that the next layer begins with, taken already."""


def kernel_takes(modules: list[Any], x: torch.Tensor) -> bool:
    """Whether modules are plain linear layers, with or without biases alike, whose products with x are better ours.

    A quantised or sharded weight can be a subclass of tensor in a plain layer, and give its dtype as the plain one's.
    """
    from pkv_hf.kernels.linear import DTYPES, MAX_ROWS, outruns_cublas

    return (
        x.dtype in DTYPES
        and len(x) <= MAX_ROWS
        and all(type(module) is nn.Linear and type(module.weight) is nn.Parameter for module in modules)
        and all(module.weight.dtype == x.dtype and module.weight.is_contiguous() for module in modules)
        and len({module.bias is None for module in modules}) == 1
        and outruns_cublas(x, sum(len(module.weight) for module in modules))
    )


class Normed:
    """x `[rows, width]`, and a norm of it that is still to be taken: one row's goes with the product."""

    def __init__(self, x: torch.Tensor, norm: Norm | None = None) -> None:
        self.x = x
        self.norm = norm

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of a product that takes the norm first."""
        if self.norm is None:
            return {}
        return {"norm": self.norm.module.weight, "eps": self.norm.eps, "offset": self.norm.offset}


class Stream:
    """Hidden states `[B * q_len, width]` on their way through a layer."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.shape = hidden.shape
        self.hidden = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        self.source = self.hidden
        """What the branches at hand are of."""
        norm, normed, version = getattr(hidden, TAKEN, (None, self.hidden, None))
        if version != hidden._version:  # the decoder has written into them since
            norm = None
        self._taken: tuple[Norm | None, torch.Tensor, torch.Tensor] = norm, self.hidden, normed

    def normed(self, norm: Norm | None, folds: bool) -> Normed:
        """The source, normed; where the product `folds` the norm of one row, that is left to it."""
        if norm is None:
            return Normed(self.source)
        if self._taken[0] != norm or self._taken[1] is not self.source:
            if folds and norm.kind == "rms" and len(self.source) == 1:
                return Normed(self.source, norm)
            self._taken = norm, self.source, _normed(norm, self.source)
        return Normed(self._taken[2])

    def add(self, module: nn.Module | None, x: torch.Tensor, branch: Branch, following: Norm | None) -> None:
        """Adds what a branch ends with, a module of x or x itself; takes the `following` norm in one."""
        from pkv_hf.kernels.elementwise import add_norms
        from pkv_hf.kernels.linear import linear

        after, scale = branch.after, branch.scale
        if module is not None and kernel_takes([module], x):
            if after is None:
                self.hidden = linear(x, [module.weight], [module.bias], residual=self.hidden, scale=scale)
                return
            y = linear(x, [module.weight], [module.bias])
        else:
            y = (x if module is None else module(x)).contiguous()
        if after is not None and after.kind != "rms":
            y, after = _normed(after, y), None
        if following is not None and following.kind != "rms":
            following = None
        total, normed = add_norms(y, self.hidden, _settings(after), _settings(following), scale=scale)
        self.hidden, self._taken = total, (following, total, normed)

    def result(self, following: Norm | None) -> torch.Tensor:
        """The hidden states in their shape, and with them the norm that the next layer begins with, if it is taken."""
        hidden = self.hidden.view(self.shape)
        norm, of, normed = self._taken
        if following is not None and norm == following and of is self.hidden:
            setattr(hidden, TAKEN, (norm, normed, hidden._version))
        return hidden


def _settings(norm: Norm | None) -> tuple[torch.Tensor, float, float] | None:
    return None if norm is None else (norm.module.weight, norm.eps, norm.offset)


def _normed(norm: Norm, x: torch.Tensor) -> torch.Tensor:
    from pkv_hf.kernels.elementwise import layer_norm, rms_norm

    if norm.kind == "layer":
        return layer_norm(x, norm.module.weight, norm.module.bias, norm.eps, offset=norm.offset)[0]
    return rms_norm(x, norm.module.weight, norm.eps, offset=norm.offset)[0]
