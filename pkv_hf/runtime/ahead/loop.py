"""The run-ahead loop: greedy decoding and sampling that queue a step before the tokens of the last one are read.

It takes the place of transformers' `_sample` through `generate(custom_generate=...)`, with the same processors,
criteria, selection and results. The next token, the flags of finished rows and the stop decision stay on the device.
The host reads them once the next step's forward is queued, and takes that back where it ran too far: processors,
generators of random numbers and all else that a caller may see are asked as often as transformers asks them.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.generation import GenerateDecoderOnlyOutput, GenerationConfig, GenerationMixin, GenerationMode

from pkv_hf import compat
from pkv_hf.cache.paged import PagedCache
from pkv_hf.replaced import STATE, original
from pkv_hf.runtime.ahead.asking import updated
from pkv_hf.runtime.ahead.forward import Forward
from pkv_hf.runtime.ahead.greedy import greedy_of
from pkv_hf.runtime.choice import decide
from pkv_hf.runtime.prefix_cache.prompts import with_answers
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
    """Takes the place of a patched model's `generate`: transformers' own, with the run-ahead loop where that serves.

    What it answers goes to the prefix cache, where there is one.
    """
    state: PatchState = getattr(self, STATE)
    call = inspect.signature(type(self).generate).bind_partial(self, *args, **kwargs).arguments
    run = with_answers(state, original(self, "generate"), own_loop=call.get("custom_generate") is not None)
    if state.settings["run_ahead"] and _runs_ahead(self, call):
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
    forward = Forward(model, state, model_kwargs, greedy_of(logits_processor, stopping_criteria, generation_config))
    reader = _Reader(streamer)
    sequences = _Sequences(input_ids, logits_processor, stopping_criteria, generation_config, reader)
    with model._optimize_model_for_decode():
        _decode(logits, forward, sequences, reader)
    if streamer is not None:
        streamer.end()
    return sequences.result(forward.cache)


def _decode(output: torch.Tensor, forward: Forward, sequences: _Sequences, reader: _Reader) -> None:
    """Extends sequences until all have ended, from the logits of their prompts' last tokens on."""
    reads_first = True  # the first token is not to wait for the launches of a step
    while True:
        if forward.selects:
            sequences.take(output)
        else:
            sequences.extend(output)
        del output
        reader.copy(sequences.newest)
        # what is not static runs the caller's code
        ahead = not reads_first and forward.static is not None
        if (sequences.full or not ahead) and (reader.stops() or sequences.full):
            break
        output = forward(sequences)
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

    def __init__(self, ids: torch.Tensor, processors: Any, criteria: Any, config: Any, reader: _Reader) -> None:
        self._ids = ids
        self._taken = 0  # tokens of a row that only the reader has
        self.newest = torch.ones((2, len(ids)), dtype=torch.long, device=ids.device)
        """Every row's newest token, and 1 for every row that goes on: int64 `[2, rows]`."""
        self._reader = reader
        self._processors, self._criteria, self._config = processors, criteria, config
        self._ends_rows = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        returns = config.return_dict_in_generate
        self._scores: tuple[torch.Tensor, ...] | None = () if returns and config.output_scores else None
        self._logits: tuple[torch.Tensor, ...] | None = () if returns and config.output_logits else None

    @property
    def length(self) -> int:
        """Tokens of a row, the prompt included."""
        return self._ids.shape[1] + self._taken

    @property
    def ids(self) -> torch.Tensor:
        """int64 `[rows, tokens]`, the prompt included."""
        if self._taken:
            tokens = self._reader.read(self._taken).to(self._ids.device, non_blocking=True)
            self._ids = torch.cat([self._ids, tokens], dim=-1)
            self._taken = 0
        return self._ids

    @property
    def full(self) -> bool:
        longest = self._criteria.max_length
        return longest is not None and self.length >= longest

    def take(self, newest: torch.Tensor) -> None:
        """Goes on by every row's next token, as `Selection` gives them; the reader has to copy them."""
        self.newest = newest
        self._taken += 1

    def extend(self, logits: torch.Tensor) -> None:
        """Takes every row's next token by the logits `[rows, any, vocabulary]` of its last."""
        raw = logits[:, -1].to(copy=True, dtype=torch.float32, device=self.ids.device)
        scores = self._processors(self.ids, raw)
        if self._scores is not None:
            self._scores += (scores,)
        if self._logits is not None:
            self._logits += (raw,)
        tokens, unfinished = self._chosen(scores), self.newest[1]
        if self._ends_rows:
            tokens = tokens * unfinished + self._config._pad_token_tensor * (1 - unfinished)
        self._ids = torch.cat([self._ids, tokens[:, None]], dim=-1)
        self.newest = torch.stack([tokens, unfinished & ~self._criteria(self._ids, self._scores)])

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
    """Reads a step's tokens and stop decision: they are copied at once, and waited for when they are asked for."""

    AT_ONCE = 64
    """Steps that a piece of pinned memory holds."""

    def __init__(self, streamer: Any) -> None:
        self.streamer = streamer
        self._pieces: list[torch.Tensor] = []
        self._copied: torch.cuda.Event | None = None
        self._steps = 0

    def copy(self, newest: torch.Tensor) -> None:
        """Begins to copy every row's newest token, and 1 for every row that goes on, int64 `[2, rows]`."""
        at = self._steps % self.AT_ONCE
        if not at:
            shape, pinned = (self.AT_ONCE, *newest.shape), newest.is_cuda
            self._pieces.append(torch.empty(shape, dtype=torch.long, device="cpu", pin_memory=pinned))
        self._pieces[-1][at].copy_(newest, non_blocking=newest.is_cuda)
        self._steps += 1
        if newest.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(newest.device))

    def stops(self) -> bool:
        """Whether all rows are done; hands their tokens to the streamer."""
        self._wait()
        tokens, goes_on = self._pieces[-1][(self._steps - 1) % self.AT_ONCE]
        if self.streamer is not None:
            self.streamer.put(tokens)
        return not goes_on.any()

    def read(self, steps: int) -> torch.Tensor:
        """The tokens of the last steps, int64 `[rows, steps]`."""
        self._wait()
        return torch.cat(self._pieces)[: self._steps][-steps:, 0].T

    def _wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()
