"""Launching a compiled kernel again without Triton's look at every argument, which takes longer than a short kernel.

What Triton compiles for, beside a kernel's constants and dtypes, is whether pointers and sizes are multiples of 16, and
whether sizes fit 32 bits. Launches where all are and do share one compiled kernel; any other goes through Triton.
"""

from __future__ import annotations

from typing import Any

ALIGNED = 16
"""What pointers, in bytes, and sizes are multiples of in a launch that need not be looked at."""


class Launcher:
    """A Triton kernel whose parameters are pointers (`*_ptr`), then numbers, then constants.

    Numbers that differ from launch to launch, and floats, have to be among its `do_not_specialize`.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple, Any] = {}
        parameters = getattr(kernel, "params", ())  # the interpreter's functions have none, and compile nothing
        self._pointers = sum(parameter.name.endswith("_ptr") for parameter in parameters)
        self._constants = next((p.num for p in parameters if p.is_constexpr), len(parameters))
        numbers = parameters[self._pointers : self._constants]
        self._sizes = [parameter.num for parameter in numbers if not parameter.do_not_specialize]

    def __call__(self, grid: tuple[int, int, int], *arguments: Any, **options: Any) -> None:
        """Launches on the current device: arguments in the kernel's order, and Triton's options."""
        tensors = arguments[: self._pointers]
        addresses = [tensor.data_ptr() for tensor in tensors]
        low_bits = sizes = 0
        for address in addresses:
            low_bits |= address
        for index in self._sizes:
            sizes |= arguments[index]
        if not self._pointers or (low_bits | sizes) % ALIGNED or sizes >= 2**31:
            self.kernel[grid](*arguments, **options)
            return
        dtypes = [tensor.dtype for tensor in tensors]
        key = (tensors[0].device, *dtypes, *arguments[self._constants :], *options.values())
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self.kernel[grid](*arguments, **options)
        else:
            compiled[grid](*addresses, *arguments[self._pointers :])
