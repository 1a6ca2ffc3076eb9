"""A decoder's configuration that names our attention while the decoder is served on pages."""

from __future__ import annotations

import copy
import functools
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from pkv_hf.compat import NAME

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

serving: ContextVar[Any] = ContextVar("pkv_hf_serving", default=None)
"""The step on pages that runs in this thread; its `config` is that of the decoder which it serves."""


@functools.cache
def _serving_class(of_class: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """A configuration's class whose instances name our attention while their decoder is served on pages."""

    def implementation(self: Any) -> Any:
        step = None if torch.compiler.is_compiling() else serving.get()
        if step is None or step.config is not self:
            return vars(self)["_attn_implementation_internal"]
        return NAME

    def set_implementation(self: Any, name: Any) -> None:
        vars(self)["_attn_implementation_internal"] = name

    body = {
        "__module__": of_class.__module__,
        "__qualname__": of_class.__qualname__,
        "__slots__": ("_of",),
        "_attn_implementation_internal": property(implementation, set_implementation),
        "__new__": lambda _, *args, **kwargs: of_class(*args, **kwargs),  # another one, as a script makes it of this
        "__copy__": lambda self: copy.copy(self._of),
        "__reduce_ex__": lambda self, _: (serving_configuration, (self._of,)),
        "__eq__": lambda self, other: vars(self) is vars(other) or self._of == other,
        "__hash__": None,
    }
    return type(of_class.__name__, (of_class,), body)


def serving_configuration(config: PreTrainedConfig) -> PreTrainedConfig:
    """A second configuration of the same settings, also of those that are set later on either.

    Outside of a forward on pages it says what the first does. In one it names our attention: models can share a
    configuration, and modules can branch on the name of their attention implementation.
    """
    of_class: Any = type(config)
    twin = object.__new__(_serving_class(of_class))
    object.__setattr__(twin, "__dict__", vars(config))
    object.__setattr__(twin, "_of", config)
    return twin


def configured_implementation(config: PreTrainedConfig) -> str:
    """The attention implementation that a configuration's user has set."""
    return vars(config)["_attn_implementation_internal"]
