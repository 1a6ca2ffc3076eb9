"""Perplexity on pages beside transformers' own, on the same windows of text: an `evaluate.Metric`."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from pkv_hf.bench import compare
from pkv_hf.bench.compare import check_patchable
from pkv_hf.bench.inputs.models import check_positions
from pkv_hf.bench.inputs.texts import begin_ids, token_ids
from pkv_hf.bench.perplexity import MODES, Scores, by_chunks, by_forward, by_generate
from pkv_hf.bench.results.resume import Store, digest
from pkv_hf.cache.paged import PagedCache
from pkv_hf.compat import unwrap
from pkv_hf.errors import UsageError
from pkv_hf.replaced import STATE
from pkv_hf.routes.base import MAX_DECODE_QUERIES

BUCKETS = 16
"""Spans of positions, of equal length, that perplexity is given for."""

INPUTS = """
Args:
    texts: strings, joined by blank lines; or lists of token ids without special tokens, joined.
    model: a causal LM that `pkv_hf.patch` serves; one that is patched keeps its settings.
    tokenizer: the model's.
    context: tokens of a window.
    mode: "chunk", forwards of `chunk` tokens over a paged past; or "decode", generate() forced along the last
        `decode_tokens` tokens of the window.
    max_windows: windows to score; None for all that the texts fill.
    processes: an `accelerate.PartialState`, to split the windows over the processes of `accelerate launch`.
    store: a `pkv_hf.bench.results.resume.Store` that keeps the scores of finished windows.
    progress: whether to show a bar on stderr.

Returns a dict. The plain names are of the patched model, `_unpatched` of transformers in the same mode, `_forward` of
one forward a window without a cache:

- `perplexity`, `tokens_per_s`, `peak_bytes`; in decode mode also `first_token_s`. tokens_per_s is of the median step in
  decode mode, else of the tokens that were read, those of one process.
- `difference_percent` of the perplexity to the forward's, its standard error `difference_error_percent` (of so many
  tokens whose log-probabilities differ by rounding), and `largest_log_prob_difference`; `_unpatched`: what transformers
  differs from itself.
- `perplexity_by_position`, `_forward` too, of the spans that end at `positions`.
- `windows`, `tokens` that were scored, `route`: how the pages were read, and `left`: what was not served and why.

