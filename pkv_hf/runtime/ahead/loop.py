"""The run-ahead loop: greedy decoding and sampling that queue a step before the tokens of the last one are read.

It takes the place of transformers' `_sample` through `generate(custom_generate=...)`, with the same processors,
criteria, selection and results. The next token, the flags of finished rows and the stop decision stay on the device.
The host reads them once the next step's forward is queued, and takes that back where it ran too far: processors,
generators of random numbers and all else that a caller may see are asked as often as transformers asks them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.generation import GenerateDecoderOnlyOutput, GenerationConfig, GenerationMixin, GenerationMode

from pkv_hf import compat
from pkv_hf.cache.paged import PagedCache
from pkv_hf.replaced import STATE, original
from pkv_hf.runtime.ahead.forward import Forward, updated
from pkv_hf.runtime.choice import decide
from pkv_hf.runtime.state import PatchState

NEED_TRANSFORMERS_LOOP = frozenset({"assistant_model", "synced_gpus", "stopping_criteria", "custom_generate"})
"""Arguments of generate() that only transformers' own loop serves, where they are given."""

ARGUMENTS = NEED_TRANSFORMERS_LOOP | {
    "self", "inputs", "generation_config", "logits_processor", "prefix_allowed_tokens_fn", "streamer", "kwargs",
    "negative_prompt_ids", "negative_prompt_attention_mask",
}  # fmt: skip
"""Arguments of generate() that are known: the others here are seen to before its loop begins, or by this one."""

OPTIONS = frozenset({
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "do_sample", "is_assistant", "compile_config", "max_length",
})  # fmt: skip
"""Options that transformers' loop reads in the releases that this one was written after."""


def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of a patched model's `generate`: transformers' own, with the run-ahead loop where that serves."""
    run = original(self, "generate")
    call = inspect.signature(type(self).generate).bind_partial(self, *args, **kwargs).arguments
    if _runs_ahead(self, call):
        kwargs["custom_generate"] = run_ahead
    return run(*args, **kwargs)


def mode_arguments(self: Any, custom_generate: Any, kwargs: dict[str, Any], *args: Any) -> dict[str, Any]:
    """transformers' `_extract_generation_mode_kwargs`, which takes arguments away where a loop is not its own."""
    extract = original(self, "_extract_generation_mode_kwargs")
    return extract(None if custom_generate is run_ahead else custom_generate, kwargs, *args)


def _runs_ahead(model: Any, call: dict[str, Any]) -> bool:
    """Whether a call of generate() is greedy decoding or sampling that needs nothing of the host at each step."""
    if any(call.get(name) for name in NEED_TRANSFORMERS_LOOP):
        return False
    if any(value is not None for name, value in call.items() if name not in ARGUMENTS):
        return False
    if getattr(model, STATE).known.look().loop or compat.is_sharded(model):
        return False  # the processes of a sharded model take their steps together: transformers' loop waits for them
    config, _ = model._prepare_generation_config(call.get("generation_config"), **call.get("kwargs", {}))
    return (
        config.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and not config.stop_strings
        and not (config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states))
        and config.cache_implementation in (None, "dynamic")
        and not config.is_assistant
        and not any(getattr(config, name) for name in _options_read() - OPTIONS)
    )


@functools.cache
def _options_read() -> frozenset[str]:
    """The options of a GenerationConfig that the installed release's loop reads."""
    return frozenset(GenerationMixin._sample.__code__.co_names).intersection(vars(GenerationConfig()))


def run_ahead(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """transformers' `_sample`, for `custom_generate`: same arguments, same result."""
    state: PatchState = getattr(model, STATE)
    cache = model_kwargs.get(compat.CACHE)
    if not isinstance(cache, PagedCache) or not _accelerated(model, state, cache):
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer)
        return type(model)._sample(model, *arguments, **model_kwargs)
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    model_kwargs = updated(model, outputs, model_kwargs)
    logits = outputs.logits
    del outputs
    forward = Forward(model, state, model_kwargs)
    sequences = _Sequences(input_ids, logits_processor, stopping_criteria, generation_config)
    with model._optimize_model_for_decode():
        _decode(logits, forward, sequences, _Reader(input_ids.device, streamer))
    if streamer is not None:
        streamer.end()
    return sequences.result(forward.cache)


