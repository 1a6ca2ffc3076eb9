"""The residual stream of a layer in a decode step: norms, and sums with what branches give, in few launches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pkv_hf.patches.description import MLP, Attention, Branch, Norm
from pkv_hf.patches.projections.base import Modules, Normed, Projection
from pkv_hf.patches.projections.registry import Kinds

if TYPE_CHECKING:
    from pkv_hf.kernels.products.epilogue import Parts

HANDED_ON = "pkv_hf_handed_on"
"""The attribute of a layer's result that holds the norm that the next layer begins with, where it is taken already."""


def projections(body: Any) -> Modules:
    """The linear layers that a branch begins with, none where it is a module that is called."""
    if isinstance(body, Attention):
        return body.inputs
    return tuple(each for each in (body.gate, body.up) if each is not None) if isinstance(body, MLP) else ()


def acted(mlp: MLP, kind: Projection, x: Normed) -> torch.Tensor:
    """What the down projection takes of an MLP that multiplies by nothing from outside, `[rows, intermediate]`."""
    return kind.linear(x, activation=mlp.activation) if mlp.gate is None else kind.gated(x, mlp.activation)


class Stream:
    """Hidden states `[B * q_len, width]` on their way through a layer."""

    def __init__(self, hidden: torch.Tensor, kinds: Kinds) -> None:
        self.kinds = kinds
        self.shape = hidden.shape
        self.hidden = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        self.source = self.hidden
        """What the branches at hand are of."""
        norm, normed, version = getattr(hidden, HANDED_ON, (None, self.hidden, None))
        if version != hidden._version:  # the decoder has written into them since
            norm = None
        self._taken: tuple[Norm | None, torch.Tensor, torch.Tensor] = norm, self.hidden, normed

    def normed(self, branch: Branch) -> tuple[Normed, Projection | None]:
        """The source, normed as a branch begins, and the kind of the projections that it begins with, if any.

        An RMSNorm of one row, with a weight, is left to a kind that fuses.
        """
        modules, norm = projections(branch.body), branch.before
        kind = self.kinds(modules, self.source) if modules else None
        if norm is None:
            return Normed(self.source), kind
        if self._taken[0] != norm or self._taken[1] is not self.source:
            folds = norm.kind == "rms" and norm.weight is not None and len(self.source) == 1
            if folds and kind is not None and kind.fuses:
                return Normed(self.source, norm), kind
            self._taken = norm, self.source, take_norm(norm, self.source)
        return Normed(self._taken[2]), kind

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

        after, before, scale = branch.after, self._along(following), branch.scale
        kind = None if module is None else self.kinds((module,), x)
        y: torch.Tensor | Parts | None = x
        if kind is not None:
            joined = before is not None or gain is not None if after is None else after.kind == "rms"
            y = kind.in_parts(x) if joined and len(x) > 1 else None  # one row's product is never cut
            if y is None and kind.fuses and after is None and gain is None:
                self.hidden = kind.linear(Normed(x), residual=self.hidden, scale=scale)
                return
            y = kind.linear(Normed(x)) if y is None else y
        if isinstance(y, torch.Tensor):
            y = y.contiguous()
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
