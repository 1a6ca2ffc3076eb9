"""Greedy selection as a part of a step on static buffers: for the next tokens the host launches nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.logits_process import MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from pkv_hf.kernels import reference
from pkv_hf.kernels.launch import DTYPES, has_dtypes
from pkv_hf.kernels.reference import EndOfSequence, NextStep
from pkv_hf.origins import of_a_library
from pkv_hf.routes.base import installed


@dataclass(frozen=True)
class Greedy:
    """What a call of generate() makes of logits, where that is the largest one's token until an end of sequence."""

    ends: torch.Tensor | None
    """Tokens that end a row, int64 `[any]`, and with them `pad`."""
    pad: torch.Tensor | None
    """What follows in a row that has ended, int64 `[]`."""
    held_off: torch.Tensor | None
    """Tokens that may not come, int64 `[any]`, while a row has fewer than `until`."""
    until: int = 0


def greedy_of(processors: Any, criteria: Any, config: Any) -> Greedy | None:
    """What a call selects by, None where it takes more: other processors or criteria, sampling, scores to be kept."""
    if config.do_sample or (config.return_dict_in_generate and (config.output_scores or config.output_logits)):
        return None
    ends = pad = held_off = None
    until = 0
    for criterion in criteria:
        if not of_a_library(type(criterion).__call__):
            return None
        if type(criterion) is EosTokenCriteria and ends is None:
            ends, pad = criterion.eos_token_id, config._pad_token_tensor
        elif type(criterion) is not MaxLengthCriteria or _may_warn(criterion):
            return None
    for processor in processors:
        if not of_a_library(type(processor).__call__):
            return None
        if type(processor) is MinNewTokensLengthLogitsProcessor:
            begin = processor.prompt_length_to_skip + processor.min_new_tokens
        elif type(processor) is MinLengthLogitsProcessor:
            begin = processor.min_length
        else:
            return None
        if held_off is not None and held_off is not processor.eos_token_id:
            return None
        held_off, until = processor.eos_token_id, max(until, begin)
    return Greedy(ends, pad, held_off, until)


def _may_warn(criterion: MaxLengthCriteria) -> bool:
    """Whether it warns of a length beyond the model's positions before it stops."""
    positions = criterion.max_position_embeddings
    return positions is not None and criterion.max_length > positions


class Selection:
    """The buffers of `Greedy`, which a graph may read and write: of one call after the other, alike in `sizes`."""

    def __init__(self, greedy: Greedy, rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
        self.kind = self.sizes(greedy)
        """What its kernel is compiled for, of all that may differ from one call of a model to the next."""
        with torch.inference_mode(False):  # what is made in that mode cannot be written outside of it
            self._newest = torch.ones((2, rows), dtype=torch.long, device=device)
            self._scratch = torch.zeros((2, rows), dtype=torch.long, device=device)
            pad = torch.zeros((), dtype=torch.long, device=device)
            ends = None if greedy.ends is None else torch.zeros_like(greedy.ends, device=device)
            self._end = None if ends is None else EndOfSequence(ends, pad)
            self._most = None if greedy.held_off is None else torch.empty(vocabulary, dtype=dtype, device=device)
        self._until = 0

    @staticmethod
    def sizes(greedy: Greedy | None) -> tuple[Any, ...]:
        """What tells buffers of one call from those of another."""
        return () if greedy is None else (None if greedy.ends is None else len(greedy.ends), greedy.held_off is None)

    def begin(self, greedy: Greedy, unfinished: torch.Tensor) -> None:
        """Takes a call's settings over, and which rows go on: int64 `[rows]`, 1 for those."""
        self._newest[1].copy_(unfinished)
        if self._end is not None and greedy.ends is not None and greedy.pad is not None:
            self._end.tokens.copy_(greedy.ends)
            self._end.pad.copy_(greedy.pad)
        if self._most is not None and greedy.held_off is not None:
            tokens = torch.arange(len(self._most), device=self._most.device)
            held_off = torch.isin(tokens, greedy.held_off.to(tokens.device))
            self._most.fill_(torch.inf).masked_fill_(held_off, -torch.inf)
            self._until = greedy.until

    def go_on(self, length: int) -> None:
        """Lets tokens come that were held off, where rows have so many."""
        if self._most is not None and length >= self._until > 0:
            self._most.fill_(torch.inf)
            self._until = 0

    def __call__(self, logits: torch.Tensor, step: NextStep) -> torch.Tensor:
        """The next tokens, and 1 for every row that goes on after them: int64 `[2, rows]`, of logits `[rows, 1, any]`.

        The next call overwrites it. `step` goes on to the next one. Float32 logits, of which transformers takes the
        largest, are these to the bit.
        """
        if _by_kernel(logits):
            from pkv_hf.kernels.select import select

            select(logits, self._newest, step, self._end, self._most, scratch=self._scratch)
        else:
            reference.select(logits, self._newest, step, self._end, self._most)
        return self._newest


def _by_kernel(logits: torch.Tensor) -> bool:
    """Whether our kernel takes the largest of logits; else torch does."""
    runs = logits.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return runs and installed("triton") and logits.dtype in DTYPES and has_dtypes(logits.device, logits.dtype)
