"""A limit is not the use: what is reserved is what a call is likely to come to, as far as memory holds it."""

from __future__ import annotations

import pytest
import torch

import pkv_hf
from pkv_hf import PagedCache
from pkv_hf.cache import pool
from pkv_hf.compat import CACHE
from tiny import assert_on_pages, left_padded, tiny

pytestmark = pytest.mark.contract

ROUTES = ("sdpa", "split")


def generate(model, inputs, limit, **settings):
    settings = {"do_sample": False, "return_dict_in_generate": True, "max_new_tokens": limit, **settings}
    return model.generate(**inputs, **settings)


@pytest.mark.parametrize(("route", "limit"), [("sdpa", 10**8), ("sdpa", int(1e30)), ("split", 10**8)])
def test_a_limit_that_no_memory_holds_is_no_reason_to_fail(route, limit, monkeypatch):
    if route == "split":  # launches are sized for all that is likely, and interpreted
        monkeypatch.setattr(pool, "LIKELY", 100)
    model, inputs = tiny("llama"), left_padded(20)
    ends = {"eos_token_id": generate(model, inputs, 4).sequences[0, -1].item()}
    expected = generate(model, inputs, 60, **ends).sequences
    with pkv_hf.patched(model, route=route):
        output = generate(model, inputs, limit, **ends)
        assert torch.equal(output.sequences, expected)
        assert_on_pages(model)
    memory = output[CACHE].memory()
    most = -(-(20 + pool.LIKELY) // 16)
    assert memory.pages_in_use + memory.pages_free <= most
    (table,) = output[CACHE].tables.values()
    assert table.on(torch.device("cpu"))[0].shape[1] <= most


@pytest.mark.parametrize(
    ("route", "name", "settings"),
    [
        ("sdpa", "llama", {}),
        ("sdpa", "qwen2-windows", {}),
        ("sdpa", "llama", {"num_beams": 3}),
        ("split", "qwen2-windows", {}),
    ],
    ids=str,
)
def test_rows_grow_beyond_what_was_likely(route, name, settings, monkeypatch):
    monkeypatch.setattr(pool, "LIKELY", 2)
    model, inputs = tiny(name), left_padded(28, 9)
    expected = generate(model, inputs, 8, **settings).sequences
    with pkv_hf.patched(model, route=route):
        output = generate(model, inputs, 8, **settings)
        assert torch.equal(output.sequences, expected)
        assert_on_pages(model)
    assert {table.expected for table in output[CACHE].tables.values()} == {30}


@pytest.mark.parametrize(
    ("free_pages", "expected"),
    [(10**6, 120), (2 * 8, 120), (2 * 5, 20 + 100 // 2), (2 * 3, 20 + 100 // 4), (2 * 2, 20 + 100 // 8)],
)
def test_half_is_reserved_and_half_of_that_where_memory_is_short(free_pages, expected, monkeypatch):
    model, inputs = tiny("llama"), left_padded(20, 20)
    cache = PagedCache(model.config, max_length=120)
    page = 3 * 2 * 2 * 16 * 16 * 4  # layers, K and V, heads, tokens, head_dim, bytes
    with pkv_hf.patched(model), torch.no_grad():
        monkeypatch.setattr(pool, "free_bytes", lambda device: free_pages * page)
        model(**inputs, **{CACHE: cache})
    (table,) = cache.tables.values()
    assert (table.expected, table.reserved) == (expected, expected)
    assert (cache.memory().pages_in_use, cache.memory().pages_free) == (2 * -(-expected // 16), 0)
    assert None not in table.offsets()  # a run of pages for each row


def test_a_prompt_in_chunks_is_reserved_whole(monkeypatch):
    monkeypatch.setattr(pool, "LIKELY", 8)
    with pkv_hf.patched(tiny("llama")) as model:
        cache = generate(model, left_padded(60), 3, prefill_chunk_size=16)[CACHE]
        (table,) = cache.tables.values()
        assert table.expected == 60 + 2
        limited = generate(model, left_padded(60), 12, prefill_chunk_size=16)[CACHE]
    (table,) = limited.tables.values()
    assert table.expected == 60 + 8


def test_a_prompt_that_does_not_fit_is_out_of_memory(monkeypatch):
    model, inputs = tiny("llama"), left_padded(40, 40)
    page = 3 * 2 * 2 * 16 * 16 * 4
    with pkv_hf.patched(model), torch.no_grad():
        monkeypatch.setattr(pool, "free_bytes", lambda device: 5 * page)
        with pytest.raises(pkv_hf.PoolAllocationError, match="Lower max_new_tokens"):
            model(**inputs, **{CACHE: PagedCache(model.config, max_length=120)})


@pytest.mark.parametrize("route", ROUTES)
def test_tokens_are_the_same_where_half_is_reserved(route, monkeypatch):
    """Memory that was short for the prompt is there when rows grow."""
    model, inputs = tiny("llama"), left_padded(28)
    expected = generate(model, inputs, 8).sequences
    fits = []
    monkeypatch.setattr(pool.PagePool, "fits", lambda self, pages: fits.append(pages) or len(fits) > 2)
    with pkv_hf.patched(model, route=route):
        output = generate(model, inputs, 8)
        assert torch.equal(output.sequences, expected)
        assert_on_pages(model)
    (table,) = output[CACHE].tables.values()
    assert table.expected == 28 + 7 // 4


def test_rows_that_are_repeated_reserve_as_far_as_memory_holds_it(monkeypatch):
    cache, states = PagedCache(tiny("llama").config, max_length=200), torch.randn(2, 2, 20, 16)
    for layer in range(3):
        cache.update(states, states, layer)
    (table,) = cache.tables.values()
    monkeypatch.setattr(pool, "free_bytes", lambda device: 10 * table.pool.page_nbytes)
    cache.batch_repeat_interleave(4)
    assert table.reserved == 20 + 180 // 4
    for layer in range(3):
        assert torch.equal(cache.layers[layer].keys, states.repeat_interleave(4, dim=0))
