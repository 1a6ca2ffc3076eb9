"""What steps by tokens alone have to do, as it was found of a model."""

from __future__ import annotations

from typing import NamedTuple

from pkv_hf.runtime.ahead.logits import Logits


class StandIn(NamedTuple):
    """Tokens whose place another takes before a model's decoder sees them (Gemma 4's of images)."""

    tokens: tuple[int, ...]
    by: int


class Found(NamedTuple):
    """What steps have to do to do what a model does."""

    logits: Logits | None = None
    """What logits are of hidden states."""
    stand_in: StandIn | None = None
    why: str = ""
    """Why steps are not known to do what the model does, where there are no logits."""
