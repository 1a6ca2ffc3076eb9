"""Attention that no kernel of torch computes, in torch: scores that are capped, and sinks."""

from __future__ import annotations

import torch

from pkv_hf.routes.base import Scores


def built(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of q `[B, H_q, q_len, D]` over all of k and v `[B, H_kv, S, D]`, whose scores are built in memory.

    Queries see what `mask` (bool, `[q_len, S]`) says, all where there is none. Returns `[B, H_q, q_len, V's D]`.
    """
    k, v = k.to(q.dtype), v.to(q.dtype)
    queries = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # a KV head's are one block: K and V are not repeated
    built = (queries @ k.mT).unflatten(2, (-1, q.shape[2]))  # [B, H_kv, G, q_len, S]
    if scores.softcap:
        built = built.mul_(scores.scale / scores.softcap).tanh_().mul_(scores.softcap)
    else:
        built = built.mul_(scores.scale)
    if mask is not None:
        built.masked_fill_(~mask, float("-inf"))
    wide = built.to(torch.promote_types(q.dtype, torch.float32))
    if scores.sinks is None:
        weights = wide.softmax(dim=-1)
    else:
        sinks = scores.sinks.to(wide.dtype).view(k.shape[1], -1, 1, 1)
        weights = (wide - torch.logaddexp(wide.logsumexp(dim=-1, keepdim=True), sinks)).exp_()
    return (weights.to(q.dtype).flatten(2, 3) @ v).unflatten(2, (-1, q.shape[2])).flatten(1, 2)


def flash_with_sinks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, window: int) -> torch.Tensor:
    """Causal attention with sinks by torch's flash kernel, which also returns the sum of each softmax.

    Shapes are as in `built`; the last query is of the last key's token. A sink of score s takes its share of a softmax
    whose sum is e^lse: what is left for the keys is sigmoid(lse - s).
    """
    by_token = (states.to(q.dtype).transpose(1, 2) for states in (q, k, v))
    seen = {"window_size_left": window - 1} if window else {}
    lengths = q.shape[2], k.shape[2]
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *by_token, None, None, *lengths, 0.0, True, False, scale=scores.scale, **seen
    )
    assert scores.sinks is not None
    left = torch.sigmoid(lse - scores.sinks.float()[:, None])  # [B, H_q, q_len]
    return (out.transpose(1, 2) * left[..., None]).to(q.dtype)
