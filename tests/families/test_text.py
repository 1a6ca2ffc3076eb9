"""Every mode of generate() with text, for each of today's families: patched as without."""

from __future__ import annotations

import pytest
import torch

from families.compare import Subject, check
from families.models import FAMILIES, HYBRIDS
from families.modes import TEXT_MODES
from pkv_hf.bench.model_types.building import prompts

CONVOLUTIONS = ("lfm2", "lfm2-moe", "lfm3")
"""Hybrids whose states transformers can roll back."""

REFUSED = {
    "prompt lookup": {*HYBRIDS, "qwen3.5-vl"} - {*CONVOLUTIONS},
    "inputs_embeds": {"nemotron-h", "bamba", "falcon-h1", "zamba2", "gemma3", "gemma4", "paligemma"},
    "chunked prefill": {"recurrent-gemma"},
    "static cache": {"paligemma"},
}
"""What transformers itself raises at, by mode."""


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request):
    return Subject(request.param)


@pytest.mark.parametrize("mode", TEXT_MODES)
def test_as_without(subject, mode):
    said = check(subject, mode, TEXT_MODES[mode], refused=subject.family in REFUSED.get(mode, ()))
    assert not said.calls.masked


@torch.no_grad()
def test_what_is_long_past_counts(subject):
    """Tokens that the first tokens did not reach would be right whatever the cache holds."""
    inputs, last = prompts(14, 9), []
    for token in (5, 6):
        inputs["input_ids"][0, 0] = token
        last.append(subject.model(**inputs, use_cache=False).logits[:, -1])
    moved = (last[0] - last[1]).abs().amax(dim=-1) / last[0].abs().max()
    assert moved[0] > 1e-3
    assert moved[1] < 1e-5
