"""Passkey retrieval: a number hidden in a long text that says nothing, and a question for it at the end.

The task is that of Mohtashami and Jaggi, "Landmark Attention" (arXiv 2305.16300).
"""

from __future__ import annotations

import random
from typing import Any

import torch

from pkv_hf.bench.inputs.texts import begin_ids
from pkv_hf.errors import UsageError

INTRODUCTION = "There is a pass key hidden in a long text. Find it and remember it.\n\n"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = "\n\nWhat is the pass key? The pass key is"


def key_of(trial: int) -> str:
    """Five digits, the same ones for a trial at every length and depth."""
    return f"{random.Random(trial).randrange(10_000, 100_000)}"


def prompt(tokenizer: Any, length: int, depth: float, key: str) -> torch.Tensor:
    """A prompt of exactly `length` tokens (int64) with the key at `depth`, 0 the begin and 1 the end of the text.

    The key stands between two sentences. Raises UsageError for a length that has no room for it, or another depth.
    """
    if not 0 <= depth <= 1:
        raise UsageError(f"--depths {depth} is not from 0 to 1: pass 0.5 for the middle")
    introduction, filler, needle, question = (
        tokenizer(text, add_special_tokens=False).input_ids
        for text in (INTRODUCTION, FILLER, NEEDLE.format(key=key), QUESTION)
    )
    introduction = begin_ids(tokenizer) + introduction
    room = length - len(introduction) - len(needle) - len(question)
    if room < len(filler):
        raise UsageError(
            f"--lengths {length} is too short for a hidden key: pass at least {length - room + len(filler)}"
        )
    before = min(round(depth * room / len(filler)) * len(filler), room)
    text = filler * (room // len(filler) + 1)
    return torch.tensor([*introduction, *text[:before], *needle, *text[: room - before], *question])


def answer_tokens(tokenizer: Any, key: str) -> int:
    """Tokens to generate for an answer."""
    return len(tokenizer(f" {key}.", add_special_tokens=False).input_ids) + 1
