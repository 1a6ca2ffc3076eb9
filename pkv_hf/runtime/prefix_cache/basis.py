"""What kept keys and values rest on: weights as they are, settings, the adapters in force."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from pkv_hf.runtime.captured.watch import address
from pkv_hf.runtime.evidence import Look

_watching: weakref.WeakSet[Basis] = weakref.WeakSet()
_hooks: list[Any] = []


class Basis:
    """What one model's kept blocks were computed with.

    Tensors count by where they lie and by how often torch has seen them written. What it does not see (`.data`, some
    fused optimizers) changes them all the same: any optimizer's step calls `changed`, and others have to.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._tensors: list[tuple[Any, Any, int]] = []
        self._token: object = None
        self._merged, self._settings = "", b""
        if not _hooks:
            _hooks.append(register_optimizer_step_post_hook(_stepped))
        _watching.add(self)

    def now(self, look: Look) -> bytes:
        """A digest of settings and adapters in force. Calls `changed` where weights are not those of the last call."""
        modules = look.watch.modules
        tensors = [_version(tensor) for module in modules for tensor in _tensors(module)]
        same = len(tensors) == len(self._tensors) and all(
            now[1:] == then[1:] and now[0]() is then[0]() for now, then in zip(tensors, self._tensors)
        )
        if look.token is not self._token:
            settings = look.watch.settings
            merged = repr([of_module.get("merged_adapters") for of_module in settings])
            same = same and merged == self._merged  # which goes into the weights' memory, unseen
            self._merged, self._token = merged, look.token
            self._settings = hashlib.blake2b(repr(settings).encode(), digest_size=16).digest()
        if not same:
            self._tensors = tensors
            self._changed()
        autocast = [torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")]
        return self._settings + repr(autocast).encode()

    def forget(self) -> None:
        """The weights may be others, whatever can be seen of them."""
        self._changed()


def _stepped(*_: object) -> None:
    for basis in list(_watching):
        basis.forget()


def _tensors(module: torch.nn.Module) -> Iterable[torch.Tensor]:
    held = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in held if tensor is not None]


def _version(tensor: torch.Tensor) -> tuple[Any, Any, int]:
    """A tensor, where it lies, and how often it was written; inference tensors do not count that."""
    return weakref.ref(tensor), address(tensor), 0 if tensor.is_inference() else tensor._version
