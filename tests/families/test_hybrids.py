"""Models with linear-attention states on pages: a step that fails leaves no trace, states go where rows go."""

from __future__ import annotations

import contextlib
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hybrid import HYBRIDS, hybrid, states
from torch.utils._python_dispatch import TorchDispatchMode

import pkv_hf
from pkv_hf import PagedCache
from pkv_hf.compat import CACHE, not_captured
from pkv_hf.errors import LayerNotServed
from pkv_hf.replaced import STATE
from pkv_hf.routes.registry import ROUTES
from pkv_hf.runtime import choice, forward, interface
from pkv_hf.runtime.ahead.logits import Logits
from pkv_hf.runtime.captured.graphs import CaptureError
from pkv_hf.runtime.captured.static import StaticStep
from pkv_hf.runtime.choice import static_step
from pkv_hf.runtime.step import NOT_FUSED
from tiny import COMMON, assert_on_pages, left_padded, randomized

pytestmark = pytest.mark.contract

SETTINGS = {"max_new_tokens": 8, "do_sample": False}


class Stopped(Exception):
    pass


def prompted(model, *lengths):
    """A cache that holds prompts and two tokens more, and the mask of all that it holds."""
    inputs, cache = left_padded(*lengths), PagedCache(model.config)
    model(**inputs, **{CACHE: cache})
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(lengths), 2, dtype=torch.long)], dim=1)
    for token in (5, 6):
        model(torch.full((len(lengths), 1), token), attention_mask=mask[:, : token - 6 or None], **{CACHE: cache})
    return cache, mask


def step(model, cache, mask, count=1):
    tokens = torch.arange(7, 7 + count).expand(len(mask), -1)
    mask = torch.cat([mask, torch.ones(len(mask), count, dtype=torch.long)], dim=1)
    return model(tokens, attention_mask=mask, **{CACHE: cache}).logits


def held(cache):
    paged = [x.clone() for layer in cache.paged_layers for x in (layer.keys, layer.values)]
    return paged + [x.clone() for x in states(cache)]


def places(cache):
    return [x.data_ptr() for x in states(cache)]


