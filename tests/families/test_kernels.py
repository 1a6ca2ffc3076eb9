"""Families whose attention asks for more, on the Triton routes by the interpreter: patched as without."""

from __future__ import annotations

import pytest

from families.compare import Subject, check
from families.modes import seen, text
from jsonl import records
from pkv_hf.compat import CACHE
from pkv_hf.errors import NotServed
from pkv_hf.routes.triton import Workqueue
from pkv_hf.runtime import forward

pytest.importorskip("triton")

SHORT = {"new_tokens": 3}
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
    "gemma4": seen(**SHORT),
}


@pytest.mark.parametrize("route", ["split", "workqueue"])
@pytest.mark.parametrize("family", ASKED)
def test_as_without(family, route):
    said = check(Subject(family), "greedy", ASKED[family], route=route)
    assert said.route == route


def test_a_record_says_how_each_route_ran(run, tmp_path, monkeypatch):
    out = tmp_path / "families.jsonl"
    arguments = ("record_families", "--only", "mistral3", "--new-tokens", 2, "--out", out)
    decode = Workqueue.decode
    monkeypatch.setattr(Workqueue, "decode", lambda *args, **kwargs: decode(*args, **kwargs) + 0.01)
    assert run(*arguments)[0] == 1
    split, workqueue = records(out)
    assert (split["route"], split["tokens_equal"], split["right"], split["steps"]["static"]) == ("split", True, True, 2)
    assert (workqueue["route"], workqueue["right"]) == ("workqueue", False)


@pytest.mark.parametrize("on_pages", [True, False])
def test_a_record_is_right_by_what_ran_on_pages(run, monkeypatch, on_pages):
    admit, due = forward.admit, ["CUDA graphs, decode steps run without: the layers wait for the device"]

    def said_once(decoder, state, call):
        if due and call[CACHE].get_seq_length():
            reason = due.pop()
            if not on_pages:
                raise NotServed(reason)
            state.say(reason)
        return admit(decoder, state, call)

    monkeypatch.setattr(forward, "admit", said_once)
    found = run.load("record_families").trial("gemma2", "split", 2)
    assert (len(found["left"]), found["tokens_equal"], found["beams_equal"]) == (1, True, True)
    assert (found["calls"]["transformers"] == 0, found["right"]) == (on_pages, on_pages)
