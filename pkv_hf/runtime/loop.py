"""The run-ahead loop: greedy decoding and sampling that queue a step before the tokens of the last one are read.

It takes the place of transformers' `_sample` through `generate(custom_generate=...)`, with the same processors,
criteria, selection and results. The next token, the flags of finished rows and the stop decision stay on the device;
the host reads them one step late, and takes back the step that ran too far.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from pkv_hf import compat
from pkv_hf.cache.paged import PagedCache
from pkv_hf.errors import NotServed
from pkv_hf.policy.choose import CHOOSE_EVERY
from pkv_hf.runtime.serving import choose_route, decide, plan, run_static, static_step
from pkv_hf.runtime.state import STATE, PatchState
from pkv_hf.runtime.static import DecodeStep


def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of a patched model's `generate`: transformers' own, with the run-ahead loop where that serves."""
    original = type(self).generate
    call = inspect.signature(original).bind_partial(self, *args, **kwargs).arguments
    if "custom_generate" not in call and _runs_ahead(self, call):
        kwargs["custom_generate"] = functools.partial(run_ahead, streamer=call.get("streamer"))
    return original(self, *args, **kwargs)


def _runs_ahead(model: Any, call: dict[str, Any]) -> bool:
    """Whether a call of generate() is greedy decoding or sampling that needs nothing of the host at each step."""
    if any(call.get(name) for name in ("assistant_model", "synced_gpus", "stopping_criteria")):
        return False
    if compat.is_sharded(model):
        return False  # its processes take their steps together: transformers' loop waits for the slowest
    config, _ = model._prepare_generation_config(call.get("generation_config"), **call.get("kwargs", {}))
    return (
        config.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and not config.stop_strings
        and not (config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states))
        and config.cache_implementation in (None, "dynamic")
        and not config.is_assistant
    )


def run_ahead(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """transformers' `_sample`, for `custom_generate`: same arguments, same result."""
    state: PatchState = getattr(model, STATE)
    cache = model_kwargs.get(compat.CACHE)
    if not isinstance(cache, PagedCache) or model.training or not _accelerated(model, state, cache):
        return type(model)._sample(
            model, input_ids, logits_processor, stopping_criteria, generation_config, streamer=streamer, **model_kwargs
        )
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
    logits = outputs.logits
    del outputs
    forward = _Forward(model, state, cache, model_kwargs)
    keep_scores = generation_config.return_dict_in_generate and generation_config.output_scores
    keep_logits = generation_config.return_dict_in_generate and generation_config.output_logits
    scores: tuple[torch.Tensor, ...] = ()
    raw_logits: tuple[torch.Tensor, ...] = ()
    pad_token = generation_config._pad_token_tensor
    ends_rows = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
    reader = _LateReader(input_ids.device, streamer)
    while True:
        next_logits = logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
        del logits
        next_scores = logits_processor(input_ids, next_logits)
        if keep_scores:
            scores += (next_scores,)
        if keep_logits:
            raw_logits += (next_logits,)
        if generation_config.do_sample:
            rng = _rng_offset(input_ids.device)
            next_tokens = torch.multinomial(nn.functional.softmax(next_scores, dim=-1), num_samples=1).squeeze(1)
        else:
            next_tokens = torch.argmax(next_scores, dim=-1)
        if ends_rows:
            next_tokens = next_tokens * unfinished + pad_token * (1 - unfinished)
        input_ids = torch.cat([input_ids, next_tokens[:, None]], dim=-1)
        unfinished = unfinished & ~stopping_criteria(input_ids, scores if keep_scores else None)
        full = stopping_criteria.max_length is not None and input_ids.shape[1] >= stopping_criteria.max_length
        if reader.stops(unfinished, next_tokens):
            if reader.late:
                input_ids, scores, raw_logits = input_ids[:, :-1], scores[:-1], raw_logits[:-1]
                cache.crop(-1)
                if generation_config.do_sample:
                    _rewind_rng(input_ids.device, rng)
            break
        if full:
            reader.flush()
            break
        logits = forward(input_ids, next_tokens)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    kept: dict[str, Any] = {"scores": scores if keep_scores else None, "logits": raw_logits if keep_logits else None}
    return GenerateDecoderOnlyOutput(sequences=input_ids, **{compat.CACHE: cache}, **kept)  # type: ignore[arg-type]


def _accelerated(model: Any, state: PatchState, cache: PagedCache) -> bool:
    """Whether decode steps go by Triton kernels, for which queueing ahead is worth it."""
    if model.device.type == "meta":
        return False  # accelerate brings the weights in for each forward
    decision = decide(state, cache, np.zeros(1), 1, model.device, model.dtype)
    return decision is not None and decision.route.fuses_rope


class _Forward:
    """The forward of the steps after the prompt: static where it can be, else the model as transformers calls it."""

    def __init__(self, model: Any, state: PatchState, cache: PagedCache, model_kwargs: dict[str, Any]) -> None:
        self.model, self.state, self.cache, self.model_kwargs = model, state, cache, model_kwargs
        self.static: DecodeStep | None = None
        decoder, head = model.base_model, model.get_output_embeddings()
        next_tokens = torch.empty((cache.rows, 1), dtype=torch.long, device=model.device)
        try:
            step = plan(decoder, state, {**model_kwargs, "input_ids": next_tokens})
        except NotServed:
            return
        self.starts = step.bounds.starts
        self.static = static_step(decoder, state, cache, step.route, 1, head)
        position_ids = model_kwargs.get("position_ids")
        if position_ids is None:  # a forward of the caller's own may not take them
            position_ids = torch.tensor([[step.bounds.begin]], device=model.device)
        self.positions: torch.Tensor | None = position_ids[:, -1:]

    def _choose_again(self) -> None:
        """Takes another route's step where rows have grown into another route's lengths."""
        assert self.static is not None
        route = choose_route(self.state, self.cache, self.starts, 1, self.static.device, self.static.dtype)
        if route.name != self.static.route.name:
            other = static_step(self.static.decoder, self.state, self.cache, route, 1, self.static.head)
            if other is not None:
                self.positions = self.static.positions.clone()
                self.static = other

    def __call__(self, input_ids: torch.Tensor, next_tokens: torch.Tensor) -> torch.Tensor:
        if self.static is not None:
            if self.positions is None and self.cache.get_seq_length() % CHOOSE_EVERY == 0:
                self._choose_again()
            tokens, positions = next_tokens[:, None], self.positions
            self.positions = None  # from here on they count on the device
            logits = run_static(self.state, self.static, self.cache, tokens, positions, self.starts)
            self.state.counts.add("pages")
            return logits
        inputs = self.model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **self.model_kwargs)
        outputs = self.model(**inputs, return_dict=True)
        self.model_kwargs = self.model._update_model_kwargs_for_generation(outputs, self.model_kwargs)
        return outputs.logits


