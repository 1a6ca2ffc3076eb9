"""Linear-attention states beside pages: as transformers' own cache has them, and what that does not do."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from hybrid import states
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from invariants import Interrupt
from pkv_hf import PagedCache
from pkv_hf.cache import paged as paged_module

pytestmark = pytest.mark.contract

KINDS = ["linear_attention", "full_attention", "sliding_attention", "hybrid", "hybrid_sliding", "moe"]
SETTINGS = {"sliding_window": 24, "number_of_conv_states": 2}
CONFIG = LlamaConfig(num_hidden_layers=6, layer_types=KINDS, **SETTINGS)
WITHOUT_EMPTY = LlamaConfig(num_hidden_layers=5, layer_types=KINDS[:5], **SETTINGS)
LINEAR, PAGED, NEITHER = (0, 3, 4), (1, 2, 3, 4), 5
HEADS, DIM, WIDTH, KERNEL = 2, 6, 5, 4


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def appended(cache, rows, tokens, seed, recurrent=True, layers=range(6)):
    """What a model's layers do to a cache, one after the other; what comes back of it."""
    found = []
    for i in layers:
        if i in LINEAR:
            for state in range(2):
                conv = drawn(rows, WIDTH, tokens, seed=seed + 10 * i + state)
                found.append(cache.update_conv_state(conv, i, state_idx=state, conv_kernel_size=KERNEL))
                if recurrent:
                    new = drawn(rows, HEADS, 3, 3, seed=seed + 10 * i + state + 5)
                    found.append(cache.update_recurrent_state(new, i, state_idx=state))
        if i in PAGED:
            found += cache.update(*drawn(2, rows, HEADS, tokens, DIM, seed=seed + i), i)
    return [tensor.clone() for tensor in found]


def asked(cache):
    """Everything that models and generate() ask of a cache, by question."""
    answers = {}

    def ask(name, *args):
        if not hasattr(DynamicCache, name):
            return
        try:
            answer = getattr(cache, name)
            answer = answer(*args) if callable(answer) else answer
        except (ValueError, AttributeError, TypeError, IndexError) as error:
            answer = type(error)
        answers[name, args] = answer.clone() if isinstance(answer, torch.Tensor) else answer

    for i in range(6):
        for name in ("get_seq_length", "get_query_offset", "has_previous_state", "is_recording_past"):
            ask(name, i)
        for state in range(2):
            for name in ("get_conv_state", "get_recurrent_state", "has_previous_state"):
                ask(name, i, state)
        ask("get_mask_sizes", 3, i)
        ask("get_max_length", i)
    for name in ("get_seq_length", "has_previous_state", "get_max_length", "is_sliding", "is_dummy", "is_croppable",
                 "is_compileable", "is_initialized", "__len__"):  # fmt: skip
        ask(name)
    if hasattr(DynamicCache, "is_dummy"):  # before, layers of both kinds counted by their class, one of them wrongly
        ask("is_linear")
    return answers


def equal(ours, theirs):
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return torch.equal(ours, theirs)
    return ours == theirs


def assert_same(paged, dense):
    ours, theirs = asked(paged), asked(dense)
    assert not [(key, ours[key], theirs[key]) for key in theirs if not equal(ours[key], theirs[key])]
    for mine, its in zip(paged.layers, dense.layers, strict=True):
        for of in (CacheLayerMixin, LinearAttentionCacheLayerMixin):
            assert isinstance(mine, of) == isinstance(its, of)
    assert all(map(torch.equal, states(paged), states(dense)))


def both(recurrent=True, config=CONFIG):
    """A paged cache and transformers' own, after the same tokens."""
    caches = PagedCache(config), DynamicCache(config=config)
    for cache in caches:
        appended(cache, 2, 30, 1, recurrent)
    return caches


