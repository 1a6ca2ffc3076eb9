"""Where the code lies that a call will run. What is known of a model is judged by that, not by names and classes.

A function is known where its own code, and that of all that is wrapped around it, lies in the files of a library. It is
transformers' own where, beneath such wrappers, it is the very function that a file of transformers defines. What stands
on an instance is never known.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any

from torch import nn

from pkv_hf.replaced import on_instance

LIBRARIES = (
    "transformers", "torch.nn", "torch.utils._contextlib", "peft", "bitsandbytes", "torchao", "gptqmodel", "accelerate",
)  # fmt: skip
"""Packages whose modules compute by their inputs and weights, and by settings that are looked at. A module alone, where
of a package only that is known: torch's compiler wraps anybody's code."""

FROM_HUB = "kernels"
"""Hugging Face's package that makes modules of transformers' functions, so that others can take their place."""


def chain(function: Any) -> list[Callable[..., Any]]:
    """A function and all that it wraps, from the outside in: wrapped functions, methods, partials, modules."""
    found = []
    while function is not None:
        if isinstance(function, nn.Module):
            function = on_instance(function) or type(function).forward
        function = getattr(function, "__func__", function)
        found.append(function)
        if isinstance(function, functools.partial):
            function = function.func
        else:
            function = getattr(function, "__wrapped__", None) or _from_hub(function)
    return found


def _from_hub(function: Any) -> Any:
    """The function that a module of Hugging Face's `kernels` calls, None for all others."""
    code = getattr(function, "__code__", None)
    if code is None or not code.co_filename.startswith(_folder(FROM_HUB) or "\0"):
        return None
    named = dict(zip(code.co_freevars, function.__closure__ or ()))
    return named["func"].cell_contents if "func" in named else None


def of_a_library(function: Any) -> bool:
    """Whether a function, and all that is wrapped around it, is the code of a known library."""
    folders = tuple(filter(None, (_folder(name) for name in (*LIBRARIES, FROM_HUB))))
    return all(_lies_in(folders, each) for each in chain(function))


def _lies_in(folders: tuple[str, ...], function: Any) -> bool:
    """Whether a function's own code lies in folders. That of an object is its class's; a partial may bind nothing."""
    if isinstance(function, functools.partial):
        return not function.args and not function.keywords
    code = code_of(function)
    return code is not None and code.co_filename.startswith(folders)


def is_own(function: Any, file: str, name: str) -> bool:
    """Whether a function is the one of this full name in a file of transformers, but for wrappers of a library's."""
    innermost: Any = next(reversed(chain(function)), None)
    code = code_of(innermost)
    if code is None or code.co_filename != os.path.join(_folder("transformers"), file):
        return False
    return (getattr(code, "co_qualname", None) or innermost.__qualname__) == name and of_a_library(function)


def code_of(function: Any) -> CodeType | None:
    """The code that a call of a function or of an object runs; None for none of Python's."""
    return getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)


def _folder(package: str) -> str:
    """Where the code of a package lies, or the one file of a module; empty for what has not been imported."""
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return os.path.dirname(file) + os.sep if os.path.basename(file) == "__init__.py" else file


def foreign(modules: Iterable[nn.Module]) -> str:
    """Which module runs code of no known library, or has a forward of its own; empty for none."""
    looked_at: set[type] = set()
    for module in modules:
        name = type(module).__name__
        if (set_on := on_instance(module)) is not None:
            why = "is compiled" if _compiled(set_on) else "has a forward of its own (accelerate's hooks, say)"
            return f"a {name} {why}"
        if type(module) not in looked_at:
            looked_at.add(type(module))
            if not all(of_a_library(getattr(type(module), method)) for method in ("forward", "__call__")):
                return f"the forward of a {name} is in no file of a known library"
    return ""


def compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether torch compiles any of these modules by itself."""
    return any(module._compiled_call_impl is not None or _compiled(on_instance(module)) for module in modules)


def _compiled(function: Any) -> bool:
    return hasattr(function, "_torchdynamo_orig_callable")


LOOPS_PLACE = ("generate", "_prefill", "_prepare_generation_config", "_sample")
"""What of a causal LM's generation the run-ahead loop takes the place of, or enters as GenerationMixin does."""

LOOPS_OWN = (*LOOPS_PLACE, "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
"""These, and what the loop calls as transformers' own does, which may be a model's."""


def unfamiliar_loop(model: Any) -> str:
    """What of a causal LM's forward and generation the run-ahead loop does not know; empty for nothing."""
    name = type(model).__name__
    for method in ("forward", *LOOPS_OWN):
        function = getattr(type(model), method)
        own = f"GenerationMixin.{method}"
        known = (
            is_own(function, os.path.join("generation", "utils.py"), own)
            if method in LOOPS_PLACE
            else (of_a_library(function))
        )
        if on_instance(model, method) is not None or not known:
            return f"{method} of the {name} is not transformers' own"
    return ""
