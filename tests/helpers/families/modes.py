"""What a model is asked: every mode of generate(), with text alone and with images or sound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from families.media import KINDS, Tensors, rows_with_media
from pkv_hf.bench.model_types.building import prompts
from pkv_hf.compat import CACHE

NEW_TOKENS = 5
UNEVEN = (14, 9)
"""Tokens of prompts: more than the windows and chunks of the tiny models."""

Ask = Callable[[PreTrainedModel, str], ModelOutput]
"""By a model and the name of its family."""


def generate(model: PreTrainedModel, inputs: dict[str, Any], **settings: Any) -> ModelOutput:
    """Seeded. What a model keeps of the call before is forgotten first: its offsets of 3-D positions."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None
    torch.manual_seed(1)
    inputs = {name: each.to(model.device) if isinstance(each, torch.Tensor) else each for name, each in inputs.items()}
    plain = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    return model.generate(**inputs, **{**plain, "return_dict_in_generate": True, "output_logits": True, **settings})


def text(lengths: tuple[int, ...] = UNEVEN, **settings: Any) -> Ask:
    return lambda model, family: generate(model, prompts(*lengths), **settings)


def embedded(model: PreTrainedModel, family: str) -> ModelOutput:
    inputs = prompts(*UNEVEN)
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    return generate(model, {"inputs_embeds": embeddings, **inputs})


def looked_up(model: PreTrainedModel, family: str) -> ModelOutput:
    ids = prompts(5)["input_ids"].repeat(1, 3)  # what comes again is drafted, and mostly refused
    return generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, prompt_lookup_num_tokens=3)


def forward(model: PreTrainedModel, family: str) -> ModelOutput:
    return model(**prompts(*UNEVEN), use_cache=False)


def turns(first: Tensors, second: Tensors, model: PreTrainedModel) -> ModelOutput:
    """A second turn on the first one's cache. It begins with tokens that have no K and V yet."""
    before = generate(model, first)
    rows, answered = before.sequences.shape[0], before.sequences.shape[1] - first["input_ids"].shape[1]
    mask = torch.ones(rows, answered, dtype=torch.long)
    joined = {
        **second,
        "input_ids": torch.cat([before.sequences, second["input_ids"]], dim=1),
        "attention_mask": torch.cat([first["attention_mask"], mask, second["attention_mask"]], dim=1),
    }
    for types in first.keys() & {"token_type_ids", "mm_token_type_ids"}:
        joined[types] = torch.cat([first[types], torch.zeros_like(mask), second[types]], dim=1)
    return generate(model, {**joined, CACHE: before[CACHE]})


def text_turns(model: PreTrainedModel, family: str) -> ModelOutput:
    later = {"input_ids": torch.tensor([[7, 9, 11]] * 2), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    return turns(prompts(*UNEVEN), later, model)


TEXT_MODES: dict[str, Ask] = {
    "greedy": text(),
    "beams": text(num_beams=3),
    "chunked prefill": text(prefill_chunk_size=6),
    "two turns": text_turns,
    "two samples": text(do_sample=True, num_return_sequences=2),
    "prompt lookup": looked_up,
    "inputs_embeds": embedded,
    "static cache": text(cache_implementation="static"),
    "forward": forward,
}
OWN_PATH = ("static cache", "forward")
"""Modes that are transformers' own path, to the letter."""

Rows = tuple[tuple[int, int, int], ...]
BOTH: Rows = ((6, 1, 8), (2, 1, 5))
MIXED: Rows = ((4, 1, 5), (7, 0, 3))
WITHOUT: Rows = ((9, 0, 3), (6, 0, 0))
LATER: Rows = ((2, 1, 2), (2, 1, 2))
"""Tokens before, images and tokens after."""


def media(model: PreTrainedModel, family: str, rows: Rows, seed: int = 1) -> Tensors:
    return rows_with_media(KINDS[family], model.config, rows, seed)


def seen(rows: Rows = BOTH, **settings: Any) -> Ask:
    return lambda model, family: generate(model, media(model, family, rows), **settings)


def seen_turns(first: Rows, second: Rows) -> Ask:
    return lambda model, family: turns(media(model, family, first), media(model, family, second, seed=2), model)


MEDIA_MODES: dict[str, Ask] = {
    "greedy": seen(),
    "greedy, one row without": seen(MIXED),
    "beams": seen(num_beams=3),
    "beams, one row without": seen(MIXED, num_beams=3),
    "two samples": seen(do_sample=True, num_return_sequences=2),
    "chunked prefill": seen(prefill_chunk_size=9),
    "two turns, first with": seen_turns(BOTH, ((3, 0, 0), (3, 0, 0))),
    "two turns, second with": seen_turns(WITHOUT, LATER),
    "forward": lambda model, family: model(**media(model, family, BOTH), use_cache=False),
}
