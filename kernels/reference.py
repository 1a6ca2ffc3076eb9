"""Paged attention, norms, activations, RoPE and selection in torch, for any dtype: what the kernels are judged by.

Shapes and names are the same in all of `pkv_hf.kernels`. Pools `k_pages`, `v_pages` are `[num_pages, H_kv, page_size,
head_dim]`; position `p` of row `b` is in page `block_table[b, p // page_size]` (int32 `[rows, max_pages]`), and page 0
is the null page. Tokens [starts[b], ends[b]) of a row are live (int32 `[rows]`); the `q_len` queries of a row are its
last ones: query `t` is at position `ends[b] - q_len + t` and attends from `starts[b]` (or its window) to itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from pkv_hf.kernels.quantize import dequantize


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    chunked: bool = False,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Causal grouped-query attention of each row's last q_len tokens over its pages.

    q is `[rows, H_q, q_len, head_dim]`, the rest as the package says, but that V's pages may have a head_dim of their
    own, value_dim. `window` counts the tokens that a query sees, itself included (0: all); where layers are `chunked`
    they are those of its chunk up to itself, of chunks of so many tokens from starts on. Scores are
    `softcap * tanh(scores / softcap)` where softcap is not 0. `sinks`, `[H_q]`, are one more score of a head's softmax,
    whose value is 0. `scales` are those of quantised pages. Computes in q's dtype. Returns
    `[rows, q_len, H_q, value_dim]`, 0 for queries before starts.
    """
    rows, heads, q_len, head_dim = q.shape
    num_kv_heads, page_size = k_pages.shape[1], k_pages.shape[2]
    group = heads // num_kv_heads
    grouped = q.reshape(rows, num_kv_heads, group, q_len, head_dim)
    out = q.new_zeros(rows, q_len, heads, v_pages.shape[3])
    for row in range(rows):
        begin, end = int(starts[row]), int(ends[row])
        start = first_seen(begin, end - q_len, window, chunked)
        live = torch.arange(start, end, device=q.device)
        pages, slots = block_table[row, live // page_size].long(), live % page_size
        k, v = k_pages[pages, :, slots], v_pages[pages, :, slots]  # [tokens, H_kv, head_dim]
        if scales is not None:
            k, v = (dequantize(x, s[pages, :, slots], q.dtype) for x, s in zip((k, v), scales))
        k, v = k.to(q.dtype), v.to(q.dtype)
        for t in range(q_len):
            position = end - q_len + t
            first = first_seen(begin, position, window, chunked)
            if position < first:
                continue
            seen = slice(first - start, position + 1 - start)
            scores = torch.einsum("kgd,tkd->kgt", grouped[row, :, :, t], k[seen]).mul(scale)
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks.to(q.dtype).view(num_kv_heads, group, 1)], dim=-1)
            weights = scores.softmax(dim=-1)[..., : position + 1 - first]
            out[row, t] = torch.einsum("kgt,tkd->kgd", weights, v[seen]).flatten(0, 1)
    return out


def first_seen(start: int, position: int, window: int, chunked: bool) -> int:
    """The first position that a query attends to, in a row that begins at `start`."""
    if chunked:
        return start + max(position - start, 0) // window * window
    return max(start, position - window + 1) if window else start


Norm = tuple[torch.Tensor | None, float, float]
"""An RMSNorm: its weight `[width]` or None for none, its epsilon, and what is added to the weight."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float = 0.0) -> torch.Tensor:
    """RMSNorm (Zhang & Sennrich 2019) over the last dimension, times `offset + weight`.

    Rounded as transformers rounds it: with an offset once, as Gemma does, without one before and after the
    multiplication, as Llama does.
    """
    wide = _wide(x)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return wide.to(x.dtype)
    if offset:
        return (wide * (offset + weight.to(wide.dtype))).to(x.dtype)
    return weight * wide.to(x.dtype)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, offset: float = 0.0
) -> torch.Tensor:
    """LayerNorm (Ba et al. 2016) over the last dimension, times `offset + weight`; rounded once."""
    wide = _wide(x)
    weight, bias = (each if each is None else each.to(wide.dtype) for each in (weight, bias))
    weight = weight if weight is None else offset + weight
    return functional.layer_norm(wide, x.shape[-1:], weight, bias, eps).to(x.dtype)


def add_norms(
    y: torch.Tensor, residual: torch.Tensor, after: Norm | None, before: Norm | None, scale: float = 1.0,
    gain: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """total = gain * (residual + scale * after(y)), and before(total); where a norm is None, what it would be of."""
    y = y if after is None else rms_norm(y, *after)
    total = residual + (y if scale == 1.0 else scale * y)
    total = total if gain is None else gain * total
    return total, total if before is None else rms_norm(total, *before)


Adapter = tuple[torch.Tensor, torch.Tensor, float]
"""A `[rank, inputs]`, B `[outputs, rank]`, and the scaling."""


def adapted(y: torch.Tensor, x: torch.Tensor, adapters: Sequence[Adapter]) -> torch.Tensor:
    """y + the sum of scaling * (x A^T) B^T (LoRA, Hu et al. 2021), rounded as PEFT rounds it.

    y `[rows, outputs]` is the base layer's, x `[rows, inputs]`. Adapters compute in their own dtype.
    """
    total = y
    for a, b, scaling in adapters:
        total = total + functional.linear(functional.linear(x.to(a.dtype), a), b) * scaling
    return total.to(y.dtype)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}
"""By name: SiLU, GELU by erf and by tanh (Hendrycks & Gimpel 2016), ReLU and its square (So et al. 2021)."""


def activation(x: torch.Tensor, name: str) -> torch.Tensor:
    """The activation of that name, rounded to x's dtype."""
    return ACTIVATIONS[name](x)


