"""Attention in torch over whole sequences and over pages: prompts, and the `sdpa` route.

Nothing here builds a `[B, 1, q_len, kv_len]` mask: rows are attended to by their real tokens, causal blocks go to
SDPA's own causal kernels, and what is left is masked in blocks of queries.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention.bias import CausalBias, causal_lower_right

from pkv_hf.cache.layer import PagedLayer
from pkv_hf.cache.packing import Packing
from pkv_hf.cache.table import BlockTable
from pkv_hf.kernels.launch import capability
from pkv_hf.routes.base import Accepted, Bounds, Rejected, Scores, StepShape
from pkv_hf.routes.built import built, flash_with_sinks
from pkv_hf.routes.costs import Work

MASK_ELEMENTS = 1 << 24
"""The largest boolean mask of a block of queries; bounds the memory of a long block over a long past."""

MOST_FLASH_DIM = 256
"""The largest head_dim of torch's flash kernel."""

LONG_ON_CPU = 2048
"""From so many tokens on SDPA's CPU kernel, one thread a head, leaves memory bandwidth unused: it is given parts."""


def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """torch's attention of q `[B, H_q, q_len, D]` with k and v `[B, H_kv, S, D]`, never by the math kernel.

    `causal`: the last query is of the last key's token. K and V may differ in D: returns `[B, H_q, q_len, V's D]`.
    """
    k, v = k.to(q.dtype), v.to(q.dtype)
    head_dim, value_dim = q.shape[3], v.shape[3]
    if head_dim != value_dim and not q.is_cuda:  # where the one kernel beside the math kernel takes them alike
        q, k, v = (_padded(states, max(head_dim, value_dim)) for states in (q, k, v))
    group = q.shape[1] // k.shape[1]
    flash = mask is None and head_dim == value_dim <= MOST_FLASH_DIM
    if group > 1 and not takes_grouped_heads(q.dtype, q.device, masked=not flash):
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        group = 1
    if causal and q.shape[2] < k.shape[2]:  # SDPA's own `is_causal` aligns the first ones
        mask, causal = _lower_right(q.shape[2], k.shape[2]), False
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, is_causal=causal, enable_gqa=group > 1
    )
    return out[..., :value_dim]


def _padded(states: torch.Tensor, head_dim: int) -> torch.Tensor:
    """States with zeros after each head's elements, up to `head_dim`."""
    return functional.pad(states, (0, head_dim - states.shape[3])) if states.shape[3] < head_dim else states


@functools.lru_cache(maxsize=1)
def _lower_right(q_len: int, kv_len: int) -> CausalBias:
    """The bias of a step's layers, which are of one size."""
    return causal_lower_right(q_len, kv_len)


def takes_grouped_heads(dtype: torch.dtype, device: torch.device, masked: bool) -> bool:
    """Whether SDPA reads grouped heads in place.

    On CUDA only the flash kernel does. It needs a half type, sm_80 and no mask; otherwise enable_gqa falls to the math
    kernel, which builds the whole score matrix.
    """
    if device.type != "cuda":
        return True
    return not masked and dtype in (torch.float16, torch.bfloat16) and capability(device) >= (8, 0)


