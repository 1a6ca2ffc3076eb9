"""Paged attention, RMSNorm and RoPE in torch, for any dtype: what the kernels are judged by.

Shapes and names are the same in all of `pkv_hf.kernels`. Pools `k_pages`, `v_pages` are `[num_pages, H_kv, page_size,
head_dim]`; position `p` of row `b` is in page `block_table[b, p // page_size]` (int32 `[rows, max_pages]`), and page 0
is the null page. Tokens [starts[b], ends[b]) of a row are live (int32 `[rows]`); the `q_len` queries of a row are its
last ones: query `t` is at position `ends[b] - q_len + t` and attends from `starts[b]` (or its window) to itself.
"""

from __future__ import annotations

import torch

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


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension, as transformers rounds it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of x `[rows, heads, q_len, head_dim]` by cos and sin `[1 or rows, q_len, head_dim]`, as transformers rounds
    it."""
    low, high = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]