def rotate(
    x: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rotary: int | None = None,
    interleaved: bool = False,
    paired_angles: bool = False,
) -> torch.Tensor:
    """RoPE (Su et al. 2021) of the first `rotary` elements of heads, rounded as transformers rounds it.

    x is `[rows, heads, q_len, head_dim]`, cos and sin `[1 or rows, q_len, rotary]`. `rotary` None is all of head_dim, 0
    none, and then cos and sin are not looked at. Pair i is elements i and i + rotary / 2, `interleaved` 2i and 2i + 1.
    Its angles are at i and i + rotary / 2 of cos and sin, where pairs are interleaved both at i; with `paired_angles`
    at 2i and 2i + 1.

    Every product is rounded to x's dtype where cos and sin have it (Llama). Where they are float32 the result is
    rounded once (OLMo 2, and Cohere with its angles made float32).
    """
    rotary = x.shape[-1] if rotary is None else rotary
    if not rotary:
        return x
    if cos is None or sin is None:
        raise ValueError(f"cos or sin is None: want both, or rotary=0 instead of {rotary}")
    cos, sin = (_angles(angles, interleaved, paired_angles) for angles in (cos, sin))
    turned, rest = x[..., :rotary], x[..., rotary:]
    if interleaved:
        quarter_turn = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
    else:
        quarter_turn = torch.cat([-turned[..., rotary // 2 :], turned[..., : rotary // 2]], dim=-1)
    return torch.cat([(turned * cos + quarter_turn * sin).to(x.dtype), rest], dim=-1)


def _angles(angles: torch.Tensor, interleaved: bool, paired: bool) -> torch.Tensor:
    """cos or sin by elements of a head, as rows of heads take them."""
    if interleaved and not paired:
        angles = angles[..., : angles.shape[-1] // 2].repeat_interleave(2, dim=-1)
    elif paired and not interleaved:
        angles = torch.cat([angles[..., ::2], angles[..., 1::2]], dim=-1)
    return angles[:, None]


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class EndOfSequence(NamedTuple):
    """What ends a row of tokens."""

    tokens: torch.Tensor
    """Tokens that do, int64 `[any]`."""
    pad: torch.Tensor
    """What follows in a row that has ended, int64 `[]`."""


class NextStep(NamedTuple):
    """What a decode step of one token a row reads, and leaves for the next one."""

    inputs: torch.Tensor
    """Tokens, int64 `[rows, 1]`."""
    positions: torch.Tensor
    """int64 `[..., rows, 1]`."""
    ends: torch.Tensor
    """int32 `[rows]`, as the package says."""


def select(
    logits: torch.Tensor,
    newest: torch.Tensor,
    step: NextStep,
    end: EndOfSequence | None = None,
    most: torch.Tensor | None = None,
) -> None:
    """Takes every row's token with the largest of the logits `[rows, any, vocabulary]` of its last one.

    Of equal ones it is the first, and NaN is larger than all, as for `torch.argmax`. With `most` `[vocabulary]`, no
    logit counts for more. `newest`, int64 `[2, rows]`, gets the tokens; its second row is 1 for every row that goes on,
    and becomes 0 where a token of `end` comes: of a row with 0 the token is the pad. `step` gets the tokens, too, and
    goes on by one position.
    """
    scores = logits[:, -1]
    if most is not None:
        scores = torch.minimum(scores, most)
    tokens = torch.argmax(scores, dim=-1)
    if end is not None:
        tokens = torch.where(newest[1] != 0, tokens, end.pad)
        newest[1] *= (tokens[:, None] != end.tokens).all(dim=-1)
    newest[0] = tokens
    step.inputs.copy_(tokens[:, None])
    step.positions.add_(1)
    step.ends.add_(1)
