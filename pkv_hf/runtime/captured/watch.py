"""Notices that a module is not what it was: what a captured graph has baked in must not have changed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torchs_module
from torch.nn.modules.dropout import _DropoutNd

from pkv_hf import compat
from pkv_hf.origins import LOOPS_OWN

PLAIN = (bool, int, float, str, type(None), torch.dtype)
NO_SETTINGS = nn.Module().__dict__.keys() - {"training"} | {"_experts_implementation_internal"}
"""What every module has that is no setting, its children, tensors and hooks; and what transformers sets in the
configuration for the steps of each generate(), and back."""

NAMED_BY_LAYERS = ("apply_rotary_pos_emb", "rotate_half", "eager_attention_forward")
"""Functions beside a model's classes that its layers call."""


class Watch:
    """What a forward of some modules rests on, at the time it is made.

    That is: which module is where, of what class, and what code it runs; where every weight and buffer is stored (their
    values may change in place), hooks, the plain settings of modules that are not torch's (a layer's scaling, PEFT's
    active adapters, whether they are disabled or merged), and those of the configuration.
    """

    def __init__(self, model: nn.Module, config: Any) -> None:
        self.modules = list(model.modules())
        self._structure = _Structure(self.modules)
        self._code = _Code(model, self.modules)
        self._tensors = _Tensors(self.modules)
        self._settings = _Settings(self.modules, config)
        self._hooks = _hooks(self.modules)
        self._active = _active(self._hooks)
        self.reason = ""
        """Why a forward of these modules may not be captured or replaced; empty where it may."""
        if self.hooked:
            self.reason = "modules have forward hooks"
        elif len(self._tensors.devices) > 1:
            self.reason = f"weights are on {len(self._tensors.devices)} devices"

    @property
    def hooked(self) -> bool:
        """Whether a forward runs anybody's hooks, to which every row and its place in the batch may matter."""
        return bool(self._active)

    @property
    def settings(self) -> list[dict[str, Any]]:
        """The plain settings of modules and of the configuration, each module's by name."""
        return self._settings.values

    def unchanged(self) -> bool:
        return (
            self._structure.unchanged()
            and self._code.unchanged()
            and self._tensors.unchanged()
            and _active(self._hooks) == self._active
            and self._settings.unchanged()
        )


class _Code:
    """What the modules run: what is set on them in the place of their forwards, their classes' methods, the functions
    beside those, and all that of the model which generates."""

    def __init__(self, model: nn.Module, modules: list[nn.Module]) -> None:
        set_on = [(m.__dict__, name) for m in modules for name in ("forward", "_compiled_call_impl")]
        set_on += [(model.__dict__, name) for name in LOOPS_OWN]
        self._set_on = [(now, name, now.get(name)) for now, name in set_on]
        classes = dict.fromkeys(type(m) for m in modules)
        methods = [(c, name) for c in classes for name in ("forward", "__call__")]
        methods += [(type(model), name) for name in LOOPS_OWN if hasattr(model, name)]
        self._methods = [(c, name, getattr(c, name)) for c, name in methods]
        files = dict.fromkeys(sys.modules.get(base.__module__) for c in classes for base in c.__mro__)
        beside = [(vars(file), name) for file in files if file is not None for name in NAMED_BY_LAYERS]
        self._functions = [(names, name, names[name]) for names, name in beside if name in names]

    def unchanged(self) -> bool:
        return (
            all(now.get(name) is value for now, name, value in self._set_on)
            and all(getattr(c, name) is method for c, name, method in self._methods)
            and all(names.get(name) is function for names, name, function in self._functions)
        )


class _Structure:
    """Which module is where, of what class, and which dictionaries hold what is looked at in it."""

    def __init__(self, modules: list[nn.Module]) -> None:
        held = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
        self._in_place = [(m.__dict__, name, m.__dict__[name]) for m in modules for name in held]
        self._stores = [m._modules for m in modules]
        self._held = sum(map(len, self._stores))
        self._children = [(store, name, child) for store in self._stores for name, child in store.items()]
        self._classes = [(m, type(m)) for m in modules]

    def unchanged(self) -> bool:
        return (
            sum(map(len, self._stores)) == self._held
            and all(now.get(name) is store for now, name, store in self._in_place)
            and all(store.get(name) is child for store, name, child in self._children)
            and all(type(m) is of_class for m, of_class in self._classes)
        )