def _decode(logits: torch.Tensor, forward: Forward, sequences: _Sequences, reader: _Reader) -> None:
    """Extends sequences until all have ended, from the logits of their prompts' last tokens on."""
    reads_first = True  # the first token is not to wait for the launches of a step
    while True:
        sequences.extend(logits)
        del logits
        reader.copy(sequences.unfinished, sequences.last)
        # what is not static runs the caller's code
        ahead = not reads_first and forward.static is not None
        if (sequences.full or not ahead) and (reader.stops() or sequences.full):
            break
        logits = forward(sequences.ids, sequences.last)
        if ahead:
            stop = True
            try:
                stop = reader.stops()
            finally:
                if stop:  # or the streamer raised
                    forward.cache.take_back()
            if stop:
                break
        reads_first = False


class _Sequences:
    """The rows' tokens, and all that is kept of every step beside them. Nothing here waits for the device."""

    def __init__(self, ids: torch.Tensor, processors: Any, criteria: Any, config: Any) -> None:
        self.ids = ids
        """int64 `[rows, tokens]`, the prompt included."""
        self.last = ids.new_empty(len(ids))
        """Every row's newest token, int64 `[rows]`."""
        self.unfinished = torch.ones(len(ids), dtype=torch.long, device=ids.device)
        """1 for every row that goes on, int64 `[rows]`."""
        self._processors, self._criteria, self._config = processors, criteria, config
        self._ends_rows = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        returns = config.return_dict_in_generate
        self._scores: tuple[torch.Tensor, ...] | None = () if returns and config.output_scores else None
        self._logits: tuple[torch.Tensor, ...] | None = () if returns and config.output_logits else None

    @property
    def full(self) -> bool:
        longest = self._criteria.max_length
        return longest is not None and self.ids.shape[1] >= longest

    def extend(self, logits: torch.Tensor) -> None:
        """Takes every row's next token by the logits `[rows, any, vocabulary]` of its last."""
        raw = logits[:, -1].to(copy=True, dtype=torch.float32, device=self.ids.device)
        scores = self._processors(self.ids, raw)
        if self._scores is not None:
            self._scores += (scores,)
        if self._logits is not None:
            self._logits += (raw,)
        tokens = self._chosen(scores)
        if self._ends_rows:
            tokens = tokens * self.unfinished + self._config._pad_token_tensor * (1 - self.unfinished)
        self.last, self.ids = tokens, torch.cat([self.ids, tokens[:, None]], dim=-1)
        self.unfinished = self.unfinished & ~self._criteria(self.ids, self._scores)

    def _chosen(self, scores: torch.Tensor) -> torch.Tensor:
        if not self._config.do_sample:
            return torch.argmax(scores, dim=-1)
        return torch.multinomial(nn.functional.softmax(scores, dim=-1), num_samples=1).squeeze(1)

    def result(self, cache: Any) -> Any:
        """What generate() returns."""
        if not self._config.return_dict_in_generate:
            return self.ids
        kept: dict[str, Any] = {"scores": self._scores, "logits": self._logits, compat.CACHE: cache}
        return GenerateDecoderOnlyOutput(sequences=self.ids, **kept)  # type: ignore[arg-type]


def _accelerated(model: Any, state: PatchState, cache: PagedCache) -> bool:
    """Whether decode steps may go by Triton kernels, for which queueing ahead is worth it."""
    if model.device.type == "meta":
        return False  # accelerate brings the weights in for each forward
    decision = decide(state, cache, np.zeros(1), 1, model.device, model.dtype)
    return decision is None or decision.route.fuses_rope  # None before a first forward has shown what layers are


class _Reader:
    """Reads a step's stop decision and tokens: they are copied at once, and waited for when they are asked for."""

    def __init__(self, device: torch.device, streamer: Any) -> None:
        self.streamer = streamer
        self._on_gpu = device.type == "cuda"
        self._wait: Callable[[], tuple[bool, torch.Tensor]]

    def copy(self, unfinished: torch.Tensor, tokens: torch.Tensor) -> None:
        """Begins to copy which rows go on and their tokens, int64 `[rows]` both, from the device."""
        flag = unfinished.max() == 0
        if not self._on_gpu:
            self._wait = lambda: (bool(flag), tokens.cpu())
            return
        # torch's allocator of pinned memory reuses a buffer only after the copies that used it
        host_flag = torch.empty_like(flag, device="cpu", pin_memory=True).copy_(flag, non_blocking=True)
        host_tokens = torch.empty_like(tokens, device="cpu", pin_memory=True).copy_(tokens, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(flag.device))

        def wait() -> tuple[bool, torch.Tensor]:
            copied.synchronize()
            return bool(host_flag), host_tokens

        self._wait = wait

    def stops(self) -> bool:
        """Whether all rows are done; hands their tokens to the streamer."""
        stop, tokens = self._wait()
        if self.streamer is not None:
            self.streamer.put(tokens)
        return stop