@pytest.mark.parametrize("recurrent", [True, False])
def test_every_call_is_answered_as_a_dynamic_cache_answers_it(recurrent):
    paged, dense = PagedCache(CONFIG), DynamicCache(config=CONFIG)
    assert_same(paged, dense)
    for step, tokens in enumerate((2, 7, 1, 30, 1)):
        ours, theirs = (appended(cache, 2, tokens, 100 * step, recurrent) for cache in (paged, dense))
        assert all(map(torch.equal, ours, theirs))
        assert_same(paged, dense)
    for cache in (paged, dense):
        cache.reorder_cache(torch.tensor([1, 0]))
    assert_same(paged, dense)
    assert all(map(torch.equal, *(appended(cache, 2, 1, 7) for cache in (paged, dense))))
    paged.activate_past_recording()
    dense.activate_past_recording()
    assert_same(paged, dense)
    with pytest.raises((AttributeError, NotImplementedError)):
        paged.update(*torch.zeros(2, 2, 1, 1, 1), NEITHER)


@pytest.mark.parametrize("tokens", [1, 3])
def test_convolutions_are_cropped_with_the_pages(tokens):
    paged, dense = both(False, WITHOUT_EMPTY)  # older releases take layers of nothing for those of states, and fail
    before = [tensor.clone() for tensor in states(paged)]
    for cache in (paged, dense):
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            cache.crop(-tokens)
    assert paged.get_seq_length() == 30
    assert all(map(torch.equal, states(paged), before))
    for cache in (paged, dense):
        cache.activate_past_recording()
        appended(cache, 2, 5, 3, recurrent=False)
        cache.crop(-tokens)
    assert_same(paged, dense)
    assert all(map(torch.equal, *(appended(cache, 2, 4, 4, recurrent=False) for cache in (paged, dense))))


def test_recurrent_states_are_not_cropped():
    paged, _ = both()
    paged.activate_past_recording()
    appended(paged, 2, 5, 3)
    before = [tensor.clone() for tensor in states(paged)]
    with pytest.raises(RuntimeError, match=r"tokens_to_remove=-2 .* fork\(\)"):
        paged.crop(-2)
    with pytest.raises(RuntimeError, match=r"length=10 .* fork\(\)"):
        paged.truncate(10)
    assert paged.get_seq_length() == 35
    assert all(map(torch.equal, states(paged), before))
    paged.crop(-35)
    assert not states(paged)
    appended(paged, 3, 4, 1)


def test_rows_take_their_states_along():
    paged, _ = both()
    before = [tensor.clone() for tensor in states(paged)]
    paged.batch_repeat_interleave(3)
    assert all(map(torch.equal, states(paged), (tensor.repeat_interleave(3, dim=0) for tensor in before)))
    paged.batch_select_indices(torch.tensor([5, 0]))
    assert all(map(torch.equal, states(paged), (tensor[[1, 0]] for tensor in before)))
    paged.batch_select_indices(torch.tensor([False, True]))
    assert all(map(torch.equal, states(paged), (tensor[:1] for tensor in before)))
    with pytest.raises(IndexError, match="from 1 to 1"):
        paged.batch_select_indices(torch.tensor([1]))
    assert all(map(torch.equal, states(paged), (tensor[:1] for tensor in before)))
    appended(paged, 1, 2, 9)


def test_reordered_states_stay_where_graphs_read_them():
    paged, _ = both()
    places, before = [x.data_ptr() for x in states(paged)], [x.clone() for x in states(paged)]
    paged.reorder_cache(torch.tensor([-1, 0]))
    assert [tensor.data_ptr() for tensor in states(paged)] == places
    assert all(map(torch.equal, states(paged), (tensor[[1, 0]] for tensor in before)))


class OnGpu(torch.Tensor):
    """Says so, and is on the CPU."""

    is_cuda = True


def test_states_change_places_at_once_and_pages_when_they_are_asked_for(monkeypatch):
    class Later:
        def __init__(self, rows):
            self.rows = rows.numpy

    monkeypatch.setattr(paged_module, "Reordering", Later)
    paged, dense = both()
    places = [tensor.data_ptr() for tensor in states(paged)]
    paged.reorder_cache(torch.tensor([1, 0]).as_subclass(OnGpu))
    dense.reorder_cache(torch.tensor([1, 0]))
    assert paged._tables.reordering is not None
    assert all(map(torch.equal, states(paged), states(dense)))
    assert [tensor.data_ptr() for tensor in states(paged)] == places
    assert all(map(torch.equal, *(appended(cache, 2, 2, 7) for cache in (paged, dense))))


