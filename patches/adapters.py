"""What PEFT has put around a layer: the layer itself and the adapters that its forward adds (LoRA, Hu et al. 2021).

A module is known by the function that it runs, PEFT's own. Whatever else that function may do by its settings (DoRA
and other variants, dropout, biases of adapters) is a reason to call the module as it is. Settings change between calls:
what is read here holds until `runtime.captured.watch` says that one has.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from pkv_hf.replaced import on_instance

WRAPPERS = (
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.bnb", "Linear8bitLt"),
)
"""Files of PEFT and classes in them whose forwards are base(x) + the sum of scaling * B(A(dropout(x)))."""


class Low(NamedTuple):
    """One adapter: scaling * (x A^T) B^T."""

    a: nn.Parameter
    """`[rank, inputs]`."""
    b: nn.Parameter
    """`[outputs, rank]`."""
    scaling: float


class Wrapped(NamedTuple):
    """base(x), and what adapters add to it."""

    base: Any
    adapters: list[Low]
    """Those that are active; none where they are merged into the base or disabled."""


def unwrapped(module: Any) -> Wrapped | str:
    """A layer without what PEFT has put around it, or why the module has to be called as it is.

    A module that is not PEFT's is its own base.
    """
    if not hasattr(module, "base_layer"):
        return Wrapped(module, [])
    name = type(module).__name__
    if on_instance(module) is not None or type(module).forward not in _forwards():
        return f"a {name} around a {type(module.base_layer).__name__} is no adapter of LoRA's for linear layers"
    if module.disable_adapters:
        return f"a {name} is disabled while merged" if module.merged else Wrapped(module.base_layer, [])
    if module.merged:
        return Wrapped(module.base_layer, [])
    found: list[Low] = []
    for adapter in module.active_adapters:
        if adapter in module.lora_A:
            why = _unknown(module, adapter)
            if why:
                return f"the adapter {adapter!r} of a {name} {why}"
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            found.append(Low(a, b, module.scaling[adapter]))
    return Wrapped(module.base_layer, found)


def _forwards() -> list[Any]:
    """The forwards that are known, of what has been imported of PEFT."""
    files = [(sys.modules.get(file), name) for file, name in WRAPPERS]
    return [getattr(file, name).forward for file, name in files if hasattr(file, name)]


def _unknown(module: Any, adapter: str) -> str:
    """What an adapter does that `Low` does not say; empty for nothing."""
    parts, dropout = (module.lora_A[adapter], module.lora_B[adapter]), module.lora_dropout[adapter]
    if adapter in getattr(module, "lora_variant", ()) or module.use_dora.get(adapter):
        return "is a variant of LoRA"
    if isinstance(dropout, _DropoutNd) and dropout.training and dropout.p:
        return "drops out in training mode"
    if not isinstance(dropout, (_DropoutNd, nn.Identity)):
        return f"passes its input through a {type(dropout).__name__}"
    if any(type(part) is not nn.Linear or type(part.weight) is not nn.Parameter for part in parts):
        return "is not two plain linear layers"
    if any(part.bias is not None for part in parts):
        return "has a bias"
    if not isinstance(module.scaling[adapter], (int, float)):
        return f"is scaled by a {type(module.scaling[adapter]).__name__}"
    if not getattr(module, "cast_input_dtype_enabled", True):
        return "does not cast its input"
    return ""
