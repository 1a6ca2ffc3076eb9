"""Norms of heads and RoPE, for the kernels that append tokens: each element is turned beside its partner.

Heads come as blocks `[N, WIDTH]`, in a tuple of parts where one block does not hold a whole head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.launch import Remembered, Scales, check_angles, check_rope, described, next_power_of_2

SQUARED_AT_ONCE = 4096
"""Elements of all heads of a token whose squares are summed at a time: 32 registers of a thread."""

OWN, PARTNERS, ANGLES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What `load_heads` loads."""


@triton.jit
def _product(x, y, FUSES: tl.constexpr):
    """x y in float32, rounded to x's dtype unless y is float32. Where the compiler FUSES, no sum takes it in."""
    if y.dtype != tl.float32:
        product = (x.to(tl.float32) * y.to(tl.float32)).to(x.dtype).to(tl.float32)
    elif FUSES:
        product = tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x.to(tl.float32), y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        product = x.to(tl.float32) * y
    return product


@triton.jit
def _is_first(d, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Whether element d of a head is the first of its pair."""
    return d % 2 == 0 if INTERLEAVED else d < ROTARY // 2


@triton.jit
def load_heads(x_ptr, at, seen, OF: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROTARY: tl.constexpr,
               INTERLEAVED: tl.constexpr, PAIRED: tl.constexpr):  # fmt: skip
    """Parts [N, WIDTH] of the vectors that begin at x_ptr + at [N], 0 beyond and where not `seen` [N].

    OF says which elements: a head's OWN, the PARTNERS that these are turned with, or, of cos and sin, their ANGLES.
    """
    parts: tl.tuple = ()
    for begin in tl.static_range(0, D, WIDTH):
        d = begin + tl.arange(0, WIDTH)
        mask = d < D
        if OF != OWN:
            first = _is_first(d, ROTARY, INTERLEAVED)
            mask = d < ROTARY
            if OF == PARTNERS:
                d = tl.where(first, d + 1, d - 1) if INTERLEAVED else tl.where(first, d + ROTARY // 2, d - ROTARY // 2)
            elif INTERLEAVED and not PAIRED:
                d = d // 2
            elif PAIRED and not INTERLEAVED:
                d = tl.where(first, 2 * d, 2 * d - ROTARY + 1)
        parts += (tl.load(x_ptr + at[:, None] + d[None, :], mask=seen[:, None] & mask[None, :], other=0.0),)
    return parts


@triton.jit
def load_turned(x_ptr, cos_ptr, sin_ptr, at, seen, D: tl.constexpr, WIDTH: tl.constexpr, ROTARY: tl.constexpr,
                INTERLEAVED: tl.constexpr, PAIRED: tl.constexpr):  # fmt: skip
    """All that `turned` reads of heads at x_ptr + at and their angles: before a sum over threads, which loads do not
    pass."""
    own = load_heads(x_ptr, at, seen, OWN, D, WIDTH, ROTARY, INTERLEAVED, PAIRED)
    partners, cos, sin = own, own, own
    if ROTARY > 0:
        partners = load_heads(x_ptr, at, seen, PARTNERS, D, WIDTH, ROTARY, INTERLEAVED, PAIRED)
        cos = load_heads(cos_ptr, at * 0, seen, ANGLES, D, WIDTH, ROTARY, INTERLEAVED, PAIRED)
        sin = load_heads(sin_ptr, at * 0, seen, ANGLES, D, WIDTH, ROTARY, INTERLEAVED, PAIRED)
    return own, partners, cos, sin


@triton.jit
def load_weights(norm_ptr, heads, seen, D: tl.constexpr, WIDTH: tl.constexpr, ROTARY: tl.constexpr,
                 INTERLEAVED: tl.constexpr, NORM: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """A norm's weights of heads [N] and of their partners. No kernel writes weights: they need not be waited for."""
    own: tl.tuple = ()
    partners: tl.tuple = ()
    if NORM:
        at = heads * D if WHOLE > 0 else heads * 0
        own = load_heads(norm_ptr, at, seen, OWN, D, WIDTH, ROTARY, INTERLEAVED, False)
        partners = own
        if ROTARY > 0:
            partners = load_heads(norm_ptr, at, seen, PARTNERS, D, WIDTH, ROTARY, INTERLEAVED, False)
    return own, partners


@triton.jit
def _scaled(x, scale, weight, OFFSET: tl.constexpr):
    """Heads x, normed by `scale`, times OFFSET + weight; rounded as `kernels.reference.rms_norm` does."""
    normed = x.to(tl.float32) * scale
    if OFFSET != 0:
        return (normed * (weight.to(tl.float32) + OFFSET)).to(x.dtype)
    else:
        return _product(normed.to(x.dtype), weight, False).to(x.dtype)


@triton.jit
def _mean_square(x_ptr, heads, stride_h, D: tl.constexpr, BLOCK: tl.constexpr):
    """Of all heads of a token together."""
    d = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for at in tl.range(0, heads * D, BLOCK):
        x = tl.load(x_ptr + (at + d) // D * stride_h + (at + d) % D, mask=at + d < heads * D, other=0.0).to(tl.float32)
        squares += x * x
    return tl.sum(squares, 0) / (heads * D)


@triton.jit
def turned(loaded, weights, x_ptr, heads, stride_h, eps, D: tl.constexpr, ROTARY: tl.constexpr,
           INTERLEAVED: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, WHOLE: tl.constexpr,
           FUSES: tl.constexpr):  # fmt: skip
    """Heads of `load_turned`, normed by `load_weights` and turned as `kernels.reference` does: a tuple of parts.

    x_ptr is at the first of all heads of the token; norms are of all of these where WHOLE says how many elements to sum
    at a time. FUSES: the compiler may make one operation of a product and a sum.
    """
    own, partners, cos, sin = loaded
    WIDTH: tl.constexpr = own[0].shape[1]
    if NORM:
        if WHOLE > 0:
            square = _mean_square(x_ptr, heads, stride_h, D, WHOLE)
        else:
            square = tl.zeros([own[0].shape[0], 1], tl.float32)
            for part in tl.static_range(len(own)):
                x = own[part].to(tl.float32)
                square += tl.sum(x * x, 1, keep_dims=True)
            square /= D
        scale = tl.rsqrt(square + eps)
    done: tl.tuple = ()
    for part in tl.static_range(len(own)):
        x, y = own[part], partners[part]
        if NORM:
            x, y = _scaled(x, scale, weights[0][part], OFFSET), _scaled(y, scale, weights[1][part], OFFSET)
        if ROTARY > 0:
            d = part * WIDTH + tl.arange(0, WIDTH)
            a, b = _product(x, cos[part], FUSES), _product(y, sin[part], FUSES)
            rotated = tl.where(_is_first(d, ROTARY, INTERLEAVED)[None, :], a - b, a + b).to(x.dtype)
            x = rotated if ROTARY == D else tl.where((d < ROTARY)[None, :], rotated, x)
        done += (x,)
    return done


@triton.jit
def turned_head(x_ptr, cos_ptr, sin_ptr, weights, head, heads, stride_h, eps, D: tl.constexpr, BLOCK_D: tl.constexpr,
                ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRED: tl.constexpr, NORM: tl.constexpr,
                OFFSET: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """A head [1] of a token, [1, BLOCK_D]; x_ptr is at the first of all."""
    loaded = load_turned(x_ptr, cos_ptr, sin_ptr, head * stride_h, head >= 0, D, BLOCK_D, ROTARY, INTERLEAVED, PAIRED)
    parts = turned(loaded, weights, x_ptr, heads, stride_h, eps, D, ROTARY, INTERLEAVED, NORM, OFFSET, WHOLE, False)
    return parts[0]


class Rope(NamedTuple):
    """What kernels that norm and turn heads are launched with."""

    tensors: tuple[torch.Tensor, ...]
    """cos, sin, and the weights of q's norm and k's; any tensor for those that there are not."""
    eps: float
    strides: tuple[int, int]
    """Of cos and sin: row, token."""
    kind: tuple
    """The dtypes that there are."""
    constants: tuple
    """ROTARY, INTERLEAVED, PAIRED, NORM, OFFSET, WHOLE."""
    whole: bool
    """Whether norms are of all heads together."""


_checked: Remembered[None] = Remembered()


def rope_of(
    k_pages: torch.Tensor, v_pages: torch.Tensor, states: dict[str, torch.Tensor], cos: torch.Tensor | None,
    sin: torch.Tensor | None, held: dict[str, torch.Tensor],
    norms: tuple[torch.Tensor, torch.Tensor, float, float] | None, scales: Scales | None, rotary: int | None,
    interleaved: bool, paired_angles: bool,
) -> Rope:  # fmt: skip
    """The arguments of `append.rope_append`, q, k and v as `states` and rows' tensors as `held`, for a launch.

    Raises ValueError, naming the argument, for what the kernels cannot take.
    """
    q, k, v = states.values()
    head_dim = q.shape[3]
    rotary = head_dim if rotary is None else rotary
    q_norm, k_norm, eps, offset = (q, k, 0.0, 0.0) if norms is None else norms
    key = rotary, *described(k_pages, v_pages, q, k, v, cos, sin, *held.values(), q_norm, k_norm, *(scales or ()))
    if key not in _checked:
        check_rope(k_pages, v_pages, states, held, norms and norms[:2], scales)
        check_angles(q, {"cos": cos, "sin": sin}, rotary)
        _checked[key] = None
    return _arranged(q, (k.dtype, v.dtype), cos, sin, (q_norm, k_norm, eps, offset), norms is not None, rotary,
                     interleaved, paired_angles)  # fmt: skip


def rope_of_queries(
    q: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None,
    norm: tuple[torch.Tensor, float, float] | None, rotary: int | None, interleaved: bool, paired_angles: bool,
) -> Rope:  # fmt: skip
    """The arguments of `queries.rope`. Raises ValueError, naming the argument, for what the kernel cannot take."""
    head_dim = q.shape[3]
    rotary = head_dim if rotary is None else rotary
    weight, eps, offset = (q, 0.0, 0.0) if norm is None else norm
    key = rotary, *described(q, cos, sin, weight)
    if key not in _checked:
        if q.stride(3) != 1:
            raise ValueError(f"q has strides {q.stride()}: want contiguous head_dim")
        sizes = head_dim, q.shape[1] * head_dim
        if norm is not None and (weight.dtype != q.dtype or weight.numel() not in sizes):
            raise ValueError(f"norm is {weight.dtype} {list(weight.shape)}: want {q.dtype} of {sizes} elements")
        check_angles(q, {"cos": cos, "sin": sin}, rotary)
        _checked[key] = None
    norms = weight, weight, eps, offset
    return _arranged(q, (q.dtype, q.dtype), cos, sin, norms, norm is not None, rotary, interleaved, paired_angles)


def _arranged(
    q: torch.Tensor, others: tuple[torch.dtype, torch.dtype], cos: torch.Tensor | None, sin: torch.Tensor | None,
    norms: tuple[torch.Tensor, torch.Tensor, float, float], normed: bool, rotary: int, interleaved: bool,
    paired_angles: bool,
) -> Rope:  # fmt: skip
    (q_norm, k_norm, eps, offset), head_dim = norms, q.shape[3]
    if not rotary or cos is None or sin is None:
        cos = sin = q
        angles, strides = None, (0, 0)
    else:
        angles, strides = cos.dtype, (cos.stride(0) if len(cos) > 1 else 0, cos.stride(1))
    whole = normed and max(q_norm.numel(), k_norm.numel()) > head_dim
    constants = (
        rotary, interleaved, paired_angles, normed, offset,
        min(next_power_of_2(q_norm.numel()), SQUARED_AT_ONCE) if whole else 0,
    )  # fmt: skip
    return Rope((cos, sin, q_norm, k_norm), eps, strides, (q.dtype, *others, angles), constants, whole)
