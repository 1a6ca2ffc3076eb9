"""The run-ahead loop gives what transformers' own loop gives. On the CPU it runs over plain forwards here."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import pkv_hf
from pkv_hf.compat import CACHE
from pkv_hf.runtime.ahead import loop
from tiny import byte_tokenizer, left_padded, tiny

pytestmark = pytest.mark.contract


@pytest.fixture
def runs(monkeypatch):
    """Makes the loop serve the CPU too; counts its runs."""
    seen = []
    monkeypatch.setattr(loop, "_accelerated", lambda *_: seen.append(1) or True)
    return seen


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def both(model, runs, inputs, seed=0, expect_run=True, **settings):
    """generate() by transformers and by the loop, from the same seed; checks that the generator ends alike too."""
    results = []
    for patch in (False, True):
        torch.manual_seed(seed)
        settings = {"max_new_tokens": 12, "do_sample": False, **settings}
        if patch:
            with pkv_hf.patched(model):
                result = model.generate(**inputs, **settings)
        else:
            result = model.generate(**inputs, **settings)
        results.append((result, torch.rand(1)))
    assert bool(runs) == expect_run
    assert results[0][1] == results[1][1], "the random generator was left elsewhere"
    return results[0][0], results[1][0]


SETTINGS = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "top-k, top-p": {"do_sample": True, "top_k": 9, "top_p": 0.8, "temperature": 0.7},
    "min-p": {"do_sample": True, "min_p": 0.05},
    "repetition penalty": {"repetition_penalty": 1.8},
    "no repeated bigrams": {"no_repeat_ngram_size": 2},
    "several a prompt": {"do_sample": True, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 4},
    "one token": {"max_new_tokens": 1},
}


@pytest.mark.parametrize("lengths", [(9,), (9, 4, 7)])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_tokens_are_identical(model, runs, lengths, settings):
    expected, ours = both(model, runs, left_padded(*lengths), **settings)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("do_sample", [False, True])
def test_rows_end_at_different_steps(model, runs, do_sample):
    inputs = left_padded(9, 4, 7)
    torch.manual_seed(0)
    free = model.generate(**inputs, max_new_tokens=12, do_sample=do_sample)[:, 9:]
    ends = [int(free[0, 2]), int(free[1, 5]), int(free[2, 4])]
    settings = {"do_sample": do_sample, "eos_token_id": ends, "pad_token_id": 7, "return_dict_in_generate": True}
    expected, ours = both(model, runs, inputs, output_scores=True, output_logits=True, **settings)
    assert expected.sequences.shape[1] < 9 + 12, "no row was to run to the end"
    assert (expected.sequences[:, -1] == 7).any(), "a row was to end before the others"
    assert torch.equal(ours.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert len(ours[name]) == len(expected[name]) == expected.sequences.shape[1] - 9
    assert ours[CACHE].get_seq_length() == expected[CACHE].get_seq_length()


def test_min_new_tokens_holds_off_the_end(model, runs):
    inputs = left_padded(9)
    first = int(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1])
    expected, ours = both(model, runs, inputs, eos_token_id=first, min_new_tokens=5)
    assert torch.equal(ours, expected)
    assert ours.shape[1] >= 9 + 5


def test_the_returned_structure_is_transformers_own(model, runs):
    settings = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected, ours = both(model, runs, left_padded(9, 4), repetition_penalty=1.3, **settings)
    assert type(ours) is type(expected)
    assert ours.keys() == expected.keys()
    for name in ("scores", "logits"):
        assert len(ours[name]) == len(expected[name]) == 12
        for a, b in zip(ours[name], expected[name]):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)
    ids, caches = expected.sequences, (expected[CACHE], ours[CACHE])
    assert [cache.get_seq_length() for cache in caches] == [ids.shape[1] - 1] * 2


def test_a_second_turn_goes_on_from_the_cache(model, runs):
    inputs = left_padded(9)
    end = int(model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, -1])
    turns = []
    for patch in (False, True):
        if patch:
            pkv_hf.patch(model)
        first = model.generate(
            **inputs, max_new_tokens=12, do_sample=False, eos_token_id=end, return_dict_in_generate=True
        )
        ids = torch.cat([first.sequences, left_padded(6, seed=1)["input_ids"]], dim=1)
        turns.append(model.generate(ids, **{CACHE: first[CACHE]}, max_new_tokens=6, do_sample=False))
    pkv_hf.unpatch(model)
    assert torch.equal(*turns)


class Recorder(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.values.append(value.tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("stops", [False, True])
def test_a_streamer_gets_every_token_once(model, runs, stops):
    inputs = left_padded(9)
    settings = {}
    if stops:
        settings["eos_token_id"] = int(model.generate(**inputs, max_new_tokens=7, do_sample=False)[0, -1])
    streams = []
    for patch in (False, True):
        streams.append(Recorder())
        if patch:
            pkv_hf.patch(model)
        model.generate(**inputs, max_new_tokens=12, do_sample=False, streamer=streams[-1], **settings)
    pkv_hf.unpatch(model)
    assert runs
    assert streams[0].values == streams[1].values
    assert streams[1].ended


def test_a_streamer_that_fails_leaves_no_page(model, runs):
    class Failing(Recorder):
        def put(self, value):
            if len(self.values) == 3:
                raise RuntimeError("closed")
            super().put(value)

    cache = pkv_hf.PagedCache(model.config)
    with pkv_hf.patched(model), pytest.raises(RuntimeError, match="closed"):
        model.generate(**left_padded(9), max_new_tokens=12, do_sample=False, streamer=Failing(), **{CACHE: cache})
    cache.reset()
    assert cache.memory().pages_in_use == 0


@pytest.mark.parametrize("route", ["auto", "split"])
def test_a_streamer_that_ends_a_call_leaves_the_cache_as_long(model, route):
    if route == "split":
        pytest.importorskip("triton")

    class Ends(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.values) == 4:
                raise KeyboardInterrupt

    lengths = []
    for patched in (False, True):
        cache = pkv_hf.PagedCache(model.config)
        if patched:
            pkv_hf.patch(model, route=route)
        with pytest.raises(KeyboardInterrupt):
            model.generate(**left_padded(9), max_new_tokens=12, do_sample=False, streamer=Ends(), **{CACHE: cache})
        lengths.append(cache.get_seq_length())
    pkv_hf.unpatch(model)
    assert lengths[0] == lengths[1] == 11


def test_max_time_stops(model, runs):
    _, ours = both(model, runs, left_padded(9), max_time=0.0)
    assert ours.shape[1] == 9 + 1


class AfterThree(StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 12, device=input_ids.device)


def test_what_needs_the_host_takes_transformers_loop(model, runs, smollm2_tokenizer):
    inputs = left_padded(9)
    for settings in (
        {"stopping_criteria": StoppingCriteriaList([AfterThree()])},
        {"stop_strings": ["zzz"], "tokenizer": smollm2_tokenizer},
        {"num_beams": 2},
        {"return_dict_in_generate": True, "output_hidden_states": True},
        {"prompt_lookup_num_tokens": 2},
    ):
        expected, ours = both(model, runs, inputs, expect_run=False, **settings)
        if not isinstance(expected, torch.Tensor):
            assert len(ours.hidden_states) == len(expected.hidden_states) == 12
            expected, ours = expected.sequences, ours.sequences
        assert torch.equal(ours, expected)


class Counting(LogitsProcessor):
    def __init__(self):
        self.lengths = []

    def __call__(self, ids, scores):
        self.lengths.append(ids.shape[1])
        return scores


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}, {"max_new_tokens": 9}], ids=str)
def test_processors_and_generators_are_asked_as_often(model, runs, settings):
    pytest.importorskip("triton")
    inputs, seen = left_padded(9, 4), []
    torch.manual_seed(0)
    free = model.generate(**inputs, **{"max_new_tokens": 7, "do_sample": False, **settings})
    ends = [int(free[0, -1]), int(free[1, -2])]
    for patch in (False, True):
        torch.manual_seed(0)
        counting = Counting()
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": ends, **settings}
        if patch:
            pkv_hf.patch(model, route="split")  # whose steps are queued ahead
        tokens = model.generate(**inputs, **settings, logits_processor=[counting])
        seen.append((tokens.tolist(), counting.lengths, torch.rand(1).item()))
    pkv_hf.unpatch(model)
    assert runs
    assert seen[0] == seen[1]


def test_a_trie_of_allowed_tokens_is_never_asked_after_its_end(model, runs):
    """`prefix_allowed_tokens_fn` raises where it allows nothing."""
    pytest.importorskip("triton")
    trie = [[10, 20, 30, 3], [10, 21, 3]]

    def allowed(_, ids):
        done = ids[9:].tolist()
        return sorted({way[len(done)] for way in trie if way[: len(done)] == done and len(way) > len(done)})

    settings = {"prefix_allowed_tokens_fn": allowed, "eos_token_id": 3, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**left_padded(9), **settings)
    with pkv_hf.patched(model, route="split"):
        assert torch.equal(model.generate(**left_padded(9), **settings), expected)
    assert runs


def test_token_healing_keeps_its_tokenizer(runs):
    tokenizer = byte_tokenizer(pad_token="<pad>", eos_token="</s>")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    model = tiny("llama", vocab_size=260, eos_token_id=257, bos_token_id=258, pad_token_id=256)
    ids = tokenizer('A page is at <a href="http:', return_tensors="pt")
    settings = {"token_healing": True, "tokenizer": tokenizer, "max_new_tokens": 5}
    expected, ours = both(model, runs, {"input_ids": ids["input_ids"]}, **settings)
    assert torch.equal(ours, expected)


def test_an_option_that_the_loop_does_not_know_takes_transformers_loop(model, runs, monkeypatch):
    monkeypatch.setattr(loop, "OPTIONS", loop.OPTIONS - {"output_scores"})
    settings = {"return_dict_in_generate": True, "output_scores": True}
    expected, ours = both(model, runs, left_padded(9), expect_run=False, **settings)
    assert len(ours.scores) == len(expected.scores)
    both(model, runs, left_padded(9), return_dict_in_generate=True)


def test_options_are_those_that_the_installed_loop_reads():
    """A release whose loop reads another is one to look at."""
    assert loop._options_read() <= loop.OPTIONS


def test_a_callers_own_custom_generate_is_left_alone(model, runs):
    def mine(model, input_ids, **_):
        return input_ids

    with pkv_hf.patched(model):
        assert model.generate(**left_padded(9), custom_generate=mine).shape == (1, 9)
    assert not runs


def test_run_ahead_can_be_turned_off(model, runs):
    with pkv_hf.patched(model, run_ahead=False):
        assert "generate" not in model.__dict__
        model.generate(**left_padded(9), max_new_tokens=3, do_sample=False)
    assert not runs


def test_masks_with_holes_run_ahead_over_transformers_layers(model, runs):
    inputs = left_padded(9, 9)
    inputs["attention_mask"][1, 3] = 0
    expected, ours = both(model, runs, inputs)
    assert torch.equal(ours, expected)


def test_dynamic_caches_take_transformers_loop(model, runs):
    from transformers import DynamicCache

    expected = model.generate(**left_padded(9), max_new_tokens=6, do_sample=False)
    with pkv_hf.patched(model):
        cache = DynamicCache(config=model.config)
        ours = model.generate(**left_padded(9), max_new_tokens=6, do_sample=False, **{CACHE: cache})
    assert torch.equal(ours, expected)
    assert not runs
