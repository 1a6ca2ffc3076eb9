"""Modules that are called as their layer calls them, whatever they do."""

from __future__ import annotations

from typing import Any

from pkv_hf.patches.description import AsIs, Ref
from pkv_hf.patches.trace import Call


def as_is(call: Call, given: dict[str, Any]) -> AsIs | None:
    """A call that its layer, which was `given` these arguments, can make again; None where it adds tensors."""
    hidden, handed_on, constants = "", [], []
    if len(call.args) > 1:
        return None
    for name, value in call.kwargs.items():
        if value is call.input:
            hidden = name
        elif name in given and given[name] is value:
            handed_on.append((name, name))
        elif value is None or isinstance(value, (bool, str)):  # a number may be the layer's own, as its index is
            constants.append((name, value))
        else:
            return None
    return AsIs(Ref(call.name), hidden, tuple(handed_on), tuple(constants))