Raises ValueError for a text shorter than a window, a context that the model has no positions for, and settings out of
their range; UnsupportedModelError (a ValueError) for a model that cannot be patched.
"""


class PagedPerplexity(evaluate.Metric):
    """`PagedPerplexity().compute(model=..., tokenizer=..., texts=[...], context=4096)`."""

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=INPUTS,
            features=[
                datasets.Features({"texts": datasets.Value("string")}),
                datasets.Features({"texts": datasets.Sequence(datasets.Value("int64"))}),
            ],
        )

    def _compute(
        self,
        texts: Sequence[str] | Sequence[Sequence[int]],
        model: Any,
        tokenizer: Any,
        context: int,
        mode: str = "chunk",
        chunk: int = 512,
        decode_tokens: int = 64,
        max_windows: int | None = None,
        processes: PartialState | None = None,
        store: Store | None = None,
        progress: bool = False,
    ) -> dict[str, Any]:
        check(mode, context, chunk, decode_tokens, max_windows)
        check_positions(model, context, f"context {context}")
        if model.training:
            raise UsageError("the model is in training mode: call model.eval() first")
        check_patchable(model)
        cut = windows(tokenizer, texts, context, max_windows)
        mine = cut if processes is None else cut[processes.process_index :: processes.num_processes]
        on_gpu = model.device.type == "cuda"  # whose allocator is slow until it has blocks of all sizes of a window
        warm_ups = engines(mode, chunk, decode_tokens if on_gpu else 2)
        first = cut[0] if on_gpu else cut[0][: 2 * chunk if mode == "chunk" else 64]
        turns: dict[str, compare.Engine] = {}
        for engine, (on_pages, score) in engines(mode, chunk, decode_tokens).items():
            name = f"{engine}-{_kv_dtype(model)}" if on_pages else engine
            names = [f"{name}-{mode}-{context}-{digest(ids.numpy().tobytes())}" for ids in mine]
            parts = [(name, functools.partial(score, model, ids)) for name, ids in zip(names, mine)]
            turns[engine] = compare.Engine(on_pages, parts, functools.partial(warm_ups[engine][1], model, first))
        found: dict[str, list[Scores]] = compare.run(model, turns, store, f"{mode}, {context:,} tokens", progress)
        if processes is not None:
            found = {engine: gather_object(scores) for engine, scores in found.items()}
        result = {"mode": mode, "context": context, **summary(found, context)}
        if mode == "chunk" and chunk > MAX_DECODE_QUERIES:
            result["route"] = "sdpa"  # torch reads longer blocks from the pages, whatever the route of decode steps
        return result


Score = Callable[[Any, torch.Tensor], Scores]


def engines(mode: str, chunk: int, decode_tokens: int) -> dict[str, tuple[bool, Score]]:
    """The ways to score a window in a mode: whether on pages, and how it is scored."""
    if mode == "chunk":
        return {
            "forward": (False, by_forward),
            "unpatched": (False, lambda model, ids: by_chunks(model, ids, chunk)),
            "patched": (True, lambda model, ids: by_chunks(model, ids, chunk, _paged_cache(model, len(ids)))),
        }
    return {
        "forward": (False, lambda model, ids: by_forward(model, ids, first=len(ids) - decode_tokens)),
        "unpatched": (False, lambda model, ids: by_generate(model, ids, decode_tokens)),
        "patched": (True, lambda model, ids: by_generate(model, ids, decode_tokens)),
    }


def windows(
    tokenizer: Any, texts: Sequence[str] | Sequence[Sequence[int]], context: int, max_windows: int | None
) -> list[torch.Tensor]:
    """The text cut into windows of `context` tokens, int64 each; what is left at the end is not used.

    Where the tokenizer begins a text with a special token, every window begins with it.
    """
    begin = begin_ids(tokenizer)
    size = context - len(begin)
    if isinstance(texts[0], str):
        ids = token_ids(tokenizer, texts, None if max_windows is None else max_windows * size)  # type: ignore[arg-type]
    else:
        ids = torch.cat([torch.as_tensor(text, dtype=torch.long) for text in texts])
    if len(ids) < size:
        raise UsageError(
            f"the text has {len(ids)} tokens, a context of {context} asks for {size}: pass a shorter one or more text"
        )
    whole = list(ids[: len(ids) // size * size].split(size))[:max_windows]
    return [torch.cat([torch.tensor(begin, dtype=torch.long), window]) for window in whole]


def summary(found: dict[str, list[Scores]], context: int) -> dict[str, Any]:
    """The metric's figures, from the scores of the same windows by every engine."""
    log_probs = {engine: np.array([scores["log_probs"] for scores in found[engine]]) for engine in found}
    result: dict[str, Any] = {"windows": len(found["forward"]), "tokens": log_probs["forward"].size}
    for engine, of_windows in found.items():
        suffix = "" if engine == "patched" else f"_{engine}"
        steps = [step for scores in of_windows for step in scores.get("step_s", ())]
        seconds = sum(scores["seconds"] for scores in of_windows)
        result[f"perplexity{suffix}"] = perplexity(log_probs[engine])
        result[f"tokens_per_s{suffix}"] = 1 / statistics.median(steps) if steps else context * len(of_windows) / seconds
        result[f"peak_bytes{suffix}"] = max(scores["peak_bytes"] for scores in of_windows)
        if steps:
            result[f"first_token_s{suffix}"] = statistics.median(scores["first_token_s"] for scores in of_windows)
        if engine != "forward":
            difference = 100 * (result[f"perplexity{suffix}"] / perplexity(log_probs["forward"]) - 1)
            result[f"difference_percent{suffix}"] = difference
            differences = log_probs[engine] - log_probs["forward"]
            error = 100 * float(differences.std()) / differences.size**0.5
            result[f"difference_error_percent{suffix}"] = error
            result[f"largest_log_prob_difference{suffix}"] = float(np.abs(differences).max())
    scored = log_probs["forward"].shape[1]
    spans = np.array_split(np.arange(scored), min(BUCKETS, scored))
    result["positions"] = [context - scored + int(span[-1]) + 1 for span in spans]
    for engine in ("patched", "forward"):
        suffix = "" if engine == "patched" else f"_{engine}"
        by_position = [perplexity(log_probs[engine][:, span]) for span in spans]
        result[f"perplexity_by_position{suffix}"] = by_position
    return {**result, **compare.served(found["patched"])}


def perplexity(log_probs: np.ndarray) -> float:
    """exp of the mean negative log-probability."""
    return float(np.exp(-log_probs.mean()))


def _kv_dtype(model: Any) -> Any:
    """What the pages of a patched model hold, None for its own dtype, as those of one that is not patched yet."""
    return getattr(getattr(unwrap(model), STATE, None), "kv_dtype", None)


def _paged_cache(model: Any, length: int) -> PagedCache:
    state = getattr(unwrap(model), STATE)
    return PagedCache(model.config, state.page_size, length, state.kv_dtype)


def check(mode: str, context: int, chunk: int, decode_tokens: int, max_windows: int | None) -> None:
    """Raises UsageError for settings out of their range."""
    if mode not in MODES:
        raise UsageError(f"mode {mode!r} is not one of {MODES}")
    for name, value, least in (
        ("context", context, 3),
        ("chunk", chunk, 1),
        ("decode tokens", decode_tokens, 2),
        ("max windows", 1 if max_windows is None else max_windows, 1),
    ):
        if value < least:
            raise UsageError(f"{name} {value} is too small: pass at least {least}")
    if mode == "decode" and decode_tokens >= context:
        raise UsageError(f"decode tokens {decode_tokens} leave no prompt in a context of {context}: pass fewer")
