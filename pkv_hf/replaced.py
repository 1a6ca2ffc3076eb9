"""What stands in the place of modules' own attributes, on the instances: how it comes, goes, finds what was there."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

STATE = "_pkv_hf_state"
"""The attribute of a patched module that holds what it was patched with."""

REPLACED = "_pkv_hf_replaced"
"""The attribute of a patched module that holds its `Replacement`s, by name."""

REPLICATE = "_replicate_for_data_parallel"
"""torch's method that copies a module for a device of `nn.DataParallel`, and with it what is set on the instance."""


class Replacement:
    """A function in the place of a module's method, for as long as the module is patched with `state`.

    It gets the module, then the arguments of the call. Wrappers that came later may hold it for longer: then it is what
    was there before, `original`.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module, name: str, state: Any) -> None:
        self.function = function
        self.module = module
        self.name = name
        self.state = state
        self.before = vars(module).get(name)
        """What was set on the instance; None for the class's own method."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if vars(self.module).get(STATE) is self.state:
            return self.function(self.module, *args, **kwargs)
        return self.original(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """transformers asks methods what arguments they take."""
        return inspect.signature(self.original)

    @property
    def __func__(self) -> Callable[..., Any]:
        """What wrappers take of a method that call it with its module, or with a copy of that (compressed-tensors)."""
        name = self.name

        def function(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            held = vars(module).get(REPLACED, {}).get(name)
            return getattr(type(module), name)(module, *args, **kwargs) if held is None else held(*args, **kwargs)

        return function

    @property
    def original(self) -> Callable[..., Any]:
        return self.before or getattr(type(self.module), self.name).__get__(self.module)


def original(module: nn.Module, name: str) -> Callable[..., Any]:
    """A method of a patched module as it was before."""
    return vars(module)[REPLACED][name].original


def on_instance(module: nn.Module, name: str = "forward") -> Any:
    """What its user has set on an instance in the place of a method, None where the class's own runs.

    A replacement counts as what it took the place of; what was put around one later is the user's.
    """
    found = vars(module).get(name)
    while isinstance(found, Replacement):  # one of an earlier patch may be under ours, or be left there
        found = found.before
    return found


class Replacements:
    """All that one patch has set on modules, in order."""

    def __init__(self) -> None:
        self._held: list[tuple[nn.Module, str, Any, bool, Any]] = []
        self._removed: list[tuple[nn.Module, str, Any, bool, Any]] = []

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Sets an attribute of an instance."""
        self._held.append((module, name, value, name in vars(module), vars(module).get(name)))
        setattr(module, name, value)

    def method(self, module: nn.Module, name: str, function: Callable[..., Any], state: Any) -> None:
        """Puts a function in the place of a method of an instance that has its state; it gets the module first."""
        if REPLACED not in vars(module):
            self.set(module, REPLACED, {})
            self.method(module, REPLICATE, functools.partial(_replica, self), state)
        replacement = Replacement(function, module, name, state)
        vars(module)[REPLACED][name] = replacement
        self.set(module, name, replacement)

    def remove(self) -> None:
        """Takes away what was set, and nothing that came in its place since."""
        self._removed = [held for held in self._held if vars(held[0]).get(held[1]) is held[2]]
        for module, *held in reversed(self._removed):
            _put_back(vars(module), *held)

    def restore(self) -> None:
        """Sets again what `remove` took away."""
        for module, name, value, *_ in self._removed:
            setattr(module, name, value)

    def remove_from(self, replica: nn.Module, module: nn.Module) -> None:
        """Takes away from a copy of a module what was set on that."""
        for of_module, *held in reversed(self._held):
            if of_module is module:
                _put_back(vars(replica), *held)


def _put_back(attributes: dict[str, Any], name: str, value: Any, there: bool, before: Any) -> None:
    if attributes.get(name) is not value:
        return
    if there:
        attributes[name] = before
    else:
        del attributes[name]


def _replica(held: Replacements, module: nn.Module) -> nn.Module:
    """A copy of a module for another device, which computes with weights of its own: not patched."""
    replica = original(module, REPLICATE)()
    held.remove_from(replica, module)
    return replica
