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

HIDDEN = -6e4
"""A score that floating masks add where a query does not attend is lower: float16's lowest is -65,504."""


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
    past = cache.get_seq_length()
    for mask in masks.values():
        _check(mask, rows, past, q_len)
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
        if mask.ndim == 2:  # of layers that keep states, or as flash attention takes it: which tokens are real
            causal = bool((mask != 0).all()) if real is None else _names_tokens(mask, real)
        else:
            causal = not _has_biases(mask) and all(_is_causal(mask, real, past, window) for window in kinds)
    return Expanded(real, causal, all(mask is not None and mask.ndim == 4 for mask in masks.values()))


def _check(mask: Any, rows: int, past: int, q_len: int) -> None:
    """Raises NotServed for what is no mask of the call, of one kind of layers."""
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.is_complex():
        raise NotServed(f"attention_mask holds a {type(mask).__name__} that is no mask")
    fits = mask.ndim in (2, 4) and mask.shape[0] in (1, rows) and mask.shape[-1] <= past + q_len
    if mask.ndim == 4:
        known = mask.dtype == torch.bool or mask.is_floating_point()
        fits = fits and known and mask.shape[2] == q_len <= mask.shape[3]
    if not fits:
        raise NotServed(
            f"attention_mask is {mask.dtype} {list(mask.shape)}, for {rows} rows of {past} and {q_len} tokens"
        )


def _names_tokens(mask: torch.Tensor, real: torch.Tensor) -> bool:
    """Whether a mask `[rows or 1, length]` says of the last tokens which are real."""
    return bool(((mask != 0) == (real[:, real.shape[1] - mask.shape[1] :] != 0).to(mask.device)).all())


def _real(masks: dict[str, Any], cache: PagedCache, rows: int, q_len: int) -> torch.Tensor | None:
    """Which positions any query attends to; of those that no mask reaches back to, as the cache has them."""
    past, given = cache.get_seq_length(), [mask for mask in masks.values() if mask is not None]
    expanded = [mask for mask in given if mask.ndim == 4]
    if not expanded:
        whole = next((mask for mask in given if mask.shape[1] == past + q_len), None)
        return None if whole is None else (whole != 0).long().expand(rows, -1)
    widest = max(expanded, key=lambda mask: mask.shape[-1])
    seen = _seen(widest).any(dim=1).any(dim=1).expand(rows, -1).long()
    before = past + q_len - seen.shape[1]
    positions = torch.arange(before, device=seen.device)
    pads = torch.from_numpy(cache.pads).to(seen.device) if before else torch.zeros(rows, device=seen.device)
    return torch.cat([(positions >= pads[:, None]).long(), seen], dim=1)


def _seen(mask: torch.Tensor) -> torch.Tensor:
    """Where queries attend. Masks hold the lowest number of their dtype, or of a narrower one's, where they do not."""
    return mask if mask.dtype == torch.bool else mask > HIDDEN


def _has_biases(mask: torch.Tensor) -> bool:
    """Whether a mask adds something to the scores of keys that are seen."""
    return mask.dtype != torch.bool and bool((_seen(mask) & (mask != 0)).any())


def _is_causal(mask: torch.Tensor, real: torch.Tensor | None, past: int, window: int) -> bool:
    """Whether queries attend to the real tokens before them and to themselves, within a window (0: to all)."""
    q_len, length = mask.shape[2:]
    assert real is not None
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
