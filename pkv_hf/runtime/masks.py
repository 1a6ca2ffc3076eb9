"""Masks that a model makes before it calls its decoder, as models around a text decoder do: what they say of the rows.

Such a mask is expanded, `[rows or 1, heads or 1, q_len, positions]`: boolean, or floating with 0 where a query attends.
A dictionary has one for each kind of layer, None for no mask. Positions end with the queries' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from pkv_hf.cache.paged import PagedCache
from pkv_hf.errors import NotServed
from pkv_hf.routes.sdpa import MASK_ELEMENTS

FULL = "full_attention"
"""transformers' name of the layers that attend to all positions."""


def is_expanded(mask: Any) -> bool:
    """Whether a decoder was given masks that its model made, rather than which tokens are real."""
    return isinstance(mask, Mapping) or (isinstance(mask, torch.Tensor) and mask.ndim == 4)


class Expanded(NamedTuple):
    real: torch.Tensor | None
    """Which tokens are real, int64 `[rows, past + q_len]`; None for all."""
    causal: bool
    """The masks are no more than causal over those, within the windows of the cache's layers."""
    explicit: bool
    """They say so for each kind of layer, so that it does not matter whether a layer calls itself causal."""


def read_expanded(given: Any, cache: PagedCache, rows: int, q_len: int) -> Expanded:
    """What masks of `q_len` tokens a row, after those that the cache holds, say.

    Raises NotServed for what are no such masks.
    """
    masks = dict(given) if isinstance(given, Mapping) else {FULL: given}
    if not all(mask is None or isinstance(mask, torch.Tensor) for mask in masks.values()):
        raise NotServed("attention_mask holds what is no tensor")
    windows = set(cache.tables)
    alone = not isinstance(given, Mapping)
    if alone and len(windows) == 1:  # all layers are of one kind, whatever it is called
        masks = {FULL: given} if windows == {0} else {"": given}
    real = _real(masks, cache, rows, q_len)
    causal = not (alone and len(windows) > 1)
    for kind, mask in masks.items():
        kinds = windows & {0} if kind == FULL else windows - {0}
        if mask is None or not causal:
            continue
        if mask.ndim == 2:  # of layers that keep states: their tokens
            tokens = torch.ones(mask.shape) if real is None else real[:, -mask.shape[1] :].cpu()
            causal = torch.equal(mask.cpu() != 0, tokens.expand(mask.shape) != 0)
        else:
            causal = all(_is_causal(mask, real, cache.get_seq_length(), window) for window in kinds)
    return Expanded(real, causal, all(mask is not None for mask in masks.values()))


def _real(masks: dict[str, torch.Tensor | None], cache: PagedCache, rows: int, q_len: int) -> torch.Tensor | None:
    """Which positions any query attends to; of those that no mask reaches back to, as the cache has them."""
    expanded = [mask for mask in masks.values() if mask is not None and mask.ndim == 4]
    if not expanded:
        return None
    past = cache.get_seq_length()
    widest = max(expanded, key=lambda mask: mask.shape[-1])
    if widest.shape[0] not in (1, rows) or widest.shape[2] != q_len or not q_len <= widest.shape[3] <= past + q_len:
        raise NotServed(f"attention_mask is {list(widest.shape)}, for {rows} rows of {past} and {q_len} tokens")
    seen = _seen(widest).any(dim=1).any(dim=1).expand(rows, -1).long()
    before = past + q_len - seen.shape[1]
    positions = torch.arange(before, device=seen.device)
    pads = torch.from_numpy(cache.pads).to(seen.device) if before else torch.zeros(rows, device=seen.device)
    return torch.cat([(positions >= pads[:, None]).long(), seen], dim=1)


def _seen(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def _is_causal(mask: torch.Tensor, real: torch.Tensor | None, past: int, window: int) -> bool:
    """Whether queries attend to the real tokens before them and to themselves, within a window (0: to all)."""
    q_len, length = mask.shape[2:]
    if real is None or mask.shape[0] not in (1, len(real)):
        return False
    end = past + q_len
    keys = torch.arange(end - length, end, device=mask.device)
    tokens = real[:, None, None, end - length :] != 0
    block = max(MASK_ELEMENTS // (length * len(real)), 1)
    for begin in range(0, q_len, block):
        queries = torch.arange(past + begin, past + min(begin + block, q_len), device=mask.device)[:, None]
        causal = keys <= queries
        if window:
            causal &= keys > queries - window
        if not bool((_seen(mask[:, :, begin : begin + block]) == (causal & tokens)).all()):
            return False
    return True
