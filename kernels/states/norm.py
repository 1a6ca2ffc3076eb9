"""RMSNorm with a gate, as linear attention has it before its output projection."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.launch import DTYPES, next_power_of_2
from pkv_hf.kernels.launcher import Launcher
from pkv_hf.kernels.pdl import options, overlaps, release, wait
from pkv_hf.kernels.states.common import silu


@triton.jit(do_not_specialize=["stride_gate", "stride_part", "eps"])
def gated_norm_kernel(x_ptr, gate_ptr, weight_ptr, out_ptr, stride_gate, stride_part, eps,
                      GROUPS: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, SHARED: tl.constexpr,
                      NORM: tl.constexpr, GATE_FIRST: tl.constexpr, BLOCK: tl.constexpr,
                      PDL: tl.constexpr):  # fmt: skip
    wait(PDL)
    release(PDL)
    group, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = d < SIZE
    a_part = GROUPS // PARTS
    at = (row * GROUPS + group) * SIZE + d
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    gate_at = row * stride_gate + (group // a_part) * stride_part + (group % a_part) * SIZE + d
    gate = silu(tl.load(gate_ptr + gate_at, mask=mask, other=0.0).to(tl.float32))
    if GATE_FIRST:
        x *= gate
    if NORM:
        x *= tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
        x *= tl.load(weight_ptr + (d if SHARED else group * SIZE + d), mask=mask, other=0.0).to(tl.float32)
    if not GATE_FIRST:
        x *= gate
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=mask)


_gated_norm = Launcher(gated_norm_kernel, fp_fusion=True)


def gated_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float = 0.0,
    *,
    size: int,
    gate_first: bool = False,
) -> torch.Tensor:
    """norm(x) * silu(gate), or norm(x * silu(gate)) with `gate_first`; float32, rounded at the end.

    The norm is an RMSNorm (Zhang & Sennrich 2019) of every `size` elements, with a weight `[size]` for all of them or
    `[width]`; None for the gate alone. x `[rows, width]`, contiguous. gate `[rows, parts, width / parts]`, contiguous
    in a part, parts of whole norms, in x's dtype.

    Returns `[rows, width]` in x's dtype. Raises ValueError for arguments that the kernel cannot take.
    """
    rows, width = x.shape
    parts = gate.shape[1] if gate.ndim == 3 else 0
    if x.dtype not in DTYPES or not x.is_contiguous() or width % size:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}: want contiguous rows of norms of {size}")
    if not parts or gate.shape != (rows, parts, width // parts) or width // parts % size or width % parts:
        raise ValueError(f"gate is {list(gate.shape)}: want [{rows}, parts, {width} / parts], parts of norms of {size}")
    if gate.dtype != x.dtype or gate.stride(2) != 1:
        raise ValueError(f"gate is {gate.dtype} with strides {gate.stride()}: want {x.dtype}, contiguous in a part")
    if weight is not None and (weight.shape not in ((size,), (width,)) or not weight.is_contiguous()):
        raise ValueError(f"weight is {list(weight.shape)}: want contiguous [{size}] or [{width}]")
    out = torch.empty_like(x)
    shared = weight is not None and len(weight) == size
    constants = (
        width // size, parts, size, shared, weight is not None, gate_first, next_power_of_2(size), overlaps(x.device),
    )  # fmt: skip
    _gated_norm(
        (x.dtype, None if weight is None else weight.dtype, x.device, *constants), (width // size, rows, 1),
        (x, gate, x if weight is None else weight, out), (gate.stride(0), gate.stride(1), eps), constants,
        num_warps=8 if size > 2048 else 4 if size > 256 else 1, **options(x.device),
    )  # fmt: skip
    return out
