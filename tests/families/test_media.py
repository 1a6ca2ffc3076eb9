"""Models that take images or sound, with them: patched as without."""

from __future__ import annotations

import pytest
import torch

from families.compare import Subject, check
from families.models import WRAPPERS
from families.modes import BOTH, MEDIA_MODES, OWN_PATH, media

AUDIO = ("qwen2-audio", "voxtral")
REFUSED = {"chunked prefill": AUDIO}
"""What transformers itself raises at, by mode."""

SEE_AHEAD = ("gemma3", "gemma4", "molmo2", "paligemma")
"""Families whose images' tokens attend to each other, or all tokens of a prompt do."""


@pytest.fixture(scope="module", params=WRAPPERS)
def subject(request):
    return Subject(request.param)


@pytest.mark.parametrize("mode", MEDIA_MODES)
def test_as_without(subject, mode):
    said = check(subject, mode, MEDIA_MODES[mode], refused=subject.family in REFUSED.get(mode, ()))
    assert bool(said.calls.masked) == (subject.family in SEE_AHEAD and mode not in OWN_PATH)


@torch.no_grad()
def test_another_image_gives_other_logits(subject):
    inputs = media(subject.model, subject.family, BOTH)
    name = "input_features" if subject.family in AUDIO else "pixel_values"
    logits = [subject.model(**{**inputs, name: values}).logits[:, -1] for values in (inputs[name], 1 - inputs[name])]
    moved = (logits[0] - logits[1]).abs().amax(dim=-1) / logits[0].abs().max()
    assert (moved > 1e-2).all()
