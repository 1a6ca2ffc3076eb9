"""A prompt of generate() through the prefix cache: whether it may, how it begins, what is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.generation import GenerationMode

from pkv_hf import compat
from pkv_hf.cache.paged import PagedCache
from pkv_hf.runtime.admission import Admitted, extra_arguments
from pkv_hf.runtime.prefix_cache.kept import Kept, Rows

if TYPE_CHECKING:
    from pkv_hf.runtime.state import PatchState

ONE_BY_ONE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
"""What gives each row its own next token."""

OTHERWISE = "the decoder is given something else than the prompt's tokens at their places"

Prefill = Callable[..., Any]
"""transformers' `_prefill` of a model: input_ids, generation_config, model_kwargs."""


class Unlike(Exception):
    """A forward over a kept beginning is of other tokens or places than the prompt is: no user sees it."""


class Prompt:
    """A prompt that runs in this thread, and how far its decoder was seen to be given its tokens at their places."""

    def __init__(self, cache: PagedCache, ids: torch.Tensor, rows: Rows, begin: int) -> None:
        self.cache = cache
        self._ids, self._rows, self._begin = ids, rows, begin
        self._end = begin

    @property
    def whole(self) -> bool:
        """Whether all of its tokens were."""
        return self._end == self._rows.length

    def see(self, admitted: Admitted, call: dict[str, Any]) -> None:
        """Looks at a call of the decoder on its cache. Raises Unlike where it does not go on from what was kept."""
        if self._is_next(admitted, call):
            self._end += admitted.q_len
        else:
            self.lost()

    def lost(self) -> None:
        """A forward was not served as its tokens alone are: they are not kept, and must not follow what was kept."""
        self._end = -1
        if self._begin:
            raise Unlike

    def _is_next(self, admitted: Admitted, call: dict[str, Any]) -> bool:
        begin, end = self._end, self._end + admitted.q_len
        if admitted.begin != begin or not admitted.hidden_alone:
            return False
        if admitted.expanded is not None and not admitted.expanded.causal:
            return False
        ids, positions = call.get("input_ids"), call.get("position_ids")
        if ids is not None and not torch.equal(ids, self._ids[:, begin:end].to(ids.device)):
            return False
        if positions is None:
            return not self._rows.pads.any()
        return at_places(positions, self._rows.pads, begin)


class Answered:
    """A prompt of a call of generate(), which takes every row's next tokens after it from its own logits."""

    def __init__(self, state: PatchState, cache: PagedCache, rows: Rows, basis: bytes, emptied: int) -> None:
        self._state, self._cache, self._rows, self._basis, self._emptied = state, cache, rows, basis, emptied

    def keep(self, sequences: torch.Tensor) -> None:
        """Keeps what a cache holds of the answers too, where they are what generate() returns, int64 `[rows, any]`."""
        kept, cache, rows = self._state.prefix_cache, self._cache, self._rows
        length, copies = cache.get_seq_length(), len(sequences) // len(rows.ids)
        ids = sequences[:, :length].cpu().numpy()
        if kept is None or cache.rows != len(sequences) or ids.shape[1] < length:
            return
        if not np.array_equal(ids[:, : rows.length], np.repeat(rows.ids, copies, axis=0)):
            return
        if kept.basis(self._state.known.look()) == self._basis:
            kept.keep(cache, Rows(ids, np.repeat(rows.pads, copies)), self._basis, self._emptied)


answers: ContextVar[list[Answered] | None] = ContextVar("pkv_hf_answers", default=None)
"""Takes the prompts of the call of generate() that runs in this thread; None where nobody knows how it goes on."""


def with_answers(state: PatchState, run: Callable[..., Any], own_loop: bool) -> Callable[..., Any]:
    """A model's `generate` after which the prefix cache keeps answers; not those of a loop of the caller's own."""

    def generate(*args: Any, **kwargs: Any) -> Any:
        told: list[Answered] | None = None if own_loop or state.prefix_cache is None else []
        token = answers.set(told)
        try:
            result = run(*args, **kwargs)
        finally:
            answers.reset(token)
        for each in told or ():
            each.keep(result if isinstance(result, torch.Tensor) else result.sequences)
        return result

    return generate


