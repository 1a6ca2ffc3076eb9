"""Launching a compiled kernel again without Triton's look at every argument, which takes longer than a short kernel.

What Triton compiles for, beside a kernel's constants and dtypes, is whether pointers and sizes are multiples of 16, and
whether sizes fit 32 bits. Launches where all are and do share one compiled kernel; any other goes through Triton.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

ALIGNED = 16
"""What pointers, in bytes, and sizes are multiples of in a launch that need not be looked at."""


class Launcher:
    """A Triton kernel whose parameters are pointers, then numbers, then constants.

    Numbers that differ from launch to launch, and floats, have to be among its `do_not_specialize`.

    `fp_fusion` lets the compiler fuse a product and a sum, which are then rounded once: right for long sums, wrong
    where a result has to be rounded as transformers' own is. Triton's default is not the same in all releases.
    """

    def __init__(self, kernel: Any, *, fp_fusion: bool) -> None:
        self.kernel = kernel
        self.fp_fusion = fp_fusion
        self._compiled: dict[Hashable, Any] = {}
        parameters = getattr(kernel, "params", ())  # the interpreter's functions have none, and compile nothing
        numbers = [parameter for parameter in parameters if not parameter.name.endswith("_ptr")]
        self._compiles = bool(parameters)
        self._sizes = [
            place for place, number in enumerate(numbers) if not (number.is_constexpr or number.do_not_specialize)
        ]

    def __call__(
        self,
        kind: Hashable,
        grid: tuple[int, int, int],
        tensors: Sequence[torch.Tensor | None],
        numbers: Sequence[float],
        constants: Sequence[Any],
        **options: Any,
    ) -> None:
        """Launches on the current device. `kind` says all that the tensors' dtypes, the constants and Triton's options
        depend on, which tensors are None, and the device."""
        options["enable_fp_fusion"] = self.fp_fusion
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        low_bits = sizes = 0
        for address in addresses:
            low_bits |= address or 0
        for place in self._sizes:
            sizes |= numbers[place]  # type: ignore[operator]
        if not self._compiles or (low_bits | sizes) % ALIGNED or sizes >= 2**31:
            self.kernel[grid](*tensors, *numbers, *constants, **options)
            return
        compiled = self._compiled.get(kind)
        if compiled is None:
            self._compiled[kind] = self.kernel[grid](*tensors, *numbers, *constants, **options)
        else:
            compiled[grid](*addresses, *numbers, *constants)