def failing(module, run, *args):
    """Runs with a module whose forward fails when it is done, and has to raise that."""
    forward = module.forward

    def fails(*inputs, **kwargs):
        forward(*inputs, **kwargs)
        raise Stopped

    module.forward = fails
    try:
        with pytest.raises(Stopped):
            run(*args)
    finally:
        del module.forward


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", HYBRIDS)
def test_a_step_that_fails_in_any_layer_leaves_states_and_pages_as_they_were(name, count):
    model = pkv_hf.patch(hybrid(name))
    decoder = model.get_decoder()
    expected = step(model, *prompted(model, 9, 14), count)
    for layer in decoder.layers:
        cache, mask = prompted(model, 9, 14)
        before, where = held(cache), places(cache)
        failing(layer, step, model, cache, mask, count)
        assert all(map(torch.equal, held(cache), before))
        assert places(cache) == where
        torch.testing.assert_close(step(model, cache, mask, count), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", HYBRIDS)
def test_a_prompt_that_fails_leaves_an_empty_cache_for_any_rows(name):
    model = pkv_hf.patch(hybrid(name))
    model(**left_padded(9, 14), **{CACHE: PagedCache(model.config)})  # or the error may be for what layers get
    cache = PagedCache(model.config)
    failing(model.get_decoder().layers[-1], lambda: model(**left_padded(9, 14), **{CACHE: cache}))
    assert cache.get_seq_length() == cache.rows == len(states(cache)) == 0
    ours = model(**left_padded(9, 14, 3), **{CACHE: cache}).logits
    fresh = model(**left_padded(9, 14, 3), **{CACHE: PagedCache(model.config)}).logits
    assert torch.equal(ours, fresh)


@torch.no_grad()
@pytest.mark.parametrize("fails_at", [1, 2])
@pytest.mark.parametrize("name", HYBRIDS)
def test_a_step_that_pages_cannot_serve_is_run_again_from_where_it_began(name, fails_at, monkeypatch):
    """By transformers' own path: a prompt, or the first step after it."""
    model, inputs = hybrid(name), left_padded(9, 14)
    expected = model.generate(**inputs, **SETTINGS)
    pkv_hf.patch(model)
    attended, attention_layers = [], sum(kind.window is not None for kind in PagedCache(model.config).kinds)

    def asked(module, *_):
        attended.append(module)
        if len(attended) == fails_at * attention_layers:  # in the last layer that attends
            raise LayerNotServed("not this one")

    monkeypatch.setattr(interface, "_check_asked", asked)
    assert torch.equal(model.generate(**inputs, **SETTINGS), expected)
    assert pkv_hf.report(model).left == ("not this one",)


@torch.no_grad()
@pytest.mark.parametrize("name", HYBRIDS)
def test_generate_gives_what_it_gave(name):
    model, inputs = hybrid(name), left_padded(9, 14)

    def run():
        torch.manual_seed(0)
        twice = model.generate(**inputs, **SETTINGS, return_dict_in_generate=True)
        ids = torch.cat([twice.sequences, inputs["input_ids"][:, :5]], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, ids.shape[1] - 14, dtype=torch.long)], dim=1)
        yield model.generate(input_ids=ids, attention_mask=mask, **SETTINGS, **{CACHE: twice[CACHE]})
        yield model.generate(**inputs, **SETTINGS, num_beams=3, num_return_sequences=2)
        yield model.generate(**inputs, **{**SETTINGS, "do_sample": True}, num_return_sequences=2)
        yield model.generate(**left_padded(14), **SETTINGS, prefill_chunk_size=4)
        with contextlib.suppress(ValueError):  # recurrent states do not go back, which transformers says
            yield model.generate(**left_padded(14), **SETTINGS, prompt_lookup_num_tokens=3)

    expected = [*run()]
    pkv_hf.patch(model)
    assert all(map(torch.equal, run(), expected))
    assert_on_pages(model)


@torch.no_grad()
@pytest.mark.parametrize("name", ["delta", "both in one"])
def test_prefixes_go_on_in_continuations_of_one_length(name):
    model = pkv_hf.patch(hybrid(name))
    shared = pkv_hf.prefix(model, left_padded(20)["input_ids"][0].tolist())
    inputs = shared.inputs([[5, 6, 7], [9, 8, 3]])
    expected = model.generate(input_ids=inputs["input_ids"], **SETTINGS)
    assert torch.equal(model.generate(**inputs, **SETTINGS), expected)
    assert torch.equal(model.generate(**shared.inputs([[5, 6, 7], [9, 8, 3]]), **SETTINGS), expected)
    with pytest.raises(ValueError, match="continuations are of 1 to 3 tokens"):
        shared.inputs([[5, 6, 7], [9]])


@torch.no_grad()
def test_states_in_modules_are_of_every_row_and_go_back():
    settings = {"lru_width": 64, "attention_window_size": 24, "block_types": ["recurrent", "attention"], "head_dim": 16}
    config = transformers.RecurrentGemmaConfig(**{**COMMON, **settings})
    if not PagedCache(config).linear_layers:
        pytest.skip("this release takes all of its layers for attention")
    model, inputs = randomized(transformers.RecurrentGemmaForCausalLM, config), left_padded(9, 14)
    expected = model.generate(**inputs, **SETTINGS, num_beams=2)
    pkv_hf.patch(model)
    assert torch.equal(model.generate(**inputs, **SETTINGS, num_beams=2), expected)
    assert_on_pages(model)
    with pytest.raises(pkv_hf.UnsupportedModelError, match="in its modules"):
        pkv_hf.prefix(model, [5, 6, 7])
    cache, mask = prompted(model, 9, 14)
    for refused in (cache.fork, lambda: cache.truncate(3), lambda: cache.crop(-1)):
        with pytest.raises(RuntimeError, match="states"):
            refused()
    block = model.model.layers[0].temporal_block
    before = block.conv1d_state.clone(), block.rg_lru.recurrent_states.clone()
    failing(model.model.final_norm, step, model, cache, mask)
    assert all(map(torch.equal, (block.conv1d_state, block.rg_lru.recurrent_states), before))


