"""What a kind of projection is: linear layers that share an input, and how their products are launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from pkv_hf.patches.description import Norm

if TYPE_CHECKING:
    from pkv_hf.kernels.products.adapters import Adapters
    from pkv_hf.kernels.products.epilogue import Parts

Modules: TypeAlias = tuple[Any, ...]
"""Linear layers that share an input: one, or q, k and v, or gate and up."""


class Foreign(str):
    """Why modules are not of a kind at all. Where another kind says more of them, nobody wants to read it."""


class Normed:
    """x `[rows, width]`, and the norm that its product is to take before: None but where a kind folds norms."""

    def __init__(self, x: torch.Tensor, norm: Norm | None = None) -> None:
        self.x = x
        self.norm = norm

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of a product that takes the norm first."""
        norm = self.norm
        return {} if norm is None else {"norm": norm.weight, "eps": norm.eps, "offset": norm.offset}


class Projection:
    """Linear layers of one kind. What depends on them alone is read once, `read`; what depends on x is arithmetic."""

    fuses = False
    """Whether the launch of a product also takes the norm of one row before, and the scale and the sum after."""
    adapters: Adapters | None = None
    """What the products add of PEFT's."""
    called = False
    """Whether the modules' own forwards multiply."""

    def __init__(self, modules: Modules) -> None:
        self.modules = modules

    @classmethod
    def read(cls, modules: Modules) -> Projection | str:
        """The modules as this kind, or why they are not of it, in words for people, which name the module.

        The words are `Foreign` where they only say that another kind may know it.
        """
        raise NotImplementedError

    @property
    def stored(self) -> str:
        """How the weights are stored, in words for people."""
        return named(self.modules[0])

    def why_not(self, x: torch.Tensor) -> str:
        """Why products with x `[rows, inputs]` are not this kind's; empty where they are."""
        raise NotImplementedError

    def linear(
        self,
        x: Normed,
        *,
        residual: torch.Tensor | None = None,
        scale: float = 1.0,
        activation: str | None = None,
    ) -> torch.Tensor:
        """The modules' products side by side, `[rows, sum of outputs]`: residual + scale * act(x W^T + bias).

        One module where there is a residual or an activation; a residual and a scale only where the kind `fuses`.
        """
        raise NotImplementedError

    def each(self, x: Normed) -> Sequence[torch.Tensor]:
        """The product of every module, `[rows, outputs]`; rows need not be next to each other."""
        raise NotImplementedError

    def gated(self, x: Normed, activation: str) -> torch.Tensor:
        """act(x G^T + bias) * (x U^T + bias), `[rows, outputs]`, of gate and up or of one module that is both."""
        raise NotImplementedError

    def in_parts(self, x: torch.Tensor) -> Parts | None:
        """One module's product as parts that `elementwise.add_norms` adds up; None where its launch is not cut."""
        return None


def why_not_from_bits(modules: Modules, x: torch.Tensor, bits: int) -> str:
    """Why our products with weights of so many bits do not take x `[rows, inputs]`; empty where they do."""
    from pkv_hf.kernels.launch import capability
    from pkv_hf.kernels.linear import DTYPES
    from pkv_hf.kernels.quantized.blocks import most_rows

    if x.dtype not in DTYPES:
        return f"hidden states are {x.dtype}, and products with {bits} bits are of fp16 and bf16"
    for module in modules:
        if module.bias is not None and module.bias.dtype != x.dtype:
            return f"a {named(module)} has a bias of {module.bias.dtype}, hidden states are {x.dtype}"
    most = most_rows(capability(x.device))
    return f"{len(x)} rows are more than {most}" if len(x) > most else ""


def named(module: Any) -> str:
    """What reasons call a module."""
    return type(module).__name__
