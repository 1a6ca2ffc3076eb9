"""Notices that a module is not what it was: what a captured graph has baked in must not have changed."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pkv_hf import compat

FORWARD = "_pkv_hf_forward"
"""The attribute of a module whose `forward` we replaced: the bound one that was there, None for the class's own."""

PLAIN = (bool, int, float, str, type(None))
TORCHS_OWN = nn.Module().__dict__.keys() - {"training"}
"""Attributes of every module that are no settings: its children, tensors and hooks."""


class Watch:
    """What a forward of some modules rests on, at the time it is made.

    That is: which module is where and of what class, where every weight and buffer is stored (their values may change
    in place), hooks, and, of modules that are not torch's, every plain setting (a layer's scaling, PEFT's active
    adapters, whether they are disabled or merged).
    """

    def __init__(self, roots: list[nn.Module]) -> None:
        modules = [module for root in roots for module in root.modules()]
        self._structure = _Structure(modules)
        self._tensors = _Tensors(modules)
        self._settings = _Settings(modules)
        self._hooks = _hooks(modules)
        self._hooked = _any_runs(self._hooks)
        self.reason = ""
        """Why a forward of these modules may not be captured or replaced; empty where it may."""
        if self._hooked:
            self.reason = "modules have forward hooks"
        elif any("forward" in m.__dict__ and FORWARD not in m.__dict__ for m in modules):
            self.reason = "modules have a forward of their own (accelerate's hooks or mixed precision, say)"
        elif len(self._tensors.devices) > 1:
            self.reason = f"weights are on {len(self._tensors.devices)} devices"

    def unchanged(self) -> bool:
        return (
            self._structure.unchanged()
            and self._tensors.unchanged()
            and _any_runs(self._hooks) == self._hooked
            and self._settings.unchanged()
        )


class _Structure:
    """Which module is where, of what class, and whose forward it runs."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._stores = [m._modules for m in modules]
        self._held = sum(map(len, self._stores))
        self._children = [(store, name, child) for store in self._stores for name, child in store.items()]
        self._classes = [(m, type(m)) for m in modules]
        self._forwards = [(m.__dict__, m.__dict__.get("forward")) for m in modules]

    def unchanged(self) -> bool:
        return (
            sum(map(len, self._stores)) == self._held
            and all(store.get(name) is child for store, name, child in self._children)
            and all(type(m) is of_class for m, of_class in self._classes)
            and all(now.get("forward") is forward for now, forward in self._forwards)
        )


class _Tensors:
    """Where weights and buffers are stored, and which of them are none."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._stores = [store for m in modules for store in (m._parameters, m._buffers)]
        self._held = sum(map(len, self._stores))
        named = [(store, name, tensor) for store in self._stores for name, tensor in store.items()]
        self._addresses = [(store, name, _address(tensor)) for store, name, tensor in named if tensor is not None]
        self._absent = [(store, name) for store, name, tensor in named if tensor is None]
        self.devices = {tensor.device for _, _, tensor in named if tensor is not None}

    def unchanged(self) -> bool:
        return (
            sum(map(len, self._stores)) == self._held
            and all(store.get(name) is None for store, name in self._absent)
            and all(_address(store.get(name)) == address for store, name, address in self._addresses)
        )


class _Settings:
    """The plain attributes of modules that are not torch's, as values."""

    def __init__(self, modules: list[nn.Module]) -> None:
        others = [m for m in modules if not type(m).__module__.startswith("torch.")]
        self._held = [(m.__dict__, len(m.__dict__), _plain_attributes(m)) for m in others]

    def unchanged(self) -> bool:
        return all(len(now) == size and _holds(settings, now) for now, size, settings in self._held)


def _address(tensor: Any) -> Any:
    """Where a tensor is stored; of a subclass that wraps tensors (quantised or sharded weights), where those are."""
    if hasattr(tensor, "__tensor_flatten__"):
        return [_address(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
    return tensor.data_ptr() if isinstance(tensor, torch.Tensor) else id(tensor)  # no tensor, or a wrapper's mesh


def hooked(model: nn.Module) -> bool:
    """Whether a forward of the model runs anybody's hooks, to which every row and its place in the batch may matter."""
    return _any_runs(_hooks(model.modules()))


def _hooks(modules: Iterable[nn.Module]) -> list[dict]:
    return [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]


def _any_runs(hooks: list[dict]) -> bool:
    """Whether there is a hook that does something in a forward without gradients."""
    return any(
        not compat.only_asks_for_gradients(hook) for of_module in filter(None, hooks) for hook in of_module.values()
    )


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """A module's attributes that are plain values or containers of them, as they are now."""
    attributes = module.__dict__.items()
    return {name: copy.deepcopy(value) for name, value in attributes if name not in TORCHS_OWN and _plain(value)}


def _holds(settings: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether all settings are as they were."""
    try:
        return settings.items() <= now.items()
    except (RuntimeError, ValueError):  # a tensor or an array, which is neither equal nor not, took one's place
        return False


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_plain(key) and _plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple, set)):
        return all(_plain(item) for item in value)
    return isinstance(value, PLAIN)
