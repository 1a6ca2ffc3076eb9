"""Whether a patched model answers as it does without, and on what."""

from __future__ import annotations

import torch
from transformers.utils import ModelOutput

import pkv_hf
from families.models import family_model
from families.modes import OWN_PATH, REPEATING, Ask, text
from pkv_hf import PagedCache, Report
from pkv_hf.bench.model_types.modes import TOLERANCE
from pkv_hf.cache.pool import PagePool
from pkv_hf.compat import CACHE
from tiny import assert_on_pages

FIRST_TOKENS = text((9,), new_tokens=2)
Answer = ModelOutput | Exception


def assert_same(ours: Answer, theirs: Answer, exactly: bool = False) -> None:
    """Equal tokens, and logits that are close, or equal; of errors the same words."""
    if isinstance(ours, Exception) or isinstance(theirs, Exception):
        assert brief(ours) == brief(theirs), f"{brief(ours)} for {brief(theirs)}"
        return
    assert ours.keys() == theirs.keys(), f"{[*ours]} for {[*theirs]}"
    if "sequences" in theirs:
        assert torch.equal(ours.sequences, theirs.sequences), "other tokens"
    error = logits_error(ours, theirs)
    assert error <= (0 if exactly else TOLERANCE), f"logits differ by {error:.1e} of the largest"


def brief(answer: Answer) -> str:
    return repr(answer) if isinstance(answer, Exception) else type(answer).__name__


def logits_error(ours: ModelOutput, theirs: ModelOutput) -> float:
    """The largest difference, relative to the largest logit."""
    found, expected = (torch.stack(list(each.logits)) for each in (ours, theirs))
    return float((found - expected).abs().max() / expected.abs().max())


def pools_of(output: ModelOutput) -> list[PagePool]:
    """Of the cache that a model returned, whose pages some rows hold."""
    assert isinstance(output[CACHE], PagedCache)
    pools = [table.pool for table in output[CACHE].tables.values()]
    assert all(pool.allocator.refcounts[1:].any() for pool in pools)
    return pools


class Subject:
    """A model of a family, and what it says unpatched."""

    def __init__(self, family: str) -> None:
        self.family, self.model = family, family_model(family)
        self.first = self.answer(FIRST_TOKENS)

    def answer(self, ask: Ask) -> Answer:
        """What the model says, or the error that it raises."""
        try:
            with torch.no_grad():
                return ask(self.model, self.family)
        except Exception as error:  # also those of transformers' own that are no refusals
            return error.with_traceback(None)  # whose frames hold a cache that the next call would be said to lack


def check(subject: Subject, mode: str, ask: Ask, refused: bool = False, route: str = "auto") -> Report:
    """One mode, patched and not. Returns what the patched model reports.

    What transformers refuses is refused alike. Nothing is left behind: pages go with their cache, and the model that is
    no longer patched gives its first tokens again. A second call may share prompts, since the first has shown how.
    """
    model, theirs = subject.model, subject.answer(ask)
    assert isinstance(theirs, Exception) == refused, brief(theirs)
    with pkv_hf.patched(model, route=route):
        ours = subject.answer(ask)
        said = pkv_hf.report(model)
        assert_same(ours, theirs, exactly=mode in OWN_PATH)
        if mode in OWN_PATH:
            assert refused or (said.calls.transformers and not said.calls.pages), said
            assert said.left or mode == "forward"  # a cache that was asked for and is not had is said
        elif not refused:
            pools = pools_of(ours)
            del ours
            assert not any(pool.allocator.refcounts[1:].any() for pool in pools)
            if mode in REPEATING:
                assert_same(subject.answer(ask), theirs)
            assert_on_pages(model)
    assert_same(subject.answer(FIRST_TOKENS), subject.first, exactly=True)
    return said
