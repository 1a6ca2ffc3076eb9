"""Steps on static buffers take the next tokens by themselves where a call is greedy; with no other result."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation.logits_process import MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

import pkv_hf
from pkv_hf.compat import CACHE
from pkv_hf.kernels.reference import NextStep
from pkv_hf.replaced import STATE
from pkv_hf.runtime.ahead import greedy as selecting
from pkv_hf.runtime.ahead import loop
from pkv_hf.runtime.ahead.greedy import Greedy, Selection, greedy_of
from tiny import left_padded, tiny

pytestmark = pytest.mark.contract

NEW_TOKENS = 12


@pytest.fixture
def by_loop(monkeypatch):
    """Which steps the loop itself took tokens of."""
    seen, extend = [], loop._Sequences.extend
    monkeypatch.setattr(loop._Sequences, "extend", lambda self, given: seen.append(self.length) or extend(self, given))
    return seen


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def generate(model, lengths, **settings):
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True, **settings}
    return model.generate(**left_padded(*lengths), **settings)


def ends_of(model, lengths, *at):
    """The tokens that rows have at these steps."""
    free = generate(model, lengths).sequences[:, max(lengths) :]
    return [int(free[row, step]) for row, step in enumerate(at)]


@pytest.mark.parametrize(
    ("lengths", "at", "settings"),
    [
        ((9,), (), {}),
        ((9, 4, 7), (), {}),
        ((9, 4, 7), (3, 5, 8), {}),
        ((9, 4), (4,), {}),
        ((9,), (4,), {"min_new_tokens": 7}),
        ((9,), (9,), {"min_new_tokens": 7}),
        ((9,), (4,), {"min_new_tokens": NEW_TOKENS}),
        ((9, 4), (4, 3), {"min_length": 15}),
        ((9,), (1,), {"max_new_tokens": 3}),
    ],
    ids=str,
)
def test_tokens_are_transformers_own(model, steps, by_loop, lengths, at, settings):
    if at:
        settings = {**settings, "eos_token_id": [*ends_of(model, lengths, *at), 10**6], "pad_token_id": 3}
    expected = generate(model, lengths, **settings)
    with pkv_hf.patched(model):
        generate(model, lengths)  # the first step ever is the model's own
        by_loop.clear()
        steps.clear()
        ours = generate(model, lengths, **settings)
    assert torch.equal(ours.sequences, expected.sequences)
    assert at != (9,) or expected.sequences.shape[1] < 9 + NEW_TOKENS, "the row was to end once it may"
    assert ours[CACHE].get_seq_length() == expected[CACHE].get_seq_length()
    assert by_loop == [max(lengths)]  # the prompt's
    assert [tokens is not None for tokens in steps] == [True] + [False] * (
        len(steps) - 1
    )  # what follows is not written


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True},
        {"output_scores": True},
        {"output_logits": True},
        {"repetition_penalty": 1.5},
        {"max_time": 60.0},
        {"logits_processor": "another"},
    ],
    ids=str,
)
def test_what_takes_more_is_selected_by_the_loop(steps, by_loop, settings):
    model, taken = tiny("llama"), []
    if "logits_processor" in settings:
        other = type("Other", (LogitsProcessor,), {"__call__": lambda _, ids, scores: -scores})
        settings = {"logits_processor": [other()]}
    torch.manual_seed(0)
    expected = generate(model, (9, 4), **settings)
    with pkv_hf.patched(model):
        generate(model, (9, 4))
        torch.manual_seed(0)
        taken.append(len(by_loop))
        ours = generate(model, (9, 4), **settings)
    assert torch.equal(ours.sequences, expected.sequences)
    assert len(by_loop) - taken[0] == expected.sequences.shape[1] - 9
    assert steps


def test_a_second_turn_goes_on_with_settings_of_its_own(model, steps, by_loop):
    turns = []
    for patch in (False, True):
        if patch:
            pkv_hf.patch(model)
            generate(model, (9,))
        end = ends_of(model, (9,), 4)
        first = generate(model, (9,), eos_token_id=end, pad_token_id=1)
        ids = torch.cat([first.sequences, left_padded(6, seed=1)["input_ids"]], dim=1)
        for settings in ({"eos_token_id": 10**6}, {"eos_token_id": end, "min_new_tokens": 5}):
            settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2, **settings}
            ids = model.generate(ids, **{CACHE: first[CACHE]}, **settings)
            ids = torch.cat([ids, left_padded(3, seed=2)["input_ids"]], dim=1)
        turns.append(ids)
    pkv_hf.unpatch(model)
    assert torch.equal(*turns)


def test_inference_mode_may_come_and_go(model, steps, monkeypatch):
    """torch forbids to write outside of it what was made inside, and steps run outside."""
    monkeypatch.setattr(selecting, "_by_kernel", lambda _: False)
    settings = {"eos_token_id": 10**6, "pad_token_id": 1, "min_new_tokens": 3}
    expected = generate(model, (9,), **settings)
    with pkv_hf.patched(model):
        generate(model, (9,))
        with torch.inference_mode():
            inside = generate(model, (9,), **settings)
        ids, held = torch.cat([inside.sequences, inside.sequences[:, :3]], dim=1).clone(), {CACHE: inside[CACHE]}
        outside = model.generate(ids, **held, max_new_tokens=4, do_sample=False, **settings)
        assert None in steps
    assert torch.equal(inside.sequences, expected.sequences)
    assert torch.equal(outside, model.generate(ids, max_new_tokens=4, do_sample=False, **settings))


def test_every_kind_of_selection_runs_once_before_it_may_be_captured(model, steps):
    """Each is a kernel of its own, which a capture may not compile."""
    kinds = ({}, {"eos_token_id": 1}, {"eos_token_id": [1, 2]}, {"eos_token_id": 1, "min_new_tokens": 2})
    with pkv_hf.patched(model):
        generate(model, (9,))  # the first step ever is the model's own
        compiled = getattr(model, STATE).compiled
        for kind in (*kinds, *kinds):
            generate(model, (9,), **kind)
        assert len({shape[-1] for shape in compiled} - {None}) == len(kinds)


def test_what_a_call_selects_by():
    ends, config = torch.tensor([4]), GenerationConfig()
    config._pad_token_tensor = torch.tensor(4)
    holding = [MinNewTokensLengthLogitsProcessor(9, 11, ends), MinLengthLogitsProcessor(15, ends)]
    stopping = [MaxLengthCriteria(30, 40), EosTokenCriteria(ends)]
    found = greedy_of(holding, stopping, config)
    assert found == Greedy(ends, config._pad_token_tensor, ends, 20) == greedy_of(holding[::-1], stopping, config)
    assert greedy_of([], stopping[:1], config) == Greedy(None, None, None, 0)
    assert greedy_of([*holding, MinLengthLogitsProcessor(15, torch.tensor([5]))], stopping, config) is None
    assert greedy_of([], [MaxLengthCriteria(41, 40)], config) is None  # it warns
    assert greedy_of([], [MaxTimeCriteria(1.0)], config) is None


@pytest.mark.parametrize("by_kernel", [False, True])
def test_buffers_forget_the_call_before(monkeypatch, by_kernel):
    if by_kernel:
        pytest.importorskip("triton")
    monkeypatch.setattr(selecting, "_by_kernel", lambda _: by_kernel)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    greedy = Greedy(torch.tensor([4, 9]), torch.tensor(7), torch.tensor([4, 9]), until=12)
    selection = Selection(greedy, 3, 10, torch.float32, device)
    step = NextStep(torch.zeros(3, 1).long(), torch.full((2, 3, 1), 30), torch.tensor([31, 32, 33]).int())
    step = NextStep(*(tensor.to(device) for tensor in step))

    def selected(logits):
        newest = selection(logits.to(device), step)
        assert torch.equal(step.inputs[:, 0], newest[0])
        return newest.tolist()

    logits = torch.zeros(3, 1, 10)
    logits[:, 0, 4], logits[:, 0, 2] = 5.0, 3.0
    selection.begin(greedy, torch.tensor([1, 0, 1]))
    assert selected(logits) == [[2, 7, 2], [1, 0, 1]]
    selection.go_on(11)
    assert selected(logits) == [[2, 7, 2], [1, 0, 1]]
    selection.go_on(12)
    assert selected(logits) == [[4, 7, 4], [0, 0, 0]]
    selection.begin(Greedy(torch.tensor([1, 2]), torch.tensor(8), torch.tensor([2, 1]), until=20), torch.ones(3))
    assert selected(logits) == [[4, 4, 4], [1, 1, 1]]
    selection.go_on(20)
    assert selected(torch.eye(10)[[2, 3, 4]][:, None]) == [[2, 3, 4], [0, 1, 1]]
    assert selected(torch.eye(10)[[5, 5, 5]][:, None]) == [[8, 5, 5], [0, 1, 1]]
    assert (step.positions == 36).all()
    assert step.ends.tolist() == [37, 38, 39]
