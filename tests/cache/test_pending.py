"""What is still to be done to a cache's rows is seen by whoever looks at them; devices are named, never assumed."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

import pkv_hf
from pkv_hf import PagedCache
from pkv_hf.cache.pending import Reordering
from pkv_hf.compat import CACHE
from tiny import assert_on_pages, left_padded, tiny

pytestmark = pytest.mark.contract


class Later:
    """Stands for a `Reordering`, of rows that are on the CPU already."""

    def __init__(self, rows):
        self._rows = rows.numpy()

    def rows(self):
        return self._rows


@pytest.fixture
def pending(monkeypatch):
    """Reorderings are left for later, as those of a GPU are."""

    def reorder_cache(self, beam_idx):
        self._tables.settled()
        self._tables.reordering = Later(beam_idx)

    monkeypatch.setattr(PagedCache, "reorder_cache", reorder_cache)


def filled(rows=3):
    cache, states = PagedCache(tiny("qwen2-windows").config), torch.randn(rows, 2, 20, 16)
    for layer in range(3):
        cache.update(states, states, layer)
    return cache, states


LOOKS = {
    "keys": lambda cache: cache.layers[1].keys,
    "values": lambda cache: cache.layers[1].values,
    "dense": lambda cache: cache.layers[1].dense(0, 20)[0],
    "iterated": lambda cache: next(iter(cache))[0],
    "fork": lambda cache: cache.fork().layers[2].keys,
    "updated": lambda cache: cache.update(*[torch.zeros(3, 2, 1, 16)] * 2, 0)[0][:, :, :20],
}


@pytest.mark.parametrize("look", LOOKS)
def test_rows_have_changed_places_for_all_that_look(look, pending):
    cache, states = filled()
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert torch.equal(LOOKS[look](cache), states[[2, 2, 0]])


def test_assignments_come_after_the_reordering_before_them(pending):
    cache, states = filled()
    full = next(layer for layer in cache.layers if not layer.is_sliding)
    cache.reorder_cache(torch.tensor([2, 1, 0]))
    full.keys = torch.zeros_like(states)
    cache.reorder_cache(torch.tensor([1, 1, 2]))
    assert not full.keys.any()
    assert torch.equal(full.values, states[[1, 1, 0]])


def test_rows_that_are_not_there_are_named_once(pending):
    cache, states = filled()
    cache.reorder_cache(torch.tensor([2, 1, 3]))
    with pytest.raises(IndexError, match="do not fit a cache of 3 rows"):
        cache.fork()
    assert torch.equal(cache.layers[0].keys, states)


def test_a_cache_goes_with_its_last_reference():
    """Without a collection: nothing of it is in a cycle."""
    cache, _ = filled()
    cache.layers[0].keys.zero_()
    gone = [weakref.ref(thing) for thing in (cache, cache._tables, cache.tables[0], cache.tables[0].pool)]
    gc.disable()
    try:
        del cache
        assert [ref() for ref in gone] == [None] * 4
    finally:
        gc.enable()


@pytest.fixture
def no_default_device():
    """What names no device is made without storage."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("route", ["sdpa", "split"])
def test_every_tensor_of_generate_is_made_on_a_device_that_is_named(route, request):
    model, inputs = tiny("qwen2-windows"), left_padded(28, 9)
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    with pkv_hf.patched(model, route=route):
        request.getfixturevalue("no_default_device")
        found = model.generate(**inputs, **settings)
        assert_on_pages(model)
    assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize(("route", "kv_dtype"), [("sdpa", None), ("split", "int8")])
def test_every_tensor_of_beams_and_of_edits_is_made_on_a_device_that_is_named(route, kv_dtype, pending, request):
    """transformers' own beam search is not as careful."""
    model, inputs, results = tiny("qwen2-windows"), left_padded(28, 28), []
    tokens, order = torch.tensor([[5], [6]]), torch.tensor([1, 0])
    pkv_hf.patch(model, route=route, kv_dtype=kv_dtype)
    for _ in range(2):
        cache = PagedCache(model.config, kv_dtype=kv_dtype)
        model(inputs["input_ids"], **{CACHE: cache})
        for _ in range(3):
            cache.reorder_cache(order)
            for layer in cache.layers:
                layer.keys[:, :, -2:] *= 0.5
            full = next(layer for layer in cache.layers if not layer.is_sliding)
            full.values = full.values.flip(1)
            logits = model(tokens, **{CACHE: cache}).logits
        cache.crop(-1)
        results.append((logits, *(x for layer in cache.fork() for x in layer[:2])))
        if len(results) == 1:
            request.getfixturevalue("no_default_device")
    assert_on_pages(model)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_beams_on_their_way_from_a_gpu_are_pinned_on_the_host(monkeypatch, no_default_device):
    made, empty = [], torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *sizes, pin_memory, **rest: made.append(pin_memory) or empty(*sizes, **rest)
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=lambda: event))
    event = SimpleNamespace(synchronize=lambda: made.append("waited"))
    reordering = Reordering(torch.tensor([1, 0], device="cpu"))
    assert made == [True]
    assert reordering.rows().tolist() == [1, 0]
    assert made == [True, "waited"]