class Memory:
    """Stands for a memory that graphs are captured into; what a graph replays is said by hand."""

    def __init__(self, captured, replayed=lambda: None):
        self.captured, self.replay = captured, replayed

    def here(self, device):
        return self

    def capture(self, run):
        self.captured()
        return self, torch.zeros(2, 1, 64)


class NothingRead(TorchDispatchMode):
    """Fails where an operator waits for the device, which no capture can."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


class Running(Memory):
    """Runs what is captured, as a replay would."""

    def capture(self, run):
        with NothingRead():
            return self, run()


@torch.no_grad()
@pytest.mark.parametrize("name", HYBRIDS)
def test_a_step_is_captured_as_it_runs(name):
    """It reads nothing of the host's or the device's, and leaves states where they were."""
    model = pkv_hf.patch(hybrid(name))
    assert not not_captured(model.get_decoder())
    cache, mask = prompted(model, 9, 14)
    starts, other = np.array([5, 0]), cache.fork()
    for _ in range(2):
        positions = torch.from_numpy(cache.get_seq_length() - starts)[:, None]
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        call = {"attention_mask": mask, "position_ids": positions, CACHE: cache}
        expected = model.get_decoder()(torch.full((2, 1), 7), **call).last_hidden_state
        assert torch.equal(run_static(model, other, starts, Running(lambda: None)), expected)
    assert all(map(torch.equal, states(other), states(cache)))


def run_static(model, cache, starts, memories=None):
    static = StaticStep(model.get_decoder(), None, ROUTES["sdpa"], 1, NOT_FUSED)
    begin = cache.get_seq_length()
    tokens, positions = torch.full((2, 1), 7), torch.from_numpy(begin - starts)[:, None]
    return static.run(cache, tokens, positions, starts, memories)


@torch.no_grad()
@pytest.mark.parametrize("name", ["delta", "both in one"])
def test_static_steps_that_fail_leave_states_as_they_were(name):
    model = pkv_hf.patch(hybrid(name))
    starts = np.array([5, 0])
    cache, _ = prompted(model, 9, 14)
    before, where = held(cache), places(cache)

    def stops():
        raise Stopped

    failing(model.get_decoder().layers[-1], run_static, model, cache, starts)
    assert all(map(torch.equal, held(cache), before))
    layer = cache.linear_layers[-1]

    def elsewhere():
        layer.conv_states[0] = layer.conv_states[0] + 1

    with pytest.raises(CaptureError, match="elsewhere"):
        run_static(model, cache, starts, Memory(elsewhere))

    def ran():
        for tensor in states(cache):
            tensor.add_(1)
        stops()

    for fails in (Memory(stops), Memory(lambda: None, ran)):
        with pytest.raises(Stopped):
            run_static(model, cache, starts, fails)
        assert all(map(torch.equal, held(cache), before))
        assert places(cache) == where


@torch.no_grad()
@pytest.mark.parametrize("name", HYBRIDS)
def test_a_stop_that_is_read_late_leaves_the_cache_as_transformers_has_it(name):
    """Steps run on after the one whose token ends the row, as far as one more, which is taken back."""
    model, inputs = hybrid(name), left_padded(14)
    steps = int(torch.randint(1, 7, ()))
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
    tokens = model.generate(**inputs, **settings).sequences[0, 14:].tolist()
    eos = tokens[steps]
    first = tokens.index(eos)
    theirs = model.generate(**inputs, **settings, eos_token_id=eos)
    cache = PagedCache(pkv_hf.patch(model).config)
    token = model(**inputs, **{CACHE: cache}).logits[:, -1:].argmax(-1)
    head = Logits(weakref.ref(model.lm_head))
    static = StaticStep(model.get_decoder(), head, ROUTES["sdpa"], 1, NOT_FUSED)
    found = [token]
    for step in range(first + 1):
        positions = torch.tensor([[14]]) if step == 0 else None
        found.append(static.run(cache, found[-1], positions, np.array([0]), None).argmax(-1))
    cache.take_back()
    assert torch.cat([inputs["input_ids"], *found[:-1]], dim=1).equal(theirs.sequences)
    assert cache.get_seq_length() == theirs[CACHE].get_seq_length()
    for ours, expected in zip(states(cache), states(theirs[CACHE]), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_step_is_taken_back_once_and_only_where_nothing_came_after_it():
    model = pkv_hf.patch(hybrid("delta"))
    starts = np.array([5, 0])
    cache, _ = prompted(model, 9, 14)
    with pytest.raises(RuntimeError, match="take_back"):
        cache.take_back()
    memory, before, where = cache.memory(), held(cache), places(cache)
    run_static(model, cache, starts)
    pools = sum(table.pool.nbytes for table in cache.tables.values())
    assert cache.memory().held_bytes == pools + 2 * sum(x.nbytes for x in states(cache))
    assert cache.memory().live_bytes - memory.live_bytes == 2 * 2 * 2 * 16 * 4  # K and V of a layer's two heads
    cache.take_back()
    assert all(map(torch.equal, held(cache), before))
    assert places(cache) == where
    changes = [
        lambda: cache.take_back(),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: states(cache)[0].add_(1),
        lambda: cache.update(*torch.zeros(2, 2, 2, 1, 16), 1),
        lambda: step(model, cache, torch.ones(2, 17, dtype=torch.long)),
    ]
    for change in changes:
        run_static(model, cache, starts)
        change()
        with pytest.raises(RuntimeError, match="take_back"):
            cache.take_back()
        cache, _ = prompted(model, 9, 14)
    run_static(model, cache, starts)
    cache.reset()
    assert cache.last_step.nbytes == 0


@torch.no_grad()
def test_static_steps_are_not_for_padding_or_for_states_that_grow(monkeypatch):
    asked = []
    monkeypatch.setattr(forward, "static_step", lambda *args: asked.append(args))
    model, inputs = pkv_hf.patch(hybrid("delta")), left_padded(2, 12)
    prompted(model, 5)
    asked.clear()
    cache = PagedCache(model.config)
    for begin, end in ((0, 8), (8, 11), (11, 12)):  # the first row's tokens begin at 10
        chunk = {"input_ids": inputs["input_ids"][:, begin:end], "attention_mask": inputs["attention_mask"][:, :end]}
        model.model(**chunk, **{CACHE: cache})
        assert len(asked) == (begin == 11)
    monkeypatch.setattr(choice, "uncaptured", lambda *_: "")
    arguments = (getattr(model, STATE), cache, SimpleNamespace(fuses_rope=True, name="any"), 1)
    assert isinstance(static_step(*arguments), StaticStep)
    with monkeypatch.context() as patched:
        patched.setattr(arguments[0].known, "own_states", True)
        assert "modules may keep states" in static_step(*arguments)
    cache.activate_past_recording()
    assert "states that a crop may take back" in static_step(*arguments)


@torch.no_grad()
def test_a_graph_is_captured_anew_where_states_have_moved():
    model, captures = pkv_hf.patch(hybrid("convolution")), []
    cache, _ = prompted(model, 9, 14)
    memory = Memory(lambda: captures.append(places(cache)))
    static = StaticStep(model.get_decoder(), None, ROUTES["sdpa"], 1, NOT_FUSED)

    def run():
        static.run(cache, torch.full((2, 1), 7), torch.full((2, 1), cache.get_seq_length()), np.array([5, 0]), memory)

    run()
    run()
    assert len(captures) == 1
    cache.reorder_cache(torch.tensor([1, 0]))
    run()
    assert len(captures) == 1
    cache.linear_layers[0].conv_states[0] = cache.linear_layers[0].conv_states[0].clone()
    run()
    assert len(captures) == 2
