"""MLPs beside experts, shared ones and dense ones: by our products in the steps that run experts by our kernels."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import nn

from pkv_hf.compat import logger
from pkv_hf.patches.description import MLP, bind
from pkv_hf.patches.experts.described import holds_experts
from pkv_hf.patches.judged import JUDGED, excess
from pkv_hf.patches.parts.mlps import mlp_of
from pkv_hf.patches.projections.base import Normed
from pkv_hf.patches.projections.registry import Kinds
from pkv_hf.patches.reading import alike, drawn, drawn_vectors, twin_of
from pkv_hf.patches.stream import acted, projections
from pkv_hf.patches.trace import Call, traced
from pkv_hf.replaced import original
from pkv_hf.runtime.fusion import Multiplied
from pkv_hf.runtime.step import current_step, launching_on

ROWS = 2
"""Of random hidden states that the products are judged on, beside one row: one and more have different kernels."""


def mlps_of(decoder: nn.Module) -> Iterator[nn.Module]:
    """The modules beside experts that are made of two or three modules with weights."""
    for parent in decoder.modules():
        children = list(parent.children())
        if not any(map(holds_experts, children)):
            continue
        for child in children:
            weighted = [each for each in child.children() if next(each.parameters(), None) is not None]
            if len(weighted) in (2, 3) and not (child._parameters or child._buffers or holds_experts(child)):
                yield child


def mlp_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of such a module's `forward`: by its description in the steps that have one."""
    step: Any = None if torch.compiler.is_compiling() else current_step()
    mlp = None if step is None else step.fusion.mixtures.beside.get(self)
    if mlp is None or len(args) != 1 or kwargs:
        return original(self, "forward")(*args, **kwargs)
    return mlp(args[0])


class Beside:
    """An MLP, bound to its modules, whose products are those of the kinds that take them."""

    def __init__(self, mlp: MLP) -> None:
        self.mlp, self.kinds = mlp, Kinds()
        for modules in (projections(mlp), (mlp.down,)):
            self.kinds.read(modules)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows, mlp = x.reshape(-1, x.shape[-1]).contiguous(), self.mlp
        taken = acted(mlp, self.kinds(projections(mlp), rows), Normed(rows))
        return self.kinds((mlp.down,), taken).linear(Normed(taken)).view(*x.shape[:-1], -1)

    def count(self, found: Multiplied, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.kinds.count(found, rows, dtype, device)


class BelievedMLPs:
    """What is known of the MLPs beside experts in one patched model, by modules that are alike."""

    def __init__(self) -> None:
        self._known: dict[Hashable, MLP | None] = {}

    def __call__(self, decoder: nn.Module) -> dict[nn.Module, Beside]:
        """The MLPs of a decoder on its device that are multiplied by description; others run their own forward."""
        found = {}
        for module in mlps_of(decoder):
            key = alike(module)
            if key not in self._known:
                self._known[key] = _believed(module)
            if (mlp := self._known[key]) is not None:
                found[module] = Beside(bind(mlp, module))
        return found


def _believed(module: nn.Module) -> MLP | None:
    try:
        weight = next(module.parameters())
        width: Any = next(each.in_features for each in module.modules() if hasattr(each, "in_features"))
        mlp = _read(module, drawn(3, width, like=weight).float())
        with launching_on(weight.device):
            return mlp if mlp is not None and _agrees(module, mlp, weight, width) else None
    except Exception as error:  # of a module that is no MLP, of a kernel, for memory
        logger.debug("pkv_hf: a %s runs as it is: %s", type(module).__name__, error)
        return None


def _read(module: nn.Module, x: torch.Tensor) -> MLP | None:
    """What a module computes, by a run of a float32 copy of it."""
    twin = twin_of(module)
    with drawn_vectors(twin):
        trace = traced(twin, x, {}, None)
        return None if trace is None else mlp_of(trace, Call("", twin, (x,), {}, x, trace.output))


def _agrees(module: nn.Module, mlp: MLP, like: torch.Tensor, width: int) -> bool:
    """Whether the products err at most twice as much as the module's own code, both beside float32."""
    twin, ours = twin_of(module), Beside(bind(mlp, module))
    for rows in (1, ROWS):
        squares, errors = 0.0, [0.0, 0.0]
        for _ in range(-(-JUDGED // (rows * width))):
            x = drawn(rows, width, like=like)
            exact = twin(x.float()).double()
            squares += float(exact.square().mean())
            for i, found in enumerate((ours(x), original(module, "forward")(x))):
                errors[i] += float((found.double() - exact).square().mean())
        error, own_error = (each**0.5 for each in errors)
        if not excess(error, own_error, squares**0.5) <= 1:
            return False
    return True
