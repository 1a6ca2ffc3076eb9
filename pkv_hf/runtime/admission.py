"""The gate: every reason not to serve a call on pages that can be known before it runs, in one pass.

What follows (`choice`, `forward`) takes the answer and does not look back. What only a forward itself can show is
raised out of it as LayerNotServed, by `interface` and `step`.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import ref

import numpy as np
import torch

from pkv_hf import compat
from pkv_hf.cache.paged import PagedCache
from pkv_hf.errors import NotServed
from pkv_hf.routes.base import MAX_DECODE_QUERIES
from pkv_hf.runtime.evidence import drops_out
from pkv_hf.runtime.masks import Expanded, is_expanded, read_expanded
from pkv_hf.runtime.state import PatchState

PLAIN_ARGUMENTS = frozenset({"input_ids", "inputs_embeds", "attention_mask", "position_ids", compat.CACHE}) | {
    "use_cache",
    "return_dict",
    "cache_position",
    "tokenizer",
}
"""Arguments of a decoder that a step accounts for; whatever else is given is for transformers' layers to see."""

last_made: ContextVar[ref[PagedCache] | None] = ContextVar("pkv_hf_last_made", default=None)
"""The cache that generate() of a patched model made last in this thread."""


@dataclass(frozen=True)
class Admitted:
    """A call that pages serve: `q_len` tokens a row after the `begin` positions that its cache holds."""

    cache: PagedCache
    starts: np.ndarray
    """The first real position of every row, int64 `[rows]`."""
    begin: int
    q_len: int
    device: torch.device
    dtype: torch.dtype
    """Of the weights."""
    asks_more: str
    """What the call asks for beyond the last hidden states of its tokens; empty for nothing."""
    along: dict[str, torch.Tensor]
    """More that there is of its tokens, floating `[B, q_len, ...]` (Gemma 4's inputs of its layers), by argument."""
    expanded: Expanded | None
    """What its masks say, where the model made them: causal ones give way to which tokens are real."""

    @property
    def hidden_alone(self) -> bool:
        return not self.asks_more


def admit(decoder: Any, state: PatchState, call: dict[str, Any]) -> Admitted:
    """What of a decoder's call pages serve. Raises NotServed with the reason why they do not serve it."""
    cache = call.get(compat.CACHE)
    if cache is None:
        raise NotServed(_lost_cache(decoder))
    if decoder.training and (reason := drops_out(decoder)):
        raise NotServed(reason)
    if reason := state.known.refused:
        raise NotServed(reason)
    _check_cache(cache, state)
    if reason := state.known.unfamiliar_implementation():
        raise NotServed(reason)
    config = decoder.config
    if call.get("output_attentions", getattr(config, "output_attentions", False)):
        raise NotServed("output_attentions=True needs the attention weights")
    tokens = tokens_of(call)
    if tokens is None:
        raise NotServed("there are neither input_ids nor inputs_embeds")
    weight = next(decoder.parameters())
    if torch.is_grad_enabled() and (weight.requires_grad or tokens.requires_grad):
        raise NotServed("gradients are being computed: use torch.no_grad() or torch.inference_mode()")
    rows, q_len = tokens.shape[:2]
    if not rows * q_len:
        raise NotServed(f"the call is of {rows} x {q_len} tokens")
    mask, expanded = call.get("attention_mask"), None
    if is_expanded(mask):
        expanded = read_expanded(mask, cache, rows, q_len)
        if not expanded.causal and cache.get_seq_length() and q_len <= MAX_DECODE_QUERIES:
            raise NotServed("attention_mask is more than causal, in a decode step")
        mask = expanded.real
    starts = _row_starts(mask, cache, rows, q_len, state)
    extra = extra_arguments(call)
    along = _along(decoder, tokens, {name: call[name] for name in extra}) if extra else {}
    asks = _asks_more(config, call, [name for name in extra if name not in along])
    return Admitted(cache, starts, cache.get_seq_length(), q_len, tokens.device, weight.dtype, asks, along, expanded)


def _lost_cache(decoder: Any) -> str:
    """Why a call that has no cache should have had one; empty where nobody made one for it."""
    made = last_made.get()
    waiting = made() if made else None
    if waiting is None or waiting.rows:
        return ""
    return f"generate() made a PagedCache, and {type(decoder).__name__} was called without it"