def takes_flash(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether torch's flash kernel, called by itself, takes queries and values: it checks nothing.

    It reads rows of any length at once, behind a window too, and returns the sums of the softmax.
    """
    flash = torch.backends.cuda
    return (
        q.is_cuda
        and takes_grouped_heads(q.dtype, q.device, masked=False)
        and q.shape[3] == v.shape[3]
        and q.shape[3] % 8 == 0
        and q.shape[3] <= MOST_FLASH_DIM
        and flash.is_flash_attention_available()
        and flash.flash_sdp_enabled()
    )


def _one_query(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
    """Attention of one query a row over all of k and v: a KV head's group of query heads is one block of queries."""
    if not scores.plain or (q.shape[3] != v.shape[3] and not q.is_cuda):
        return built(q, k, v, scores)
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # [B, H_kv, G, D]
    if q.is_cuda or not (q.dtype == k.dtype == torch.float32) or k.shape[2] < LONG_ON_CPU:
        return sdpa(grouped, k, v, scores.scale).reshape(*q.shape[:3], v.shape[3])
    rows = [_in_parts(grouped[row], k[row], v[row], scores.scale) for row in range(len(q))]
    return torch.stack(rows).view_as(q)


def _in_parts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Sequence splitting on the CPU: k and v `[H_kv, S, D]` in as many parts as threads, merged by log-sum-exp.

    q is `[H_kv, G, D]`, as is what comes back.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    parts = min(torch.get_num_threads(), 8)
    size = k.shape[1] // parts
    even = parts * size

    def cut(states: torch.Tensor) -> torch.Tensor:
        return states[:, :even].unflatten(1, (parts, size)).transpose(0, 1)

    out, lse = flash(q.expand(parts, *q.shape), cut(k), cut(v), 0.0, False, scale=scale)
    if even < k.shape[1]:
        rest = flash(q[None], k[None, :, even:], v[None, :, even:], 0.0, False, scale=scale)
        out, lse = torch.cat([out, rest[0]]), torch.cat([lse, rest[1]])
    return (lse.softmax(dim=0).unsqueeze(-1) * out).sum(dim=0)


def attend_block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scores: Scores,
    q_begin: int,
    k_begin: int,
    window: int,
) -> torch.Tensor:
    """Causal attention of queries at positions q_begin, ... with keys at positions k_begin, ...

    q is `[B, H_q, q_len, D]`, k and v `[B, H_kv, S, D]`, each of its own D, and reach to the last query's own position;
    `window` counts the tokens that a query sees, itself included (0: all), or those of a chunk, one of which begins
    with the keys. Returns `[B, H_q, q_len, V's D]`.
    """
    if scores.chunked:
        return _in_chunks(q, k, v, scores, q_begin, k_begin, window)
    if scores.sinks is not None and not scores.softcap and takes_flash(q, v):
        return flash_with_sinks(q, k, v, scores, window)
    q_len, length = q.shape[2], k.shape[2]
    if q_len == 1:
        seen = slice(max(length - window, 0) if window else 0, None)
        return _one_query(q, k[:, :, seen], v[:, :, seen], scores)
    # on a CPU torch would build the mask of queries that follow others, whole
    if scores.plain and (q_begin == k_begin or q.is_cuda) and (not window or length <= window):
        return sdpa(q, k, v, scores.scale, causal=True)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    block = max(MASK_ELEMENTS // length, 16) if not window else max(window, 256)
    if not scores.plain:  # scores are built, of all heads
        block = min(block, max(MASK_ELEMENTS // (length * q.shape[0] * q.shape[1]), 16))
    for begin in range(0, q_len, block):
        end = min(begin + block, q_len)
        positions = torch.arange(q_begin + begin, q_begin + end, device=q.device)[:, None]
        first = max(q_begin + begin - window + 1 - k_begin, 0) if window else 0
        last = q_begin + end - k_begin
        keys = torch.arange(k_begin + first, k_begin + last, device=q.device)[None, :]
        mask = keys <= positions
        if window:
            mask &= keys > positions - window
        states = q[:, :, begin:end], k[:, :, first:last], v[:, :, first:last]
        out[:, :, begin:end] = sdpa(*states, scores.scale, mask) if scores.plain else built(*states, scores, mask)
    return out


def _in_chunks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, q_begin: int, k_begin: int, chunk: int
) -> torch.Tensor:
    """`attend_block` where every chunk of so many tokens attends to itself; the first begins with the keys."""
    within, end, parts = scores._replace(chunked=False), q_begin + q.shape[2], []
    for first in range(q_begin - (q_begin - k_begin) % chunk, end, chunk):
        begin, last = max(first, q_begin), min(first + chunk, end)
        keys = slice(first - k_begin, last - k_begin)
        queries = q[:, :, begin - q_begin : last - q_begin]
        parts.append(attend_block(queries, k[:, :, keys], v[:, :, keys], within, begin, first, 0))
    return torch.cat(parts, dim=2)


def over_prompt(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, starts: np.ndarray, window: int
) -> torch.Tensor:
    """Attention of a first step: each row's real tokens, from starts[row] on, among themselves.

    q `[B, H_q, q_len, D]` of all S tokens or of the last ones, k and v `[B, H_kv, S, D]`; returns
    `[B, H_q, q_len, V's D]`, 0 for padding.
    """
    begin = k.shape[2] - q.shape[2]
    if not starts.any():
        return attend_block(q, k, v, scores, begin, 0, window)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for row, start in enumerate(starts.tolist()):
        first = max(start, begin)
        part = (slice(row, row + 1), slice(None), slice(first - begin, None))
        keys = (slice(row, row + 1), slice(None), slice(start, None))
        out[part] = attend_block(q[part], k[keys], v[keys], scores, first, start, window)
    return out


def over_packed_prompt(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, packing: Packing, window: int
) -> torch.Tensor:
    """`over_prompt` of packed rows: q `[1, H_q, tokens, D]`, k and v `[1, H_kv, tokens, D]`; returns
    `[1, H_q, tokens, V's D]`."""
    if scores.plain and takes_flash(q, v):
        bounds, longest = packing.bounds_on(q.device), packing.length - int(packing.starts.min())
        flash = torch.ops.aten._flash_attention_forward
        by_token = (states[0].to(q.dtype).transpose(0, 1) for states in (q, k, v))
        seen = {"window_size_left": window - 1} if window else {}
        out, *_ = flash(*by_token, bounds, bounds, longest, longest, 0.0, True, False, scale=scores.scale, **seen)
        return out.transpose(0, 1)[None]
    out = q.new_empty(*q.shape[:3], v.shape[3])
    for segment in packing.segments():
        out[:, :, segment] = attend_block(q[:, :, segment], k[:, :, segment], v[:, :, segment], scores, 0, 0, window)
    return out


def over_pages(layer: PagedLayer, q: torch.Tensor, scores: Scores, starts: np.ndarray, begin: int) -> torch.Tensor:
    """Attention of queries `[B, H_q, q_len, D]` at positions begin, ... over a layer's pages.

    The queries' own tokens are in the pages too. Rows whose pages are consecutive are read in place, others gathered
    first. Returns `[B, H_q, q_len, V's D]`.
    """
    end, window = begin + q.shape[2], layer.table.window
    seen = starts
    if scores.chunked:
        seen = starts + np.maximum(begin - starts, 0) // window * window
    elif window:
        seen = np.maximum(starts, begin - window + 1)
    if (seen == seen[0]).all() and seen[0] <= begin:
        k, v = layer.dense(int(seen[0]), end)
        return attend_block(q, k, v, scores, begin, int(seen[0]), window)
    out = q.new_zeros(*q.shape[:3], layer.pages[1].shape[3])
    for row, first in enumerate(seen.tolist()):
        k, v = layer.dense(first, end, slice(row, row + 1))
        real = max(first - begin, 0)  # queries before it are padding
        part = (slice(row, row + 1), slice(None), slice(real, None))
        out[part] = attend_block(q[part], k, v, scores, begin + real, first, window)
    return out


class Sdpa:
    """torch's attention on views of the pages, or on gathered copies where a row's pages are not consecutive."""

    name = "sdpa"
    fuses_rope = False

    def supports(self, shape: StepShape) -> Accepted | Rejected:
        return Accepted()

    def work(self, shape: StepShape) -> Work | None:
        return None

    def prepare(self, table: BlockTable, device: torch.device) -> None:
        pass

    def append(self, layer: PagedLayer, k: torch.Tensor, v: torch.Tensor, bounds: Bounds) -> None:
        layer.write(k, v)

    def rope_append(self, *_: object) -> torch.Tensor:
        raise NotImplementedError("the model's own RoPE goes with this route")

    rope_attend = rope_append

    def decode(self, layer: PagedLayer, q: torch.Tensor, scores: Scores, bounds: Bounds) -> torch.Tensor:
        return over_pages(layer, q, scores, bounds.starts, bounds.begin).transpose(1, 2)
