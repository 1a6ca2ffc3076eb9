"""What goes wrong around a patched model: exceptions, memory, bad calls. Afterwards all is as it was."""

from __future__ import annotations

import gc
import itertools
import secrets
import weakref

import pytest
import torch

import leaks
import pkv_hf
from faults import At, faulty
from pkv_hf.cache import pool
from pkv_hf.cache.paged import PagedCache
from pkv_hf.cache.pool import PagePool
from pkv_hf.cache.table import BlockTable
from pkv_hf.compat import CACHE
from pkv_hf.routes.triton import Split
from tiny import left_padded, tiny

ROUTES = ("sdpa", "split")  # transformers' loop, and the run-ahead loop over static steps


MADE: list[weakref.ref] = []


@pytest.fixture(autouse=True)
def note_caches(monkeypatch):
    init = PagedCache.__init__

    def noted(self, *args, **kwargs):
        MADE.append(weakref.ref(self))
        init(self, *args, **kwargs)

    MADE.clear()
    monkeypatch.setattr(PagedCache, "__init__", noted)


def live_caches() -> int:
    """Caches made in this test that are still there."""
    gc.collect()
    return sum(cache() is not None for cache in MADE)


@pytest.mark.parametrize(
    ("route", "where", "n", "error"),
    [
        *itertools.product(["sdpa"], ["streamer", "processor", "criterion", "layer"], [1], [KeyboardInterrupt]),
        *itertools.product(["sdpa"], ["streamer", "processor", "criterion", "layer"], [4], [RuntimeError]),
        ("split", "streamer", 4, RuntimeError),  # in the run-ahead loop
        ("split", "processor", 4, RuntimeError),
        ("split", "criterion", 1, KeyboardInterrupt),  # in transformers' loop over static steps
        ("split", "layer", 4, RuntimeError),
    ],
)
def test_an_exception_leaves_no_page_and_no_state(route, where, n, error):
    model, inputs = tiny("llama"), left_padded(20)
    expected = model.generate(**inputs, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    pkv_hf.patch(model, route=route)
    cache = PagedCache(model.config)
    with pytest.raises(error, match="now"):
        model.generate(
            **inputs, max_new_tokens=10, do_sample=False, **{CACHE: cache}, **faulty(where, At(n, error), model)
        )
    model.model.layers[1].mlp._forward_hooks.clear()
    assert cache.step is None
    lengths = {layer.length for layer in cache.layers}
    assert len(lengths) == 1
    (length,) = lengths
    if length:  # what it holds is right: the generation goes on from there
        ids = expected.sequences[:, : length + 1]
        rest = model.generate(ids, **{CACHE: cache}, max_new_tokens=30 - ids.shape[1], do_sample=False)
        assert torch.equal(rest, expected.sequences)
    del cache
    with pytest.raises(error, match="now"):
        model.generate(**inputs, max_new_tokens=10, do_sample=False, **faulty(where, At(n, error), model))
    model.model.layers[1].mlp._forward_hooks.clear()
    assert live_caches() == 0
    assert torch.equal(model.generate(**inputs, max_new_tokens=10, do_sample=False), expected.sequences)
    report = pkv_hf.report(model)
    assert report.calls.pages
    assert not report.calls.transformers
    assert not report.left or where in ("layer", "criterion")


@pytest.mark.parametrize("where", ["processor", "criterion", "layer"])
@pytest.mark.parametrize("search", ["beams", "assistant"])
def test_an_exception_in_a_search_leaves_no_page_and_no_state(search, where):
    model, inputs = tiny("llama"), left_padded(20)
    settings = {"num_beams": 3} if search == "beams" else {"assistant_model": pkv_hf.patch(tiny("llama", seed=1))}
    settings.update(max_new_tokens=10, do_sample=False)
    expected = model.generate(**inputs, **settings)
    pkv_hf.patch(model)
    with pytest.raises(RuntimeError, match="now"):
        model.generate(**inputs, **settings, **faulty(where, At(3, RuntimeError), model))
    model.model.layers[1].mlp._forward_hooks.clear()
    assert live_caches() == 0
    assert torch.equal(model.generate(**inputs, **settings), expected)


@pytest.mark.parametrize("route", ROUTES)
def test_memory_that_runs_out_at_once_is_named_and_nothing_stays(route, monkeypatch):
    model, inputs = tiny("llama"), left_padded(20, 9)
    expected = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    pkv_hf.patch(model, route=route)
    with monkeypatch.context() as patch:
        patch.setattr(pool, "free_bytes", lambda device: 1000)
        with pytest.raises(pkv_hf.PoolAllocationError, match="Lower max_new_tokens"):
            model.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert live_caches() == 0
    assert torch.equal(model.generate(**inputs, max_new_tokens=10, do_sample=False), expected)


@pytest.mark.parametrize("route", ROUTES)
def test_memory_that_runs_out_in_growth_leaves_a_cache_that_goes_on(route, monkeypatch):
    model, inputs = tiny("llama"), left_padded(20)
    expected = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    pkv_hf.patch(model, route=route)
    cache = PagedCache(model.config)
    with monkeypatch.context() as patch:
        require = PagePool.require

        def full(self, pages, exact=False):
            if self.allocator.capacity >= 3:
                raise pkv_hf.PoolAllocationError("no more")
            return require(self, pages, exact)

        patch.setattr(PagePool, "require", full)
        with pytest.raises(pkv_hf.PoolAllocationError, match="no more"):
            model.generate(**inputs, max_new_tokens=40, do_sample=False, **{CACHE: cache})
    length = cache.get_seq_length()
    assert 20 < length < 60
    assert {layer.length for layer in cache.layers} == {length}
    ids = expected[:, : length + 1]
    rest = model.generate(ids, **{CACHE: cache}, max_new_tokens=60 - ids.shape[1], do_sample=False)
    assert torch.equal(rest, expected)


@pytest.mark.parametrize(
    ("kv_dtype", "tensors", "n"),
    [*[(None, 6, n) for n in (1, 2, 6, 7, 8, 12)], *[("int8", 12, n) for n in (1, 3, 12, 13, 16, 24)]],
)
def test_any_allocation_may_fail_and_the_cache_goes_on(kv_dtype, tensors, n, monkeypatch):
    """Of three layers' K and V, and of scales where pages have 8 bits: the first ones, and those that they grow to."""
    model, inputs = tiny("llama"), left_padded(20)
    pkv_hf.patch(model, kv_dtype=kv_dtype)
    expected = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    cache, at, allocate = (
        PagedCache(model.config, kv_dtype=kv_dtype),
        At(n, pkv_hf.PoolAllocationError),
        PagePool._allocate,
    )
    with monkeypatch.context() as patch:
        patch.setattr(PagePool, "_allocate", lambda *args: at() or allocate(*args))
        with pytest.raises(pkv_hf.PoolAllocationError, match="now"):
            model.generate(**inputs, max_new_tokens=40, do_sample=False, **{CACHE: cache})
    length = cache.get_seq_length()
    assert {layer.length for layer in cache.layers} == {length}
    assert (length > 0) == (n > tensors)
    ids = expected[:, : max(length + 1, 20)]
    rest = model.generate(ids, **{CACHE: cache}, max_new_tokens=60 - ids.shape[1], do_sample=False)
    assert torch.equal(rest, expected)


def test_calls_of_every_kind_leave_nothing_behind():
    calls = leaks.Calls(secrets.randbits(31), "cpu")
    for _ in range(10):
        calls()
    before = calls.held()
    for _ in range(40):
        calls()
    after = calls.held()
    assert (after.caches, after.steps, after.graphs) == (0, 0, 0)
    assert after.grown(before) == {}


def test_what_stays_behind_is_seen():
    calls = leaks.Calls(0, "cpu")
    before = calls.held()
    kept = pkv_hf.PagedCache(calls.models[0].config)
    with open(__file__):
        assert set(calls.held().grown(before)) == {"caches", "open_files"}
    del kept


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, (ValueError, RuntimeError)),
        ({"input_ids": torch.zeros(0, 5, dtype=torch.long)}, (ValueError, RuntimeError, IndexError)),
        ({"input_ids": torch.tensor([[5, 999]])}, IndexError),
        ({"max_new_tokens": 0}, ValueError),
        ({"max_new_tokens": -3}, ValueError),
        ({"attention_mask": torch.ones(1, 3, dtype=torch.long)}, (ValueError, RuntimeError)),
    ],
    ids=["empty prompt", "batch 0", "id out of range", "no tokens", "negative tokens", "short mask"],
)
def test_bad_calls_fail_as_unpatched_ones_do_and_leave_nothing(change, error):
    model = tiny("llama")
    call = {"input_ids": torch.tensor([[5, 6]]), "max_new_tokens": 4, "do_sample": False, **change}
    outcomes = []
    for patch in (False, True):
        if patch:
            pkv_hf.patch(model)
        try:
            outcomes.append(model.generate(**call))
        except error as raised:
            outcomes.append(type(raised))
    if isinstance(outcomes[0], torch.Tensor):
        assert torch.equal(*outcomes)
    else:
        assert outcomes[0] is outcomes[1]
    assert live_caches() == 0
    good = left_padded(9)
    found = model.generate(**good, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, pkv_hf.unpatch(model).generate(**good, max_new_tokens=4, do_sample=False))