def _check_cache(cache: Any, state: PatchState) -> None:
    """Raises NotServed for a cache that is not of pages, or not of this model's layers."""
    if not isinstance(cache, PagedCache):
        raise NotServed(f"the cache is a {type(cache).__name__}, not a PagedCache")
    if cache.kinds != state.known.kinds[: len(cache.layers)]:
        raise NotServed("the PagedCache has other windows than the model's layers, or more layers")
    if len({layer.length for layer in cache.paged_layers}) > 1:
        raise NotServed("the PagedCache holds more tokens of some layers than of others")


def _row_starts(mask: Any, cache: PagedCache, rows: int, q_len: int, state: PatchState) -> np.ndarray:
    """The first real position of every row (int64 `[rows]`), by the attention mask and by what the cache holds.

    Raises NotServed for masks that are more than left padding.
    """
    past = cache.get_seq_length()
    pads = cache.pads if cache.rows else np.zeros(rows, dtype=np.int64)
    if len(pads) != rows:
        raise NotServed(f"the batch is {rows}, but the PagedCache holds {len(pads)} rows")
    if mask is None:
        if pads.any():
            state.say("no attention_mask, but the cache holds left padding: it was not stored and stays masked")
        return pads
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        raise NotServed("attention_mask is not a [batch, length] tensor")
    if mask.shape != (rows, past + q_len):
        raise NotServed(f"attention_mask is {list(mask.shape)}, not {[rows, past + q_len]}")
    real = mask != 0
    ascends = (real[:, 1:] >= real[:, :-1]).all(dim=1)
    counts, ascends = torch.stack([real.sum(dim=1), ascends.long()]).cpu().numpy()  # one transfer for both
    if not ascends.all():
        raise NotServed("attention_mask has holes or right padding")
    if not counts.all():
        raise NotServed("attention_mask has a row without a real token")
    starts = past + q_len - counts
    if past and (starts < pads).any():
        state.say("attention_mask unmasks padding of an earlier call: it was not stored and stays masked")
    return np.maximum(starts, pads)


def extra_arguments(call: dict[str, Any]) -> list[str]:
    """The arguments of a call that say more than which tokens there are and where they go."""
    given = [name for name, value in call.items() if name not in PLAIN_ARGUMENTS and not _says_nothing(value)]
    given = [name for name in given if not name.startswith("output_") or call[name]]
    return [name for name in given if name != "logits_to_keep" or not _of_one_token(call)]


def _along(decoder: Any, tokens: torch.Tensor, extra: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Those of a call's arguments that a decoder has by name and that say something of each token."""
    named = inspect.signature(type(decoder).forward).parameters
    found = {name: value for name, value in extra.items() if name in named and isinstance(value, torch.Tensor)}
    return {
        name: value
        for name, value in found.items()
        if value.ndim > 2 and value.shape[:2] == tokens.shape[:2] and value.is_floating_point()
    }


def _says_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, (list, tuple, dict)) and not value)


def _of_one_token(call: dict[str, Any]) -> bool:
    """Whether a call of one token a row keeps its hidden states, where it is asked for the last ones."""
    tokens = tokens_of(call)
    return tokens is not None and tokens.shape[1] == 1 and isinstance(call["logits_to_keep"], int)


def tokens_of(call: dict[str, Any]) -> torch.Tensor | None:
    """What a call is of: tokens, int64 `[B, q_len]`, or their embeddings `[B, q_len, hidden]`; None for neither."""
    return call["input_ids"] if call.get("input_ids") is not None else call.get("inputs_embeds")


def _asks_more(config: Any, call: dict[str, Any], extra: list[str]) -> str:
    """What a call asks for beyond the last hidden states of its tokens, by `extra` arguments too; empty for nothing."""
    if call.get("output_hidden_states", getattr(config, "output_hidden_states", False)):
        return "output_hidden_states=True asks for those of all layers"
    if extra:
        return f"its decoder is given {', '.join(extra)}"
    if call.get("return_dict", getattr(config, "return_dict", True)) is False:
        return "return_dict=False asks for a tuple"
    if call.get("use_cache") is False:
        return "use_cache=False, with a cache"
    return ""
