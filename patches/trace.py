"""One run of a module, recorded: which of its modules were called with what, and what of that is the same data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pkv_hf.compat import CACHE
from pkv_hf.configurations import serving
from pkv_hf.runtime.interface import Asked, Listener

HELD = 1 << 20
"""Tokens that a cache is said to hold where it is tried whether a module minds."""


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a module inside of the recorded one."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    input: torch.Tensor
    """The first tensor among its arguments."""
    output: torch.Tensor
    """What it returned, or the first part of that."""
    version: int = field(init=False)
    """torch's count of writes to `output` when it was returned."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", self.output._version)

    @property
    def changed(self) -> bool:
        """Whether what it returned was written into later on, as by a clamp in place: it is not what it was."""
        return self.output._version != self.version

    def again(self, factor: float) -> torch.Tensor:
        """What the module returns where its first tensor is so many times what it was."""
        x = factor * self.input
        args = tuple(x if value is self.input else value for value in self.args)
        kwargs = {name: x if value is self.input else value for name, value in self.kwargs.items()}
        output = self.module(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @property
    def child(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Trace:
    """All calls of modules inside a recorded run, in the order in which they ended, and what went in and came out."""

    input: torch.Tensor
    output: torch.Tensor
    calls: list[Call]
    settings: list[float]
    """The plain numbers among the module's own attributes."""
    asked: list[Asked]
    """What was asked of attention."""
    config: Any
    """By which attention modules look up their function."""
    returns: int
    """Elements of the tuple that it returned, of which the others are None; 0 where it returned the output alone."""
    given: dict[str, Any]
    """Its arguments beside the input."""
    singles: dict[str, torch.Tensor]
    """The module's own parameters and buffers of one element."""

    def children(self, name: str) -> list[Call]:
        """The calls of a module's own children, "" for the recorded module's."""
        return [call for call in self.calls if call.parent == name]


class LongCache:
    """A cache that says it holds many tokens, and gives back what it is given."""

    def get_seq_length(self, *_: object, **__: object) -> int:
        return HELD

    get_query_offset = get_seq_length

    def update(self, k: torch.Tensor, v: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        return k, v


def asked_behind_others(trace: Trace, call: Call) -> list[Asked]:
    """What a call of an attention module asks of attention where its cache holds many tokens; nothing if it fails."""
    listener = Listener(trace.config)
    token = serving.set(listener)
    try:
        call.module(*call.args, **{**call.kwargs, CACHE: LongCache()})
    except Exception:  # of a module that does more with a cache
        return []
    finally:
        serving.reset(token)
    return listener.asked


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether tensors are the same elements of one storage, whatever their shapes. Both have to be alive."""
    return within(a, b) and a.numel() == b.numel()


def within(part: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether a tensor is a view of some of another's elements."""
    storages = part.untyped_storage().data_ptr(), whole.untyped_storage().data_ptr()
    return storages[0] == storages[1] and part.numel() <= whole.numel()


def states_in(result: Any) -> tuple[torch.Tensor | None, int]:
    """The hidden states that a layer returned, None where it returned more; of how many elements its tuple is, or 0."""
    returns = len(result) if isinstance(result, tuple) else 0
    if returns and all(other is None for other in result[1:]):
        result = result[0]
    return (result if isinstance(result, torch.Tensor) else None), returns


def traced(module: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any], config: Any) -> Trace | None:
    """A run of a module on hidden states `[B, tokens, width]`, outside of any step. None where it returns more.

    `config` is the configuration by which its attention modules look up their function.
    """
    calls: list[Call] = []
    listener = Listener(config)
    with _recorded(module, calls):
        token = serving.set(listener)
        try:
            output = module(hidden, **kwargs)
        finally:
            serving.reset(token)
    output, returns = states_in(output)
    if output is None:
        return None
    settings = [float(value) for value in vars(module).values() if isinstance(value, float)]
    held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    singles = {name: tensor for name, tensor in held if tensor.numel() == 1}
    return Trace(hidden, output, calls, settings, listener.asked, config, returns, kwargs, singles)


@contextlib.contextmanager
def _recorded(module: nn.Module, calls: list[Call]) -> Iterator[None]:
    def record(name: str) -> Any:
        def hook(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            output = output[0] if isinstance(output, tuple) and output else output
            if tensors and isinstance(output, torch.Tensor):
                calls.append(Call(name, called, args, kwargs, tensors[0], output))

        return hook

    handles = [
        inner.register_forward_hook(record(name), with_kwargs=True) for name, inner in module.named_modules() if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
