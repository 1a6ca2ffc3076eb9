"""A tiny model of each of today's families on a GPU, in float32: tokens are transformers' own on both Triton routes."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("route", ["split", "workqueue"])
@pytest.mark.parametrize("family", ["qwen3.5", "qwen3-vl", "gemma3", "gemma4", "gpt-oss", "granite-4", "llama4"])
def test_tokens_are_transformers_own(run, record_property, family, route):
    found = run.load("record_families").trial(family, route, new_tokens=40)
    for name in ("steps", "not_captured"):
        record_property(name, found.get(name))
    assert found["right"], found
    assert found["steps"]["captured"] or found["not_captured"]
