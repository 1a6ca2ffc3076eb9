"""Steps on static buffers, as a GPU runs them ahead, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

from pkv_hf.routes.registry import ROUTES
from pkv_hf.runtime import choice, forward
from pkv_hf.runtime.ahead import forward as ahead


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Has the CPU run the steps that a GPU captures, as they are, by torch's route; a list of their inputs."""
    steps, run_static = [], forward.run_static
    monkeypatch.setattr(forward, "uncaptured", lambda *_: "it is not, in this test")
    monkeypatch.setattr(choice, "uncaptured", lambda *_: "")
    monkeypatch.setattr(ahead, "run_static", lambda *args: steps.append(args[3]) or run_static(*args))
    monkeypatch.setattr(type(ROUTES["sdpa"]), "fuses_rope", True)
    return steps