running: ContextVar[Prompt | None] = ContextVar("pkv_hf_prompt", default=None)
"""The prompt that runs in this thread through a prefix cache."""


def seen(state: PatchState, admitted: Admitted, call: dict[str, Any]) -> None:
    """Looks at a call of the decoder that pages are to serve. Raises Unlike as `Prompt.see`."""
    prompt = running.get()
    if prompt is not None and admitted.cache is prompt.cache:
        prompt.see(admitted, call)
    elif state.prefix_cache is not None and admitted.cache in state.prefix_cache.awaited:
        state.prefix_cache.awaited.discard(admitted.cache)
        state.prefix_cache.say("prompts of assisted generation and of loops of your own do not come by it")


def lost(call: dict[str, Any]) -> None:
    """Notes a call of the decoder that is left to transformers. Raises Unlike as `Prompt.lost`."""
    prompt = running.get()
    if prompt is not None and call.get(compat.CACHE) is prompt.cache:
        prompt.lost()


def at_places(positions: torch.Tensor, pads: np.ndarray, begin: int) -> bool:
    """Whether positions `[..., 1 or rows, length]`, from column `begin` on, count the real tokens of every row."""
    count = torch.arange(begin, begin + positions.shape[-1])[None] - torch.from_numpy(pads)[:, None]
    count = count.to(positions.device)
    return bool(((positions == count) | (count < 0)).all())


def through(state: PatchState, run: Prefill) -> Prefill:
    """A model's `_prefill` that begins by what its prefix cache has of a prompt, and keeps there what it computes."""
    kept = state.prefix_cache
    if kept is None:
        return run

    def prefill(ids: torch.Tensor, config: Any, kwargs: dict[str, Any], **settings: Any) -> Any:
        kept.awaited.discard(kwargs[compat.CACHE])
        reason = _not_cached(state, config, ids, kwargs)
        rows = None if reason else _rows(ids, kwargs.get("attention_mask"))
        if kwargs[compat.CACHE].rows and config.is_assistant:
            pass  # a draft goes on from its own tokens
        elif rows is None:
            kept.say(reason or "attention_mask is more than left padding")
        elif _own_positions(kwargs, rows):
            kept.say("position_ids are the caller's own")
        else:
            return _cached(state, kept, run, rows, ids, config, kwargs, settings)
        return run(ids, config, kwargs, **settings)

    return prefill


def _not_cached(state: PatchState, config: Any, ids: torch.Tensor, kwargs: dict[str, Any]) -> str:
    """Why a prompt is neither looked up nor kept, before its tokens are looked at; empty where it is."""
    look, decoder, cache = state.known.look(), state.known.decoder, kwargs[compat.CACHE]
    if cache.rows:
        return "the call goes on from a cache of its caller's"
    if len(cache.layers) < len(state.known.kinds):
        return "a draft that exits early fills the pages of its first layers alone"
    if any(kind.states for kind in state.known.kinds):
        return "layers keep linear-attention states, which are of all tokens in one"
    if cache.kv_dtype is not None and cache.kv_dtype != decoder.dtype:
        return f"pages of {cache.kv_dtype} hold rounded keys, to which only later tokens attend"
    if reason := compat.dynamic_rope(decoder):
        return reason
    if not look.shares_prompts:
        return look.foreign or "modules have forward hooks"
    if not look.causal:
        return "layers do not say that they are causal"
    if compat.is_sharded(state.known.model):
        return "the model is spread over several processes"
    if config.output_hidden_states:
        return "output_hidden_states=True asks for those of the whole prompt"
    extra = extra_arguments({name: value for name, value in kwargs.items() if name != "logits_to_keep"})
    if kwargs.get("inputs_embeds") is not None or ids.ndim != 2 or not ids.shape[1]:
        extra = ["inputs_embeds"]
    return f"the call has more than tokens and a mask: {', '.join(extra)}" if extra else ""


