"""Triton's interpreter for the kernels under test, with its bfloat16 and float8 mended.

The interpreter holds bfloat16 as uint16. Its `tl.dot`, its products and its sums take those bits, its casts of integers
to bfloat16 are bits too, and its casts of floats cut off what a GPU rounds to nearest; here products and sums are of
float32 values and rounded once, and casts round. Its casts to and from float8_e4m3 are torch's here, which round as a
GPU does.
What compares scalars gives numbers of their type, which loads of Triton 3.9 refuse as a mask; here masks are booleans.

Most of its time goes where kernels do not need it: at every call of one function by another it goes through all of
triton.language (here a kernel does so once), every sum of integers is done again in 64 bits to find overflow (an option
of debug builds, and nothing here is large enough), a table of dtypes is built whenever one is looked up, and coverage
sees every line of every program (here those of the first launch with each set of constants).

It knows one grid at a time, so here threads launch one after the other. It reads and writes wherever a kernel asks it
to, so here addresses have to be those of a tensor that the kernel was given.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
import threading
from collections.abc import Iterable, Iterator

import numpy as np
import torch


def tensors_of(values: Iterable[object]) -> Iterator[torch.Tensor]:
    """The tensors with elements among a kernel's arguments, some of which are tuples, or name tensors by address."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from tensors_of(value)
        elif isinstance(value, torch.Tensor) and value.numel():
            yield value
            yield from getattr(value, "pkv_hf_named", ())


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of what follows its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def use() -> None:
    """Turns the interpreter on where there are Triton and no GPU. Must run before a kernel module is imported."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle, _patch_lang

    plain_np_dtype = interpreter._get_np_dtype
    plain_dot, plain_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    plain_mul, plain_add = InterpreterBuilder.create_fmul, InterpreterBuilder.create_fadd

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32)
        return plain_dot(self, a, b, *rest)

    def of_values(self, operation, a, b):
        if a.dtype.scalar != tl.bfloat16:
            return operation(self, a, b)
        found = operation(self, self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32))
        return self.cast_impl(found, tl.bfloat16)

    def create_fmul(self, a, b):
        return of_values(self, plain_mul, a, b)

    def create_fadd(self, a, b):
        return of_values(self, plain_add, a, b)

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(src.data.copy()).to(torch.bfloat16).view(torch.uint16)
            return TensorHandle(rounded.numpy(), tl.bfloat16)
        if dst_type.scalar == tl.bfloat16 != src.dtype.scalar:  # integers, which it would take for bits
            return self.cast_impl(plain_cast(self, src, tl.float32), tl.bfloat16)
        return plain_cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if dst_type.scalar == tl.float8e4nv:
            exact = self.cast_impl(src, tl.float32).data
            rounded = torch.from_numpy(exact.copy()).to(torch.float8_e4m3fn).view(torch.uint8)
            return TensorHandle(rounded.numpy(), tl.float8e4nv)
        assert src.dtype.scalar == tl.float8e4nv
        exact = torch.from_numpy(src.data.copy()).view(torch.float8_e4m3fn).float()
        return self.cast_impl(TensorHandle(exact.numpy(), tl.float32), dst_type)

    np_dtypes = {}

    def np_dtype(dtype):
        name = "pointer" if dtype.scalar.is_ptr() else dtype.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = plain_np_dtype(dtype)
        return np_dtypes[name]

    patched = set()

    def call_from_a_kernel(self, *args, **kwargs):
        if "core" in self.fn.__globals__ and "core" not in patched:  # those of triton.language.standard
            patched.add("core")
            _patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    plain_init, plain_load, plain_store = (
        interpreter.GridExecutor._init_args_hst,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )
    extents = []

    def init_args_hst(self, args, kwargs):
        on_host = plain_init(self, args, kwargs)
        given = [*on_host[0], *on_host[1].values(), *args]  # what a tensor names is known of the one that was given
        extents[:] = sorted(map(extent, tensors_of(given)))
        return on_host

    def checked(pointers, mask):
        """The mask of an access, as booleans. All its lanes are of one tensor."""
        mask = TensorHandle(np.broadcast_to(mask.data, pointers.data.shape).astype(bool), tl.int1)
        addresses = pointers.data[mask.data]
        if addresses.size:
            first, last = int(addresses.min()), int(addresses.max()) + pointers.get_element_ty().primitive_bitwidth // 8
            if not any(begin <= first and last <= end for begin, end in extents):
                raise IndexError(f"addresses {first} to {last} are of no tensor given: {extents}")
        return mask

    def create_masked_load(self, pointers, mask, *rest):
        return plain_load(self, pointers, checked(pointers, mask), *rest)

    def create_masked_store(self, pointers, value, mask, *rest):
        return plain_store(self, pointers, value, checked(pointers, mask), *rest)

    plain_launch, covered, one_at_a_time = interpreter.GridExecutor.__call__, set(), threading.RLock()

    def launch(self, *args, **kwargs):
        with one_at_a_time:
            return launch_covered(self, *args, **kwargs)

    def launch_covered(self, *args, **kwargs):
        given = {**dict(zip(self.arg_names, args)), **kwargs}
        constants = self.fn, *(value for name, value in given.items() if name in self.constexprs)
        tracer = sys.gettrace()
        if tracer is None or constants not in covered or "coverage" not in type(tracer).__module__:
            covered.add(constants)
            return plain_launch(self, *args, **kwargs)
        sys.settrace(None)
        try:
            return plain_launch(self, *args, **kwargs)
        finally:
            sys.settrace(tracer)

    interpreter.GridExecutor.__call__ = launch
    interpreter.GridExecutor._init_args_hst = init_args_hst
    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = (
        create_masked_load,
        create_masked_store,
    )
    InterpretedFunction.__call__ = call_from_a_kernel
    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.create_fmul, InterpreterBuilder.create_fadd = create_fmul, create_fadd
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(InterpreterBuilder, name, lambda self, src, dst_type: self.cast_impl(src, dst_type))
    interpreter._get_np_dtype = np_dtype
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
