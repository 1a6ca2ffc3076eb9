"""What a model is asked: every mode of generate(), with text alone and with images or sound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from families.media import KINDS, Tensors, rows_with_media
from pkv_hf.bench.model_types.building import prompts
from pkv_hf.bench.model_types.modes import MODES, generate
from pkv_hf.compat import CACHE

Ask = Callable[[PreTrainedModel, str], ModelOutput]
"""By a model and the name of its family."""


def answer_to(model: PreTrainedModel, inputs: dict[str, Any], **settings: Any) -> ModelOutput:
    """What a model keeps of the call before is forgotten first: its offsets of 3-D positions."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None
    inputs = {name: each.to(model.device) if isinstance(each, torch.Tensor) else each for name, each in inputs.items()}
    return generate(model, inputs, **settings)


def text(lengths: tuple[int, ...] = (14, 9), **settings: Any) -> Ask:
    return lambda model, family: answer_to(model, prompts(*lengths), **settings)


def turns(first: Tensors, second: Tensors, model: PreTrainedModel) -> ModelOutput:
    """A second turn on the first one's cache. It begins with tokens that have no K and V yet."""
    before = answer_to(model, first, new_tokens=AFTER_MEDIA)
    rows, answered = before.sequences.shape[0], before.sequences.shape[1] - first["input_ids"].shape[1]
    mask = torch.ones(rows, answered, dtype=torch.long)
    joined = {
        **second,
        "input_ids": torch.cat([before.sequences, second["input_ids"]], dim=1),
        "attention_mask": torch.cat([first["attention_mask"], mask, second["attention_mask"]], dim=1),
    }
    for types in first.keys() & {"token_type_ids", "mm_token_type_ids"}:
        joined[types] = torch.cat([first[types], torch.zeros_like(mask), second[types]], dim=1)
    return answer_to(model, {**joined, CACHE: before[CACHE]}, new_tokens=AFTER_MEDIA)


TEXT_MODES: dict[str, Ask] = {
    "greedy": text(),
    **{name: lambda model, family, mode=mode: mode(model) for name, mode in MODES.items()},
}
OWN_PATH = ("static cache", "forward")
"""Modes that are transformers' own path, to the letter."""
REPEATING = ("beams", "sampling")
"""Modes of several rows a prompt."""

AFTER_MEDIA = 4
"""New tokens: what images change is the prompt."""

Rows = tuple[tuple[int, int, int], ...]
BOTH: Rows = ((6, 1, 8), (2, 1, 5))
MIXED: Rows = ((4, 1, 5), (7, 0, 3))
WITHOUT: Rows = ((9, 0, 3), (6, 0, 0))
LATER: Rows = ((2, 1, 2), (2, 1, 2))
"""Tokens before, images and tokens after."""


def media(model: PreTrainedModel, family: str, rows: Rows, seed: int = 1) -> Tensors:
    return rows_with_media(KINDS[family], model.config, rows, seed)


def seen(rows: Rows = BOTH, **settings: Any) -> Ask:
    settings = {"new_tokens": AFTER_MEDIA, **settings}
    return lambda model, family: answer_to(model, media(model, family, rows), **settings)


def seen_turns(first: Rows, second: Rows) -> Ask:
    return lambda model, family: turns(media(model, family, first), media(model, family, second, seed=2), model)


MEDIA_MODES: dict[str, Ask] = {
    "greedy": seen(),
    "greedy, one row without": seen(MIXED),
    "beams": seen(num_beams=3),
    "beams, one row without": seen(MIXED, num_beams=3),
    "sampling": seen(do_sample=True, num_return_sequences=2),
    "chunked prefill": seen(prefill_chunk_size=9),
    "two turns, first with": seen_turns(BOTH, ((3, 0, 0), (3, 0, 0))),
    "two turns, second with": seen_turns(WITHOUT, LATER),
    "forward": lambda model, family: model(**media(model, family, BOTH), use_cache=False),
}