def _rows(ids: torch.Tensor, mask: Any) -> Rows | None:
    """The rows of a prompt; None where the mask is more than left padding."""
    tokens = ids.cpu().numpy().astype(np.int64)
    if mask is None:
        return Rows(tokens, np.zeros(len(tokens), dtype=np.int64))
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
        return None
    real = mask.cpu().numpy() != 0
    pads = (~real).sum(axis=1).astype(np.int64)
    if (real[:, 1:] < real[:, :-1]).any() or not real[:, -1].all():
        return None
    return Rows(tokens, pads)


def _own_positions(kwargs: dict[str, Any], rows: Rows) -> bool:
    positions = kwargs.get("position_ids")
    return positions is not None and not (
        positions.shape[-1] == rows.length and at_places(positions, rows.pads, begin=0)
    )


def _cached(
    state: PatchState,
    kept: Kept,
    run: Prefill,
    rows: Rows,
    ids: torch.Tensor,
    config: Any,
    kwargs: dict[str, Any],
    settings: dict[str, Any],
) -> Any:
    """Runs a prompt: first what all rows begin with, where that leaves less to compute, then from there."""
    basis, computed = kept.basis(state.known.look()), 0
    together = _together(kept, rows, basis)
    if together:
        first = Rows(rows.ids[:1, rows.pads[0] :][:, :together], np.zeros(1, dtype=np.int64))
        one = torch.from_numpy(first.ids).to(ids.device)
        own = {**kwargs, "attention_mask": torch.ones_like(one)}
        own[compat.CACHE] = PagedCache(state.known.model.config, state.page_size, together, state.kv_dtype)
        if (positions := kwargs.get("position_ids")) is not None:
            own["position_ids"] = torch.arange(together, device=positions.device).expand(*positions.shape[:-2], 1, -1)
        _, begin, _ = _from_kept(state, kept, basis, run, first, one, config, own, settings)
        computed = together - begin
    outputs, begin, answered = _from_kept(state, kept, basis, run, rows, ids, config, kwargs, settings)
    if (told := answers.get()) is not None and answered and config.get_generation_mode() in ONE_BY_ONE:
        told.append(answered)
    kept.count(rows, begin, computed + (len(rows.ids) * (rows.length - begin) if begin else rows.real))
    return outputs


def _together(kept: Kept, rows: Rows, basis: bytes) -> int:
    """How many tokens that all rows begin with are to run as one row first, since that leaves less to compute."""
    alike = rows.alike // kept.size * kept.size if len(rows.ids) > 1 else 0
    hits = kept.hits(rows, basis) if alike and kept.holds(alike) else None
    if hits is None or int(hits.min()) >= alike:
        return 0
    _, now = rows.computed(hits)
    _, then = rows.computed(np.maximum(hits, alike))
    return alike if then + alike - int(hits.min()) < now else 0


def _from_kept(
    state: PatchState,
    kept: Kept,
    basis: bytes,
    run: Prefill,
    rows: Rows,
    ids: torch.Tensor,
    config: Any,
    kwargs: dict[str, Any],
    settings: dict[str, Any],
) -> tuple[Any, int, Answered | None]:
    """Runs a prompt from where kept pages end, and keeps its own.

    Returns its outputs, where it began, and who may keep what follows it, None where it was not kept itself.
    """
    cache, emptied, before = kwargs[compat.CACHE], kept.emptied, dict(kwargs)
    begin = kept.begin(cache, rows, basis)
    prompt = Prompt(cache, ids, rows, begin)
    token = running.set(prompt)
    try:
        outputs = run(ids, config, kwargs, **settings)
    except Unlike:
        running.set(None)
        kept.say(OTHERWISE)
        cache.reset()
        kwargs.clear()
        kwargs.update(before)
        begin = 0
        outputs = run(ids, config, kwargs, **settings)
    finally:
        running.reset(token)
    if not prompt.whole or cache.get_seq_length() != rows.length:
        kept.say(OTHERWISE)
        return outputs, begin, None
    kept.keep(cache, rows, basis, emptied)
    return outputs, begin, Answered(state, cache, rows, basis, emptied)
