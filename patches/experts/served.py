"""Experts by our kernels in the steps on static buffers: which modules, and what takes their forwards' place.

A module's own router, shared experts and sums stay what they are, the model's own code around this one module.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pkv_hf.errors import first_line
from pkv_hf.patches.experts.beside import BelievedMLPs
from pkv_hf.patches.experts.dense import chosen_rows, takes_rows_alone
from pkv_hf.patches.experts.described import (
    COPIED,
    DOWN,
    LIVELY,
    drawn_call,
    few,
    holds_experts,
    not_stacked,
    read,
    stacked,
)
from pkv_hf.patches.experts.routers import BelievedRouters
from pkv_hf.patches.judged import ERROR, JUDGED, excess
from pkv_hf.patches.reading import alike
from pkv_hf.replaced import original
from pkv_hf.runtime.fusion import Mixtures
from pkv_hf.runtime.step import current_step, launching_on

if TYPE_CHECKING:
    from pkv_hf.kernels.experts.reference import Form, Stacked


def experts_of(decoder: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """The modules of a decoder that hold experts, each with the modules that it is wrapped in."""
    for name, module in decoder.named_modules():
        if holds_experts(module):
            wrapped = [name[: -len(".base_layer" * i)] for i in range(1, 1 + _wrappers(name))]
            yield module, [decoder.get_submodule(each) for each in wrapped]


def _wrappers(name: str) -> int:
    """How many of the last parts of a module's name say that it is inside of an adapter."""
    count = 0
    while name.endswith(".base_layer" * (count + 1)):
        count += 1
    return count


def experts_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of such a module's `forward`: by the kernels for the rows of a step that has it among its own."""
    step: Any = None if torch.compiler.is_compiling() else current_step()
    mixtures = None if step is None else step.fusion.mixtures
    if mixtures is None or self not in mixtures.forms:
        return original(self, "forward")(*args, **kwargs)
    from pkv_hf.kernels.experts.experts import experts, most_rows

    of = stacked(self, mixtures.forms[self])
    call = _call(self, of, (*args, *kwargs.values()))
    if call is None:  # it will be called so again
        del mixtures.forms[self]
        mixtures.own[f"a {type(self).__name__} is called with more than rows in its dtype and their choices"] += 1
    if call is None or not 1 <= len(call[0]) <= most_rows(call[0].device):
        return original(self, "forward")(*args, **kwargs)
    return experts(*(tensor.contiguous() for tensor in call), of)


def _call(module: Any, of: Stacked, call: tuple[Any, ...]) -> tuple[torch.Tensor, ...] | None:
    """x, index and weights of a call; None for one that the module has to answer itself."""
    if not all(isinstance(each, torch.Tensor) and each.ndim == 2 for each in call):
        return None
    if "parametrizations" in module._modules or call[0].dtype != of.down.dtype:
        return None
    if takes_rows_alone(module):
        return chosen_rows(call[0], of) if len(call) == 1 and len(call[0]) % len(of.down) == 0 else None
    if len(call) != 3:
        return None
    x, index, weights = call if not call[1].is_floating_point() else (call[0], call[2], call[1])
    fits = index.shape == weights.shape and len(index) == len(x)
    return (x, index, weights) if fits and not index.is_floating_point() else None


class Believed:
    """What is known of the experts of one patched model, by modules that are alike."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Form | str] = {}
        self._routers, self._mlps = BelievedRouters(), BelievedMLPs()

    def __call__(self, decoder: nn.Module) -> Mixtures:
        """The modules of a decoder on its device whose experts run by the kernels, and why others do not."""
        found = Mixtures(routers=self._routers(decoder), beside=self._mlps(decoder), why_not=_why_not)
        for module, around in experts_of(decoder):
            why = not_stacked(module, around)
            form: Any = why
            if not why:
                key = alike(module)
                if key not in self._known:
                    self._known[key] = _believed(module)
                form = self._known[key]
            if isinstance(form, str):
                found.own[form] += 1
            else:
                found.forms[module] = form
                if takes_rows_alone(module):
                    found.spread[module] = len(module._parameters[DOWN])  # type: ignore[arg-type]
        return found


def _why_not(rows: int, device: torch.device) -> str:
    from pkv_hf.kernels.experts.experts import most_rows

    most = most_rows(device)
    return f"{rows} rows are more than {most}" if rows > most else ""


def _believed(module: Any) -> Form | str:
    """The form of a module's experts, where the kernels err at most twice as much as its own code; or why not."""
    name, count = type(module).__name__, len(module._parameters[DOWN])
    try:
        device = module._parameters[DOWN].device
        chosen = torch.tensor(sorted({count - 1, (count - 1) // COPIED}), device=device)
        form = read(module, chosen)
        if isinstance(form, str):
            return form
        with launching_on(device):
            ratio = max(_error(module, form, chosen, rows) for rows in (1, 3))
        if not ratio <= 1:
            return f"a {name} by the kernels has {ERROR * ratio:.1f} times the error of its own code"
    except Exception as error:  # of a module that takes other arguments, of a kernel, for memory
        return f"a {name} is not understood: {type(error).__name__}: {first_line(error)}"
    return form


def _error(module: Any, form: Form, chosen: torch.Tensor, rows: int) -> float:
    """The kernels' error over what it may be, on few experts: by the module's own loop in its dtype and in float32."""
    from pkv_hf.kernels.experts.experts import experts, most_rows

    if rows > most_rows(chosen.device):
        return 0.0
    of = stacked(module, form)
    own, exact = (few(module, chosen, dtype) for dtype in (of.down.dtype, torch.float32))
    squares, errors = 0.0, [0.0, 0.0]
    for _ in range(-(-JUDGED // (rows * of.hidden))):
        x, index, weights = drawn_call(stacked(own, form), rows, 2, LIVELY)
        expected = exact(x.float(), index, weights.float()).double()
        squares += float(expected.square().mean())
        for i, found in enumerate((own(x, index, weights), experts(x, chosen[index], weights, of))):
            errors[i] += float((found.double() - expected).square().mean())
    own_error, error = (each**0.5 for each in errors)
    return excess(error, own_error, squares**0.5)
