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
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Causal grouped-query attention of each row's last q_len tokens over its pages.

    q is `[rows, H_q, q_len, head_dim]`, the rest as the package says; `window` counts the tokens that a query sees,
    itself included (0: all); `scales` are those of quantised pages. Computes in q's dtype. Returns
    `[rows, q_len, H_q, head_dim]`, 0 for queries before starts.
    """
    rows, heads, q_len, head_dim = q.shape
    num_kv_heads, page_size = k_pages.shape[1], k_pages.shape[2]
    grouped = q.reshape(rows, num_kv_heads, heads // num_kv_heads, q_len, head_dim)
    out = q.new_zeros(rows, q_len, heads, head_dim)
    for row in range(rows):
        start, end = int(starts[row]), int(ends[row])
        if window:
            start = max(start, end - q_len - window + 1)
        live = torch.arange(start, end, device=q.device)
        pages, slots = block_table[row, live // page_size].long(), live % page_size
        k, v = k_pages[pages, :, slots], v_pages[pages, :, slots]  # [tokens, H_kv, head_dim]
        if scales is not None:
            k, v = (dequantize(x, s[pages, :, slots], q.dtype) for x, s in zip((k, v), scales))
        k, v = k.to(q.dtype), v.to(q.dtype)
        for t in range(q_len):
            position = end - q_len + t
            first = max(start, position - window + 1) if window else start
            if position < first:
                continue
            seen = slice(first - start, position + 1 - start)
            weights = torch.einsum("kgd,tkd->kgt", grouped[row, :, :, t], k[seen]).mul(scale).softmax(dim=-1)
            out[row, t] = torch.einsum("kgt,tkd->kgd", weights, v[seen]).reshape(heads, head_dim)
    return out


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension, as transformers rounds it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of x `[rows, heads, q_len, head_dim]` by cos and sin `[1 or rows, q_len, head_dim]`, as transformers rounds
    it."""
    low, high = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]
