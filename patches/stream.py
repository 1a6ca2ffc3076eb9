"""The residual stream of a layer in a decode step: norms, and sums with what branches give, in few launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pkv_hf.patches.description import MLP, Attention, Branch, Norm

HANDED_ON = "pkv_hf_handed_on"
"""The attribute of a layer's result that holds the norm that the next layer begins with, where it is taken already."""


def projections(body: Any) -> list[Any]:
    """The linear layers that a branch begins with, none where it is a module that is called."""
    if isinstance(body, Attention):
        return list(body.inputs)
    return [each for each in (body.gate, body.up) if each is not None] if isinstance(body, MLP) else []


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
    """x `[rows, width]`, and the norm that its product is to take before."""

    def __init__(self, x: torch.Tensor, norm: Norm | None = None) -> None:
        self.x = x
        self.norm = norm

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of a product that takes the norm first."""
        norm = self.norm
        return {} if norm is None else {"norm": norm.weight, "eps": norm.eps, "offset": norm.offset}


class Stream:
    """Hidden states `[B * q_len, width]` on their way through a layer."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.shape = hidden.shape
        self.hidden = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        self.source = self.hidden
        """What the branches at hand are of."""
        norm, normed, version = getattr(hidden, HANDED_ON, (None, self.hidden, None))
        if version != hidden._version:  # the decoder has written into them since
            norm = None
        self._taken: tuple[Norm | None, torch.Tensor, torch.Tensor] = norm, self.hidden, normed

    def normed(self, branch: Branch) -> Normed:
        """The source, normed as a branch begins; an RMSNorm of one row, with a weight, is left to a product of ours."""
        norm = branch.before
        if norm is None:
            return Normed(self.source)
        if self._taken[0] != norm or self._taken[1] is not self.source:
            folds = norm.kind == "rms" and norm.weight is not None and len(self.source) == 1
            if folds and kernel_takes(projections(branch.body), self.source):
                return Normed(self.source, norm)
            self._taken = norm, self.source, take_norm(norm, self.source)
        return Normed(self._taken[2])

    def add(
        self,
        module: nn.Module | None,
        x: torch.Tensor,
        branch: Branch,
        following: Branch | None,
        gain: torch.Tensor | None = None,
    ) -> None:
        """Adds what a branch ends with, a module of x or x itself; `gain` `[1]` multiplies the sum.

        A sum in a launch of its own takes the norm that the `following` branch begins with along; so does that of the
        parts of a product.
        """
        from pkv_hf.kernels.elementwise import add_norms
        from pkv_hf.kernels.linear import in_parts, linear
        from pkv_hf.kernels.products.epilogue import Parts

        after, before, scale = branch.after, self._along(following), branch.scale
        ours: Any = module if module is not None and kernel_takes([module], x) else None
        y: torch.Tensor | Parts | None = None
        joined = before is not None or gain is not None if after is None else after.kind == "rms"
        if ours is not None and joined and len(x) > 1:  # one row's product is never cut
            y = in_parts(x, ours.weight, ours.bias)
        if y is None and ours is not None and after is None and gain is None:
            self.hidden = linear(x, [ours.weight], [ours.bias], residual=self.hidden, scale=scale)
            return
        if y is None:
            if ours is not None:
                y = linear(x, [ours.weight], [ours.bias])
            else:
                y = (x if module is None else module(x)).contiguous()
            if after is not None and after.kind != "rms":
                y, after = take_norm(after, y), None
        by = None if gain is None else gain.to(self.hidden.dtype)
        total, normed = add_norms(y, self.hidden, _settings(after), _settings(before), scale=scale, gain=by)
        self.hidden, self._taken = total, (before, total, normed)

    def _along(self, following: Branch | None) -> Norm | None:
        """The norm that a branch begins with, where a sum takes it along: an RMSNorm whose weight is on its device."""
        norm = None if following is None else following.before
        if norm is None or norm.kind != "rms":
            return None
        weight = norm.weight
        return norm if weight is None or weight.device == self.hidden.device else None

    def result(self, following: Branch | None) -> torch.Tensor:
        """The hidden states in their shape, and with them what the layer of the `following` branch begins with."""
        hidden = self.hidden.view(self.shape)
        norm, of, normed = self._taken
        if following is not None and norm == following.before and of is self.hidden:
            setattr(hidden, HANDED_ON, (norm, normed, hidden._version))
        return hidden


def _settings(norm: Norm | None) -> tuple[torch.Tensor, float, float] | None:
    return None if norm is None else (norm.weight, norm.eps, norm.offset)


def take_norm(norm: Norm, x: torch.Tensor) -> torch.Tensor:
    from pkv_hf.kernels.elementwise import layer_norm, rms_norm

    if norm.kind == "layer":
        return layer_norm(x, norm.weight, getattr(norm.module, "bias", None), norm.eps, offset=norm.offset)[0]
    return rms_norm(x, norm.weight, norm.eps, offset=norm.offset)[0]
