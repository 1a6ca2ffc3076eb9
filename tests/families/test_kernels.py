"""Families whose attention asks for more, on the Triton routes by the interpreter: patched as without."""

from __future__ import annotations

import pytest

from families.compare import check
from families.models import family_model
from families.modes import seen, text

pytest.importorskip("triton")

SHORT = {"max_new_tokens": 3}
BEAMS = {**SHORT, "num_beams": 2}
ASKED = {
    "qwen3.5": text(**SHORT),
    "gpt-oss": text(**BEAMS),
    "mimo-v2": text(**SHORT),
    "gemma2": text(**SHORT),
    "gemma4-31b": text(**SHORT),
    "gemma4-e2b": text(**SHORT),
    "llama4": text(**BEAMS),
    "gemma3": seen(**SHORT),
}


@pytest.mark.parametrize("route", ["split", "workqueue"])
@pytest.mark.parametrize("family", ASKED)
def test_as_without(family, route):
    said = check(family_model(family), family, "greedy", ASKED[family], route=route)
    assert said.route == route