def test_states_of_inference_mode_go_on_outside():
    paged = PagedCache(CONFIG)
    with torch.inference_mode():
        appended(paged, 2, 5, 1)
        fork = paged.fork()
        fork.batch_repeat_interleave(2)
    appended(paged, 2, 1, 2)
    appended(fork, 4, 1, 2)


def test_a_reset_cache_takes_other_rows():
    paged, _ = both()
    paged.reset()
    assert not states(paged)
    fresh = PagedCache(CONFIG)
    assert all(map(torch.equal, *(appended(cache, 3, 2, 5) for cache in (paged, fresh))))
    assert all(map(torch.equal, states(paged), states(fresh)))


@pytest.mark.parametrize("way", [PagedCache.fork, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_goes_on_by_itself(way):
    paged, dense = both()
    other = way(paged)
    assert all(map(torch.equal, states(other), states(paged)))
    appended(other, 2, 3, 20)
    ours, theirs = (appended(cache, 2, 3, 30) for cache in (paged, dense))
    assert all(map(torch.equal, ours, theirs))
    assert_same(paged, dense)
    appended(dense, 2, 1, 40)
    appended(paged, 2, 1, 40)
    assert_same(paged, dense)


@pytest.mark.parametrize("layer_idx", PAGED)
def test_a_paged_layer_alone_is_not_copied(layer_idx):
    paged, _ = both()
    with pytest.raises(NotImplementedError, match=r"copy\.deepcopy\(\) the cache"):
        copy.deepcopy(paged.layers[layer_idx])
    paged, layer = copy.deepcopy([paged, paged.layers[layer_idx]])
    assert paged.layers[layer_idx] is layer


def test_memory_counts_states():
    paged, dense = both()
    of_states, memory = sum(tensor.nbytes for tensor in states(dense)), paged.memory()
    pools = sum(table.pool.nbytes for table in paged.tables.values())
    assert memory.held_bytes == pools + of_states > pools
    first_visible = {0: 0, 24: 30 - 24 + 1}
    tokens = sum(2 * (30 - first_visible[paged.layers[i].window]) for i in PAGED)
    assert memory.live_bytes == of_states + tokens * 2 * HEADS * DIM * 4


def test_a_cache_is_gone_with_its_last_name():
    paged, _ = both()
    held = [weakref.ref(paged), *map(weakref.ref, states(paged))]
    gc.disable()
    try:
        del paged
        assert not [ref for ref in held if ref() is not None]
    finally:
        gc.enable()


OPERATIONS = {
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "crop": lambda cache: cache.crop(-2),
    "reset": lambda cache: cache.reset(),
    "fork": lambda cache: cache.fork() and None,
}


def seen(cache):
    paged = [(layer.length, layer.keys, layer.values) for layer in cache.paged_layers]
    tensors = [x if x is None else x.clone() for _, *both in paged for x in both] + [x.clone() for x in states(cache)]
    return [length for length, *_ in paged], tensors


def same(ours, theirs):
    return (
        ours[0] == theirs[0]
        and len(ours[1]) == len(theirs[1])
        and all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(ours[1], theirs[1]))
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_interrupted_operation_has_happened_or_has_not_to_states_as_to_pages(name):
    def prepared():
        cache = PagedCache(CONFIG)
        if name == "crop":
            cache.activate_past_recording()
        appended(cache, 2, 9, 1, recurrent=name != "crop", layers=(0, 1, 4))
        return cache

    cache = prepared()
    before = seen(cache)
    with Interrupt() as whole:
        OPERATIONS[name](cache)
    after = seen(cache)
    assert same(before, after) == (name == "fork")
    for n in whole.places():
        cache = prepared()
        with pytest.raises(KeyboardInterrupt), Interrupt(n):
            OPERATIONS[name](cache)
        found = seen(cache)
        assert same(found, before) or same(found, after), n
        if same(found, before):
            OPERATIONS[name](cache)
        assert same(seen(cache), after), n


def test_rows_that_begin_have_no_states_of_others():
    cache = PagedCache(CONFIG)
    appended(cache, 2, 3, 1, layers=(0,))
    cache.start(3, np.zeros(3, dtype=np.int64))
    assert not states(cache)
    appended(cache, 3, 3, 1)