@torch.no_grad()
@pytest.mark.parametrize("where", ["layer", "pages"])
def test_a_static_step_that_fails_leaves_the_cache_as_it_was(where, monkeypatch):
    """In its last layer, when the others have appended, or when one of two kinds of layers has its new page."""

    def step(end):
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, end - 31, dtype=torch.long)], dim=1)
        positions = mask.sum(dim=1, keepdim=True) - 1
        return model(ids[:, end - 32, None], attention_mask=mask, position_ids=positions, **{CACHE: cache}).logits

    def layer_fails(*args):
        at()
        return rope_attend(*args)

    def pages_fail(table, begin, end):
        if table.window and end == 33:
            at()
        prepare(table, begin, end)

    model, inputs = pkv_hf.patch(tiny("qwen2-windows", num_hidden_layers=2), route="split"), left_padded(31, 20)
    ids, rope_attend, prepare = torch.tensor([[5, 6, 7], [8, 9, 10]]), Split.rope_attend, BlockTable.prepare
    logits = []
    for fails in (False, True):
        cache = PagedCache(model.config)
        model(**inputs, **{CACHE: cache})
        logits.append([step(32)])
        if fails:
            before, at = cache.memory(), At(2 if where == "layer" else 1, RuntimeError)
            with monkeypatch.context() as patch:
                patch.setattr(Split, "rope_attend", layer_fails if where == "layer" else rope_attend)
                patch.setattr(BlockTable, "prepare", pages_fail if where == "pages" else prepare)
                with pytest.raises(RuntimeError, match="now"):
                    step(33)
            assert {layer.length for layer in cache.layers} == {32}
            assert cache.memory().pages_in_use == before.pages_in_use
            assert cache.step is None
        logits[-1] += [step(33), step(34)]
        assert cache.static_steps
    for expected, found in zip(*logits):
        assert torch.equal(found, expected)


