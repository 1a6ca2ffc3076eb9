"""Requests with real prompts, from texts or from a trace, and what generating them took."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pkv_hf.bench.inputs.texts import begin_ids
from pkv_hf.bench.inputs.traces import Request
from pkv_hf.bench.measure import Run


@dataclass(frozen=True)
class Prompt:
    ids: torch.Tensor
    """int64 `[tokens]`."""
    new_tokens: int


def from_texts(tokenizer: Any, texts: Iterable[str], count: int, new_tokens: int, longest: int) -> list[Prompt]:
    """The first `count` texts as prompts, cut so that prompt and new tokens are `longest` at most; not blank ones."""
    begin = begin_ids(tokenizer)
    prompts = []
    for text in itertools.islice((text for text in texts if text.strip()), count):
        ids = begin + tokenizer(text, add_special_tokens=False).input_ids
        prompts.append(Prompt(torch.tensor(ids[: longest - new_tokens], dtype=torch.long), new_tokens))
    return prompts


def from_trace(requests: Sequence[Request], source: torch.Tensor, longest: int) -> list[Prompt]:
    """Requests of a trace, in order, on token ids of a source text that goes round.

    Requests of more than `longest` tokens are left out.
    """
    prompts, taken = [], 0
    for request in requests:
        if request.prompt + request.decode <= longest:
            places = torch.arange(taken, taken + request.prompt) % len(source)
            prompts.append(Prompt(source[places], request.decode))
            taken += request.prompt
    return prompts


def batches(prompts: Sequence[Prompt], max_active: int) -> list[list[Prompt]]:
    """Prompts in their order, `max_active` at a time."""
    return [list(prompts[begin : begin + max_active]) for begin in range(0, len(prompts), max_active)]


def padded(batch: Sequence[Prompt], pad: int, device: Any) -> dict[str, torch.Tensor]:
    """A batch as inputs of generate(), padded on the left: `input_ids` and `attention_mask`, int64 `[B, longest]`."""
    longest = max(len(prompt.ids) for prompt in batch)
    input_ids = torch.full((len(batch), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(batch):
        input_ids[row, longest - len(prompt.ids) :] = prompt.ids
        mask[row, longest - len(prompt.ids) :] = 1
    return {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}


def latencies(run: Run, batch: Sequence[Prompt]) -> list[float]:
    """Seconds from the start of a batch to the last token of each of its requests."""
    ends = list(itertools.accumulate(run.step_s, initial=run.first_token_s))
    return [ends[prompt.new_tokens - 1] for prompt in batch]


def answers(run: Run, batch: Sequence[Prompt]) -> list[list[int]]:
    """The tokens that each request of a batch asked for."""
    longest = max(len(prompt.ids) for prompt in batch)
    return [row[longest : longest + prompt.new_tokens].tolist() for row, prompt in zip(run.sequences, batch)]
