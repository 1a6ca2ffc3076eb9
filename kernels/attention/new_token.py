"""The token that a decode step appends, on its way through attention: what `append.rope_append` does, in its launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.append import slot_of, store_vector
from pkv_hf.kernels.launch import Scales
from pkv_hf.kernels.quantize import LARGEST
from pkv_hf.kernels.rope import load_turned, load_weights, rope_of, turned


class NewToken(NamedTuple):
    """k and v of one token a row, as they were projected; the other fields are those arguments of `append.rope_append`.

    A row starts at `first_held` or after it. One without tokens gets none if it ends at `first_held` or before.
    """

    k: torch.Tensor
    """`[rows, H_kv, 1, head_dim]`, as v."""
    v: torch.Tensor
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    first_held: torch.Tensor
    norms: tuple[torch.Tensor, torch.Tensor, float, float] | None = None
    rotary: int | None = None
    interleaved: bool = False
    paired_angles: bool = False


class Launched(NamedTuple):
    """What a launch is given for a new token, if there is one."""

    tensors: tuple[torch.Tensor | None, ...]
    """k, v, cos, sin, the weights of q's norm and k's, first_held."""
    numbers: tuple[float, ...]
    """Strides of k (row, head), of v, and of cos and sin (row); eps."""
    constants: tuple
    """ROTARY, INTERLEAVED, PAIRED, NORM, OFFSET, WHOLE, LARGEST."""
    kind: tuple
    """All that kernels are compiled for."""


NOTHING_NEW = Launched((None,) * 7, (0, 0, 0, 0, 0, 0.0), (0, False, False, False, 0.0, 0, 0.0), ())


def launched(
    new: NewToken, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor,
    ends: torch.Tensor, scales: Scales | None,
) -> Launched:  # fmt: skip
    """The arguments of a launch with a new token. Raises ValueError, naming the argument, for one it cannot take."""
    if q.shape[2] != 1:
        raise ValueError(f"new is one token a row, q has {q.shape[2]}: call rope_append() before, without new")
    states = {"q": q, "k": new.k, "v": new.v}
    held = {"block_table": block_table, "first_held": new.first_held, "ends": ends}
    rope = rope_of(
        k_pages, v_pages, states, new.cos, new.sin, held, new.norms, scales, new.rotary, new.interleaved,
        new.paired_angles,
    )  # fmt: skip
    constants = (*rope.constants, LARGEST.get(k_pages.dtype, 0.0))
    return Launched(
        (new.k, new.v, *rope.tensors, new.first_held),
        (*new.k.stride()[:2], *new.v.stride()[:2], rope.strides[0], rope.eps), constants, (*rope.kind, *constants),
    )  # fmt: skip


@triton.jit
def load_norms(q_norm_ptr, k_norm_ptr, kv_head, last, G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
               NORM: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """The norms' weights of a KV head's group of queries, and in the `last` program of k."""
    m = tl.arange(0, BLOCK_M)
    one = tl.zeros([1], tl.int64) + kv_head
    of_q = load_weights(q_norm_ptr, kv_head * G + m, m < G, D, WIDTH, ROTARY, INTERLEAVED, NORM, WHOLE)
    of_k = load_weights(k_norm_ptr, one, (one >= 0) & last, D, BLOCK_D, ROTARY, INTERLEAVED, NORM, WHOLE)
    return of_q, of_k


@triton.jit
def load_token(q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, kv_head, last, stride_qh, stride_kh, stride_vh,
               G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
               ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRED: tl.constexpr):  # fmt: skip
    """What a row's q and, in the `last` program, its k are made of, and its v. Pointers are at the row."""
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    one = tl.zeros([1], tl.int64) + kv_head
    q_at, k_at = (kv_head * G + m) * stride_qh, one * stride_kh
    q = load_turned(q_ptr, cos_ptr, sin_ptr, q_at, m < G, D, WIDTH, ROTARY, INTERLEAVED, PAIRED)
    k = load_turned(k_ptr, cos_ptr, sin_ptr, k_at, (one >= 0) & last, D, BLOCK_D, ROTARY, INTERLEAVED, PAIRED)
    v = tl.load(v_ptr + kv_head * stride_vh + d, mask=(d < D) & last, other=0.0)
    return q, k, v


@triton.jit
def _elements(pages_ptr, EIGHT_BIT: tl.constexpr):
    """Pages whose words of two elements pages_ptr points at, or just the pages."""
    if EIGHT_BIT == 1:
        return pages_ptr.to(tl.pointer_type(tl.int8), bitcast=True)
    elif EIGHT_BIT == 2:
        return pages_ptr.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    else:
        return pages_ptr


@triton.jit
def write_token(loaded, weights, v, k_ptr, heads, stride_h, eps, k_pages_ptr, v_pages_ptr, k_scale_ptr, v_scale_ptr,
                table_ptr, position, first_held, kv_head, stride_kp, stride_kh, stride_vp, stride_vh, stride_sp,
                stride_sh, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr,
                INTERLEAVED: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, WHOLE: tl.constexpr,
                EIGHT_BIT: tl.constexpr, LARGEST: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """k and v of a row's new token to their slot, unless that is before first_held. All threads of the program see them
    then."""
    page, slot, write = slot_of(table_ptr, position, first_held, PAGE)
    parts = turned(
        loaded, weights, k_ptr, heads, stride_h, eps, D, ROTARY, INTERLEAVED, NORM, OFFSET, WHOLE, NATIVE
    )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    mask = (d < D) & write
    scale_at = page * stride_sp + kv_head * stride_sh + slot
    at = _elements(k_pages_ptr + page * stride_kp + kv_head * stride_kh, EIGHT_BIT) + slot * D
    store_vector(at, k_scale_ptr + scale_at, d[None, :], parts[0], mask[None, :], write, LARGEST)
    at = _elements(v_pages_ptr + page * stride_vp + kv_head * stride_vh, EIGHT_BIT) + slot * D
    store_vector(at, v_scale_ptr + scale_at, d, v, mask, write, LARGEST)
    tl.debug_barrier()
