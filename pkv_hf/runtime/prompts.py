"""The prompts of generate(), each through the model once: beams and several sequences a prompt share its pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pkv_hf import compat
from pkv_hf.cache.paged import PagedCache
from pkv_hf.runtime.evidence import shares_prompts


def prefill(
    self: Any, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], **settings: Any
) -> Any:
    """transformers' `_prefill`, on the instance: of rows that generate() has repeated, one each goes through the model.

    What comes back is repeated then, and so are the cache's table rows. A cache that was passed in may hold one row
    for every prompt, or one for every copy, as transformers' own caches have to.
    """
    original = type(self)._prefill
    copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    cache = model_kwargs.get(compat.CACHE)
    if copies == 1 or not isinstance(cache, PagedCache) or cache.rows not in (0, len(input_ids) // copies):
        return original(self, input_ids, generation_config, model_kwargs, **settings)
    prompts = _prompts({"input_ids": input_ids, **model_kwargs}, copies) if shares_prompts(self) else None
    if prompts is None:
        return original(self, input_ids, generation_config, model_kwargs, **settings)
    embeds = prompts.get("inputs_embeds")
    cache.expect_copies(copies, (prompts["input_ids"] if embeds is None else embeds).shape[1])
    try:
        outputs = original(self, prompts.pop("input_ids"), generation_config, prompts, **settings)
    finally:
        cache.expect_copies(1)
    cache.batch_repeat_interleave(copies)
    for name, value in outputs.items():
        outputs[name] = _repeated(value, copies)
    return outputs


def _prompts(inputs: dict[str, Any], copies: int) -> dict[str, Any] | None:
    """The first of every `copies` rows of all tensors; None where the others differ from it.

    None also where tensors lie in something else, as encoded images do: which of them is a row's, nobody says.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    if any(_holds_tensors(value) for name, value in inputs.items() if name not in tensors):
        return None
    rows = len(inputs["input_ids"])
    if any(not value.ndim or len(value) != rows for value in tensors.values()):
        return None
    grouped = {name: value.unflatten(0, (-1, copies)) for name, value in tensors.items()}
    if not all(bool((value == value[:, :1]).all()) for value in grouped.values()):
        return None
    return {**inputs, **{name: value[:, 0] for name, value in grouped.items()}}


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, torch.Tensor) or (isinstance(value, (list, tuple)) and any(map(_holds_tensors, value)))


def _repeated(value: Any, copies: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value.repeat_interleave(copies, dim=0)
    return tuple(_repeated(item, copies) for item in value) if isinstance(value, tuple) else value
