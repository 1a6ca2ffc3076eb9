"""Log-probabilities that a model gives to the tokens of a window: by one forward, in chunks, or by generate().

Logits are never held for more than a block of positions.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPast

from pkv_hf import compat
from pkv_hf.bench.measure import PeakMemory, run_generate
from pkv_hf.compat import unwrap

MODES = ("chunk", "decode")
"""How a window is scored on pages: in chunks, or by generate()."""

BOUNDS = {"int8": 0.5, "fp8": 0.5, "bfloat16": 0.05, "float16": 0.05, "float32": 0.01}
"""Percent that perplexity on pages may differ by, of pages that hold this. float32 is compared to 1e-4."""

BLOCK_ELEMENTS = 1 << 25
"""Logits of a block in float32, at most: 128 MiB."""

Scores = dict[str, Any]
"""What a window gave, of JSON types: `log_probs` (natural logarithms, one a scored token), `seconds`, `peak_bytes`, and
from `by_generate` also `first_token_s` and `step_s`."""


@torch.no_grad()
def by_forward(model: Any, ids: torch.Tensor, first: int = 1) -> Scores:
    """Scores tokens `first` and on of a window by one forward without a cache, as training sees them.

    `ids` is int64 `[tokens]`.
    """
    model, ids = unwrap(model), ids.to(model.device)
    with PeakMemory(ids.device) as peak:
        started = time.perf_counter()
        hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[:, first - 1 : -1]
        parts = []
        rows = _block(model)
        for begin in range(0, hidden.shape[1], rows):
            block = hidden[:, begin : begin + rows]
            with _decoder_gives(model, block):
                logits = model(input_ids=ids[None, : block.shape[1]], use_cache=False).logits[0]
            parts.append(log_probs(logits, ids[first + begin : first + begin + block.shape[1]]))
        found = torch.cat(parts).tolist()
        seconds = time.perf_counter() - started
    return {"log_probs": found, "seconds": seconds, "peak_bytes": peak.nbytes}


@torch.no_grad()
def by_chunks(model: Any, ids: torch.Tensor, chunk: int, cache: Any = None) -> Scores:
    """Scores a window's tokens but the first by forwards of `chunk` tokens, each over the cache of those before.

    `ids` is int64 `[tokens]`. `cache` is empty; None takes transformers' own.
    """
    ids = ids.to(model.device)
    rows = _block(unwrap(model))
    with PeakMemory(ids.device) as peak:
        started = time.perf_counter()
        parts = []
        for begin in range(0, len(ids) - 1, chunk):
            block = ids[begin : min(begin + chunk, len(ids) - 1)]
            output = model(input_ids=block[None], use_cache=True, **{compat.CACHE: cache})
            cache = output[compat.CACHE]
            targets = ids[begin + 1 : begin + 1 + len(block)]
            parts += [log_probs(*pair) for pair in zip(output.logits[0].split(rows), targets.split(rows))]
            del output
        found = torch.cat(parts).tolist()
        seconds = time.perf_counter() - started
    return {"log_probs": found, "seconds": seconds, "peak_bytes": peak.nbytes}


def by_generate(model: Any, ids: torch.Tensor, new_tokens: int) -> Scores:
    """Scores the last `new_tokens` tokens (at least 2) of a window by generate() after a prompt of those before.

    The window's tokens are forced on it one by one. `ids` is int64 `[tokens]`. The model's own generation settings
    (penalties, end tokens) are put aside.
    """
    inner: Any = unwrap(model)
    settings, inner.generation_config = inner.generation_config, GenerationConfig()
    forced = _Forced(ids.to(inner.device))
    try:
        inputs = {"input_ids": forced.ids[None, :-new_tokens]}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        run = run_generate(model, inputs, new_tokens, logits_processor=[forced])
    finally:
        inner.generation_config = settings
    return {
        "log_probs": torch.stack(forced.log_probs).tolist(),
        "seconds": run.first_token_s + sum(run.step_s),
        "peak_bytes": run.peak_bytes,
        "first_token_s": run.first_token_s,
        "step_s": list(run.step_s),
    }


def log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-softmax of logits `[n, vocab]` at targets `[n]`, float32 `[n]`."""
    logits = logits.float()
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=1)


class _Forced(LogitsProcessor):
    """Lets generate() choose a window's next token only, and notes the log-probability that it had."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids
        self.log_probs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        target = self.ids[input_ids.shape[1]][None]
        self.log_probs.append(log_probs(scores, target)[0])
        only = torch.full_like(scores, -torch.inf).scatter_(1, target[None], 0.0)
        return only  # type: ignore[return-value]


def _block(model: Any) -> int:
    return max(1, BLOCK_ELEMENTS // model.get_output_embeddings().weight.shape[0])


@contextlib.contextmanager
def _decoder_gives(model: Any, hidden: torch.Tensor) -> Iterator[None]:
    """Makes a causal LM's forward compute logits (scaled and capped as it does) of these hidden states `[1, n, H]`."""
    decoder = model.base_model
    before = decoder.__dict__.get("forward")
    decoder.forward = lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=hidden)  # type: ignore[arg-type]
    try:
        yield
    finally:
        del decoder.forward
        if before is not None:
            decoder.forward = before
