"""Norm and RoPE of queries alone, for a layer that reads the keys and values of another, and the angles of RoPE."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.launch import next_power_of_2
from pkv_hf.kernels.launcher import Launcher
from pkv_hf.kernels.pdl import options, overlaps, release, wait
from pkv_hf.kernels.rope import load_weights, rope_of_queries, turned_head


@triton.jit(do_not_specialize=["q_len", "num_heads", "eps", "stride_cb", "stride_ct"])
def rope_kernel(q_ptr, cos_ptr, sin_ptr, norm_ptr, out_ptr, q_len, num_heads, eps,
                stride_qb, stride_qh, stride_qt, stride_cb, stride_ct,
                D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
                PAIRED: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, WHOLE: tl.constexpr,
                PDL: tl.constexpr):  # fmt: skip
    """One program a row, token and head."""
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    of_head = tl.zeros([1], tl.int64) + head
    weights = load_weights(norm_ptr, of_head, of_head >= 0, D, BLOCK_D, ROTARY, INTERLEAVED, NORM, WHOLE)
    wait(PDL)
    release(PDL)
    angles = row * stride_cb + t * stride_ct
    q_ptr += row * stride_qb + t * stride_qt
    q = turned_head(q_ptr, cos_ptr + angles, sin_ptr + angles, weights, of_head, num_heads, stride_qh, eps, D,
                    BLOCK_D, ROTARY, INTERLEAVED, PAIRED, NORM, OFFSET, WHOLE)  # fmt: skip
    tl.store(out_ptr + ((row * num_heads + head) * q_len + t) * D + d[None, :], q, mask=(d < D)[None, :])


_rope = Launcher(rope_kernel, fp_fusion=False)


def rope(
    q: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    norm: tuple[torch.Tensor, float, float] | None = None,
    *,
    rotary: int | None = None,
    interleaved: bool = False,
    paired_angles: bool = False,
) -> torch.Tensor:
    """What `append.rope_append` makes of q `[rows, H_q, q_len, head_dim]`, and returns, without keys and values.

    `norm` is the weight, the epsilon and what is added to the weight of q's norm; the other arguments are the same.
    Raises ValueError for arguments that the kernel cannot take.
    """
    rows, num_heads, q_len, head_dim = q.shape
    rope = rope_of_queries(q, cos, sin, norm, rotary, interleaved, paired_angles)
    out = torch.empty((rows, num_heads, q_len, head_dim), dtype=q.dtype, device=q.device)
    constants = head_dim, next_power_of_2(head_dim), *rope.constants
    cos, sin, weight, _ = rope.tensors
    _rope(
        (*rope.kind, q.device, *constants), (q_len, num_heads, rows), (q, cos, sin, weight, out),
        (q_len, num_heads, rope.eps, *q.stride()[:3], *rope.strides), (*constants, overlaps(q.device)),
        num_warps=4 if rope.whole else 1, **options(q.device),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["count", "factor"])
def angles_kernel(positions_ptr, frequencies_ptr, cos_ptr, sin_ptr, count, factor,
                  WIDTH: tl.constexpr, BLOCK: tl.constexpr, HALVES: tl.constexpr, PAIRS: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """One program a token: cos and sin [WIDTH] of its position times each of `count` frequencies."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    at = d
    if HALVES:
        at = d % count
    elif PAIRS:
        at = d // 2
    frequencies = tl.load(frequencies_ptr + at, mask=d < WIDTH, other=0.0).to(tl.float32)
    wait(PDL)
    release(PDL)
    phases = tl.load(positions_ptr + token).to(tl.float32) * frequencies
    tl.store(cos_ptr + token * WIDTH + d, (tl.cos(phases) * factor).to(cos_ptr.dtype.element_ty), mask=d < WIDTH)
    tl.store(sin_ptr + token * WIDTH + d, (tl.sin(phases) * factor).to(sin_ptr.dtype.element_ty), mask=d < WIDTH)


_angles = Launcher(angles_kernel, fp_fusion=False)


def angles(
    positions: torch.Tensor, frequencies: torch.Tensor, factor: float, form: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of positions (int64 `[B, q_len]`) times frequencies (floating `[n]`, contiguous), times a factor.

    Both are `[B, q_len, n]` where the form is "once", else `[B, q_len, 2 n]`: in "halves" the n are there twice, in
    "pairs" each twice in a row. Phases are float32 and results are rounded to the dtype, as transformers has them.
    """
    count = len(frequencies)
    width = count if form == "once" else 2 * count
    cos = torch.empty((*positions.shape, width), dtype=dtype, device=positions.device)
    sin = torch.empty_like(cos)
    constants = width, next_power_of_2(width), form == "halves", form == "pairs", overlaps(positions.device)
    _angles(
        (dtype, frequencies.dtype, positions.device, constants), (positions.numel(), 1, 1),
        (positions.contiguous(), frequencies, cos, sin), (count, factor), constants, num_warps=1,
        **options(positions.device),
    )  # fmt: skip
    return cos, sin
