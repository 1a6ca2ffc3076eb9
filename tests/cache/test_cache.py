"""PagedCache beside transformers' DynamicCache: the same contents after the same calls, every page accounted for."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig

import pkv_hf
from pkv_hf import PagedCache
from pkv_hf.cache import pool
from pkv_hf.cache.pool import PageAllocator, PagePool
from pkv_hf.cache.table import BlockTable
from pkv_hf.compat import CACHE
from tiny import COMMON, tiny

pytestmark = pytest.mark.contract

HEADS, DIM, LAYERS = COMMON["num_key_value_heads"], 16, COMMON["num_hidden_layers"]
WINDOW = 24


def config(window: int = 0):
    return MistralConfig(**COMMON, sliding_window=window) if window else LlamaConfig(**COMMON)


def states(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, HEADS, length, DIM), torch.randn(rows, HEADS, length, DIM)


def append(length: int, rows: int, *caches) -> None:
    for layer in range(LAYERS):
        k, v = states(rows, length)
        results = [cache.update(k, v, layer) for cache in caches]
        for other in results[1:]:
            for ours, theirs in zip(other, results[0]):
                assert torch.equal(ours, theirs)


def assert_same(paged: PagedCache, dynamic: DynamicCache) -> None:
    assert paged.get_seq_length() == dynamic.get_seq_length()
    assert paged.get_query_offset() == dynamic.get_query_offset()
    assert paged.is_sliding == dynamic.is_sliding
    assert paged.get_max_length() == dynamic.get_max_length()
    for layer in range(LAYERS):
        assert paged.get_mask_sizes(3, layer) == dynamic.get_mask_sizes(3, layer)
        assert torch.equal(paged.layers[layer].keys, dynamic.layers[layer].keys)
        assert torch.equal(paged.layers[layer].values, dynamic.layers[layer].values)
    assert_consistent(paged)


def assert_consistent(*caches: PagedCache) -> None:
    """Reference counts are the number of table entries that name a page, over all caches on a pool."""
    for window, table in caches[0].tables.items():
        counts = np.zeros_like(table.pool.allocator.refcounts)
        for cache in caches:
            assert cache.tables[window].pool is table.pool
            np.add.at(counts, cache.tables[window].pages, 1)
        assert (counts[1:] == table.pool.allocator.refcounts[1:]).all()


@pytest.mark.parametrize("window", [0, WINDOW])
@pytest.mark.parametrize("page_size", [16, 32])
@pytest.mark.parametrize("max_length", [None, 100])
@pytest.mark.parametrize("first", [1, 5, 16, 33, 100])
def test_appending_gives_what_dynamic_cache_gives(window, page_size, max_length, first):
    paged = PagedCache(config(window), page_size=page_size, max_length=max_length)
    dynamic = DynamicCache(config=config(window))
    for length in (first, 1, 1, 17, 1, 40):
        append(length, 2, dynamic, paged)
        assert_same(paged, dynamic)


@pytest.mark.parametrize("window", [0, WINDOW])
def test_rows_are_reordered_repeated_and_selected(window):
    paged, dynamic = PagedCache(config(window)), DynamicCache(config=config(window))
    append(20, 3, dynamic, paged)
    for change in (
        lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([5, 0, 3, 3])),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0, 3, 2])),
    ):
        change(paged)
        change(dynamic)
        assert_same(paged, dynamic)
        append(13, dynamic.layers[0].keys.shape[0], dynamic, paged)
        assert_same(paged, dynamic)


@pytest.mark.parametrize("window", [0, WINDOW])
def test_crop_goes_back(window):
    paged, dynamic = PagedCache(config(window)), DynamicCache(config=config(window))
    append(30, 2, dynamic, paged)
    for cache in (paged, dynamic):
        cache.activate_past_recording()
    for removed in (0, 3, 16):
        append(20, 2, dynamic, paged)
        for cache in (paged, dynamic):
            cache.crop(-removed)
        assert_same(paged, dynamic)
    in_use = paged.memory().pages_in_use
    append(64, 2, dynamic, paged)
    paged.crop(-64)
    assert paged.memory().pages_in_use == in_use


@pytest.mark.parametrize("reserved", [None, 64])  # pages that stay, also where the padding now ends before them
def test_a_crop_into_padding_ends_it_there(reserved):
    paged = PagedCache(config(), max_length=reserved)
    paged.start(2, np.array([0, 40]))
    append(50, 2, paged)
    paged.crop(-45)
    assert paged.pads.tolist() == [0, 5]
    assert not paged.layers[0].keys[1].any()
    k, v = states(2, 10)
    for layer in range(LAYERS):
        keys, values = paged.update(k, v, layer)
        assert torch.equal(keys[:, :, 5:], k)
        assert torch.equal(values[:, :, 5:], v)
        assert not keys[1, :, :5].any()  # a page that nothing was in holds no NaN of its memory's past
        assert not values[1, :, :5].any()
    assert_consistent(paged)


def test_crop_refuses_what_it_cannot_do():
    paged = PagedCache(config(WINDOW))
    append(60, 1, paged)
    with pytest.raises(ValueError, match="tokens_to_remove=3"):
        paged.crop(3)
    with pytest.raises(ValueError, match="holds 60"):
        paged.crop(-61)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        paged.crop(-30)
    assert paged.get_seq_length() == 60
    assert_consistent(paged)


@pytest.mark.parametrize("window", [0, WINDOW])
def test_fork_shares_pages_until_one_side_writes(window):
    base = PagedCache(config(window))
    append(37, 2, base)
    before = base.memory()
    twin = base.fork()
    assert twin.memory().pages_in_use == before.pages_in_use == twin.memory().pages_shared
    held = [layer.keys.clone() for layer in base.layers]
    append(3, 2, twin)
    for layer, keys in zip(base.layers, held):
        assert torch.equal(layer.keys, keys)
    assert_consistent(base, twin)
    assert base.memory().pages_shared < before.pages_in_use  # the last page of each row was copied
    dynamic = DynamicCache(config=config(window))
    for layer, ours in enumerate(base.layers):
        dynamic.update(ours.keys.clone(), ours.values.clone(), layer)
    for layer in range(LAYERS):
        k, v = states(2, 5)
        assert torch.equal(base.update(k, v, layer)[0], dynamic.update(k, v, layer)[0])
    del twin
    assert base.memory().pages_shared == 0
    assert_consistent(base)


def test_deepcopy_is_independent():
    base = PagedCache(config())
    append(20, 2, base)
    twin = copy.deepcopy(base)
    append(5, 2, twin)
    assert (base.get_seq_length(), twin.get_seq_length()) == (20, 25)
    assert twin.tables[0].pool is not base.tables[0].pool
    assert torch.equal(twin.layers[1].keys[:, :, :20], base.layers[1].keys)


def test_reset_returns_pages_and_takes_another_batch():
    paged, dynamic = PagedCache(config()), DynamicCache(config=config())
    append(40, 4, paged)
    paged.reset()
    assert paged.memory().pages_in_use == 0
    append(10, 2, dynamic, paged)
    assert_same(paged, dynamic)


def test_pages_of_a_window_stay_few():
    paged = PagedCache(config(WINDOW))
    append(500, 1, paged)
    for _ in range(300):
        append(1, 1, paged)
        assert paged.memory().pages_in_use <= 3


def test_growth_is_by_a_factor():
    paged = PagedCache(config())
    append(16, 1, paged)
    sizes = {paged.memory().held_bytes}
    for _ in range(1000):
        append(1, 1, paged)
        sizes.add(paged.memory().held_bytes)
    assert len(sizes) < 25


def test_memory_counts_bytes():
    paged = PagedCache(config(), max_length=64)
    append(20, 2, paged)
    memory = paged.memory()
    token = LAYERS * 2 * HEADS * DIM * 4
    assert memory.live_bytes == 40 * token
    assert memory.held_bytes == (8 + 1) * 16 * token  # 4 pages a row, and the null page
    assert (memory.pages_in_use, memory.pages_free, memory.pages_shared) == (8, 0, 0)


def test_kv_dtype_is_that_of_the_pages():
    paged = PagedCache(config(), kv_dtype=torch.bfloat16)
    append(20, 1, paged)
    assert paged.layers[0].keys.dtype == torch.bfloat16
    k, _ = paged.update(*states(1, 1), 0)
    assert k.dtype == torch.float32


def test_gradients_reach_the_new_states():
    paged = PagedCache(config())
    append(5, 1, paged)
    k, v = (state.requires_grad_() for state in states(1, 2))
    keys, values = paged.update(k, v, 0)
    (keys.sum() + values.sum()).backward()
    assert k.grad is not None
    assert torch.equal(k.grad, torch.ones_like(k))
    assert torch.equal(paged.layers[0].keys[:, :, 5:], k)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"page_size": 8}, "page_size=8"),
        ({"page_size": 48}, "page_size=48"),
        ({"page_size": 512}, "page_size=512"),
        ({"max_length": 0}, "max_length=0"),
        ({"max_length": 2.5}, "max_length=2.5"),
        ({"kv_dtype": torch.int16}, "kv_dtype=torch.int16"),
        ({"kv_dtype": "int4"}, "kv_dtype='int4'"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        PagedCache(config(), **arguments)


def test_a_batch_that_does_not_fit_is_named():
    paged = PagedCache(config())
    append(5, 2, paged)
    with pytest.raises(ValueError, match=r"batch 3.*2 rows"):
        paged.update(*states(3, 1), 0)
    with pytest.raises(IndexError, match="2 rows"):
        paged.batch_select_indices(torch.tensor([0, 2]))
    assert_consistent(paged)


def test_a_pool_that_does_not_fit_says_how_much_it_wanted_and_leaves_nothing_behind(monkeypatch):
    model = tiny("llama")
    paged = PagedCache(model.config, max_length=100)
    pkv_hf.patch(model)
    monkeypatch.setattr(pool, "free_bytes", lambda device: 1000)
    with (
        torch.no_grad(),
        pytest.raises(torch.OutOfMemoryError, match=r"wanted [\d,]+ bytes on cpu, where [\d,]+ bytes"),
    ):
        model(torch.ones(1, 3, dtype=torch.long), **{CACHE: paged})
    memory = paged.memory()
    assert (memory.pages_in_use, memory.held_bytes, paged.get_seq_length()) == (0, 0, 0)
    monkeypatch.undo()
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.long), **{CACHE: paged})
    assert paged.get_seq_length() == 3


def test_a_table_seen_in_inference_mode_is_kept_up_to_date_outside():
    cache, device = PagedCache(tiny("llama").config), torch.device("cpu")
    (table,) = cache.tables.values()
    states = torch.zeros(1, 2, 40, 16)
    with torch.inference_mode():
        cache.update(states, states, 0)
        before = table.on(device)[0]
        assert before.tolist() == table.pages.tolist()
    table.shrink(20)
    assert table.on(device)[0] is before
    assert before.tolist() == [[*table.pages[0], 0]]


def test_pages_are_taken_as_one_run_where_there_is_one():
    """Which torch reads as one view, without a copy."""
    allocator, holder = PageAllocator(), BlockTable(PagePool(16, 1))
    allocator.grow(9)
    allocator.holders.add(holder)

    def hold(*pages):
        holder.pages = np.array(pages)
        allocator.changed()

    hold(1, 3, 4, 8)
    assert allocator.alloc(3).tolist() == [5, 6, 7]
    hold(1, 3, 4, 8)
    assert allocator.alloc(1, after=5).tolist() == [6]
    assert allocator.alloc(4).tolist() == [2, 5, 7, 9]  # there is none of four
    assert allocator.free == 0


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_fork_holds_no_page_for_the_others(way):
    cache = PagedCache(config())
    append(20, 2, cache)
    fork = cache.fork()
    append(3, 2, fork)
    twin = way(fork)
    for ours, theirs in zip(twin.layers, fork.layers):
        assert torch.equal(ours.keys, theirs.keys)
    twin.reset()
    memory = twin.memory()
    assert (memory.pages_in_use, memory.pages_shared) == (0, 0)
    assert all(table.pool.allocator.free == table.pool.allocator.capacity for table in twin.tables.values())
    append(40, 3, twin)
    append(1, 2, cache)
    append(1, 2, fork)


def test_a_cache_that_is_initialized_before_its_first_tokens():
    cache, filled = PagedCache(config()), PagedCache(config())
    cache.early_initialization(2, HEADS, DIM, torch.float32, torch.device("cpu"))
    append(20, 2, cache, filled)
    assert cache.memory() == filled.memory()
    assert cache.memory().live_bytes > 0


def test_rows_that_begin_hold_no_token():
    cache = PagedCache(tiny("llama").config)
    for layer in range(3):
        cache.update(*torch.randn(2, 2, 2, 40, 16), layer)
    cache.start(3, np.zeros(3, dtype=np.int64))
    assert cache.get_seq_length() == 0
    assert cache.layers[0].keys is None