class _Tensors:
    """Where weights and buffers are stored, and which of them are none."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._stores = [store for m in modules for store in (m._parameters, m._buffers)]
        self._held = sum(map(len, self._stores))
        named = [(store, name, tensor) for store in self._stores for name, tensor in store.items()]
        self._addresses = [(store, name, address(tensor)) for store, name, tensor in named if tensor is not None]
        self._absent = [(store, name) for store, name, tensor in named if tensor is None]
        self._states = [(m, _state(m)) for m in modules if hasattr(vars(m).get("state"), "SCB")]
        self.devices = {tensor.device for _, _, tensor in named if tensor is not None}

    def unchanged(self) -> bool:
        return (
            sum(map(len, self._stores)) == self._held
            and all(store.get(name) is None for store, name in self._absent)
            and all(address(store.get(name)) == at for store, name, at in self._addresses)
            and all(_state(m) == state for m, state in self._states)
        )


class _Settings:
    """The plain attributes of modules that are not torch's, of dropout and of a configuration, as values."""

    def __init__(self, modules: list[nn.Module], config: Any) -> None:
        others = [m for m in modules if isinstance(m, _DropoutNd) or not type(m).__module__.startswith("torch.")]
        stores = [*(m.__dict__ for m in others), vars(config)]
        self._held = [(store, len(store), plain_attributes(store)) for store in stores]

    @property
    def values(self) -> list[dict[str, Any]]:
        return [settings for _, _, settings in self._held]

    def unchanged(self) -> bool:
        return all(len(now) == size and _holds(settings, now) for now, size, settings in self._held)


def address(tensor: Any) -> Any:
    """Where a tensor is stored; of a subclass that wraps tensors (quantised or sharded weights), where those are.

    bitsandbytes keeps what its weights are scaled by in an object beside them.
    """
    if type(tensor) is nn.Parameter or type(tensor) is torch.Tensor:
        return tensor.data_ptr()
    if hasattr(tensor, "__tensor_flatten__"):
        return [address(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
    if not isinstance(tensor, torch.Tensor):  # none, or a wrapper's mesh
        return id(tensor)
    addresses, state = [tensor.data_ptr()], getattr(tensor, "quant_state", None)
    while state is not None:  # scales can be quantised themselves
        addresses += [held.data_ptr() for held in vars(state).values() if isinstance(held, torch.Tensor)]
        state = getattr(state, "state2", None)
    return addresses


def _state(module: Any) -> Any:
    """Of an 8-bit layer of bitsandbytes: where its scales are, which the first call moves from its weight to its state,
    and from which size on it multiplies inputs apart."""
    scales = getattr(module.weight, "SCB", None)
    scales = module.state.SCB if scales is None else scales
    return module.state.threshold, None if scales is None else scales.data_ptr()


def hooks_of(model: nn.Module) -> list[Callable[..., Any]]:
    """The hooks that a forward of the model runs."""
    return _active(_hooks(model.modules()))


def _hooks(modules: Iterable[nn.Module]) -> list[dict]:
    of_all = [torchs_module._global_forward_hooks, torchs_module._global_forward_pre_hooks]
    return [*of_all, *(hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks))]


def _active(hooks: list[dict]) -> list[Callable[..., Any]]:
    """The hooks that do something in a forward without gradients."""
    return [hook for of_module in filter(None, hooks) for hook in of_module.values() if not compat.is_inert(hook)]


def plain_attributes(store: dict[str, Any]) -> dict[str, Any]:
    """Attributes that are plain values or containers of them, as they are now."""
    return {name: copy.deepcopy(value) for name, value in store.items() if name not in NO_SETTINGS and _plain(value)}


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