class _LateReader:
    """Reads a step's stop decision and tokens once the next step is queued; those of the first step at once."""

    def __init__(self, device: torch.device, streamer: Any) -> None:
        self.streamer = streamer
        self.late = False
        """Whether the stop was read after another step had been taken."""
        self._pending: Callable[[], tuple[bool, torch.Tensor]] | None = None
        self._first = True
        self._on_gpu = device.type == "cuda"

    def stops(self, unfinished: torch.Tensor, tokens: torch.Tensor) -> bool:
        before, self._pending = self._pending, self._read(unfinished, tokens)
        if self._first:
            self._first, before, self._pending = False, self._pending, None
            return self._take(before)
        if before is not None and self._take(before):
            self.late = True
            return True
        return False

    def flush(self) -> None:
        """Reads what is still to be read."""
        if self._pending is not None:
            self._take(self._pending)

    def _take(self, pending: Callable[[], tuple[bool, torch.Tensor]]) -> bool:
        stop, tokens = pending()
        if self.streamer is not None:
            self.streamer.put(tokens)
        return stop

    def _read(self, unfinished: torch.Tensor, tokens: torch.Tensor) -> Callable[[], tuple[bool, torch.Tensor]]:
        flag = unfinished.max() == 0
        if not self._on_gpu:
            return lambda: (bool(flag), tokens.cpu())
        # torch's allocator of pinned memory reuses a buffer only after the copies that used it
        host_flag = torch.empty_like(flag, device="cpu", pin_memory=True).copy_(flag, non_blocking=True)
        host_tokens = torch.empty_like(tokens, device="cpu", pin_memory=True).copy_(tokens, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(flag.device))

        def wait() -> tuple[bool, torch.Tensor]:
            copied.synchronize()
            return bool(host_flag), host_tokens

        return wait


def _rng_offset(device: torch.device) -> Any:
    """Where the default generator of a device stands."""
    return _generator(device).get_offset() if device.type == "cuda" else torch.get_rng_state()


def _rewind_rng(device: torch.device, offset: Any) -> None:
    if device.type == "cuda":
        _generator(device).set_offset(offset)
    else:
        torch.set_rng_state(offset)


def _generator(device: torch.device) -> torch.Generator:
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]