@torch.no_grad()
def test_padding_of_an_earlier_call_stays_masked():
    """Where a later mask unmasks it, and where there is none."""
    model, inputs, token = tiny("llama"), left_padded(20, 9), torch.full((2, 1), 5)
    whole = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
    positions = whole.sum(dim=1, keepdim=True) - 1
    logits = []
    with pkv_hf.patched(model):
        for mask in (whole, torch.ones_like(whole), None):
            cache = PagedCache(model.config)
            model(**inputs, **{CACHE: cache})
            logits.append(model(token, attention_mask=mask, position_ids=positions, **{CACHE: cache}).logits)
        said = pkv_hf.report(model).left
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert ["unmasks padding" in said[0], "no attention_mask" in said[1]] == [True, True]


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.5, 2, 7])
def test_masks_that_are_not_0_and_1_count_as_transformers_counts_them(scale):
    model, inputs = tiny("llama"), left_padded(20, 9)
    mask = inputs["attention_mask"] * scale
    expected = model(inputs["input_ids"], attention_mask=mask).logits
    with pkv_hf.patched(model):
        found = model(inputs["input_ids"], attention_mask=mask, **{CACHE: PagedCache(model.config)}).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("route", ROUTES)
def test_positions_that_jump_are_taken_as_they_are(route):
    """In a prompt, and in steps of a token each."""
    model, ids = tiny("llama"), left_padded(20)["input_ids"]
    positions = torch.arange(20)[None] * 3 + 7
    expected = model(ids, position_ids=positions).logits
    with pkv_hf.patched(model, route=route):
        cache = PagedCache(model.config)
        found = [
            model(ids[:, part], position_ids=positions[:, part], **{CACHE: cache}).logits
            for part in (slice(17), *(slice(i, i + 1) for i in range(17, 20)))
        ]
        assert pkv_hf.report(model).route == route
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("route", ROUTES)
def test_weights_of_nan_give_what_transformers_gives(route):
    model, inputs = tiny("llama"), left_padded(20)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] = float("nan")
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    with pkv_hf.patched(model, route=route):
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), expected)
