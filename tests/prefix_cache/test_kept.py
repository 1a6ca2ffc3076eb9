"""What is kept of prompts: within its budget, the least recently used out first, and given back."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

import pkv_hf
from pkv_hf.runtime.prefix_cache.blocks import Blocks
from pkv_hf.runtime.prefix_cache.kept import Rows
from pkv_hf.runtime.prefix_cache.prompts import Answered
from pkv_hf.runtime.prefix_cache.tree import Tree
from tiny import one, padded, prefix_use, tokens, with_prefix_cache

PAGE = 16 * 2 * 2 * 16 * 4 * 3
"""Bytes of one page of the tiny models: tokens, K and V, heads, elements, float32, layers."""


@pytest.mark.parametrize("budget", [PAGE - 1, PAGE, 2 * PAGE, 5 * PAGE + 7, 100 * PAGE, "1MiB"])
def test_no_more_is_held_than_the_budget(budget, same):
    model, twin = with_prefix_cache("llama", budget=budget)
    for n in range(8):
        same(model, twin, one(tokens(70, n % 3), [n]), max_new_tokens=2)
        same(model, twin, padded(tokens(40, n), tokens(20, 3)), max_new_tokens=2)
        assert prefix_use(model).nbytes <= prefix_use(model).budget
    assert (prefix_use(model).nbytes == 0) == (budget == PAGE - 1)
    assert (prefix_use(model).hits > 0) == (budget != PAGE - 1)
    reasons = [reason for reason in prefix_use(model).not_cached if "prefix_cache=" in reason]
    assert bool(reasons) == (not isinstance(budget, str) and budget < 4 * PAGE)


def test_the_least_recently_used_goes_first(same):
    model, twin = with_prefix_cache("llama", budget=4 * PAGE)
    first, second, third = ([*tokens(32, seed), 5] for seed in (1, 2, 3))
    for prompt in (first, second, first, third):  # third takes the place of second
        same(model, twin, one(prompt), max_new_tokens=2)
    hits = prefix_use(model).hits
    assert hits == 1
    same(model, twin, one(first), max_new_tokens=2)
    assert prefix_use(model).hits == hits + 1
    same(model, twin, one(third), max_new_tokens=2)
    assert prefix_use(model).hits == hits + 2
    same(model, twin, one(second), max_new_tokens=2)
    assert prefix_use(model).hits == hits + 2


def test_the_end_of_a_prompt_goes_before_its_beginning(same):
    model, twin = with_prefix_cache("llama", budget=5 * PAGE)
    first, second = ([*tokens(48, seed), 5] for seed in (1, 2))
    for prompt in (first, second, first):
        same(model, twin, one(prompt), max_new_tokens=2, num_beams=2)  # whose answers are not kept
    assert prefix_use(model).tokens_saved == 32


def test_room_grows_up_to_the_budget(same):
    model, twin = with_prefix_cache("llama", budget=70 * PAGE)
    for n in range(12):
        same(model, twin, one(tokens(120, n)), max_new_tokens=1)
    assert prefix_use(model).nbytes == 70 * PAGE


def test_answers_are_kept_after_their_own_prompt_alone(same):
    model, twin = with_prefix_cache("llama")
    prompt, told = one(tokens(40, 1)), []
    keep = Answered.keep
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Answered, "keep", lambda self, ids: told.append((self, ids)))
        same(model, twin, prompt, max_new_tokens=30)
    ((answered, ids),) = told
    nodes = len(model._pkv_hf_state.prefix_cache._tree)
    keep(answered, (ids + 1) % 128)
    keep(answered, ids[:, :50])
    assert len(model._pkv_hf_state.prefix_cache._tree) == nodes
    keep(answered, ids)
    assert len(model._pkv_hf_state.prefix_cache._tree) == 69 // 16


def test_a_beginning_outlives_what_followed_it():
    tree = Tree()
    chain = []
    for block in range(3):
        chain.append(tree.add(chain[-1] if chain else None, b"%d" % block, block))
    tree.use(chain)
    assert [tree.evict(set()) for _ in range(4)] == [2, 1, 0, None]
    assert len(tree) == 0


def test_what_is_in_use_stays():
    tree = Tree()
    node = tree.add(None, b"a", 7)
    assert tree.evict({node}) is None
    assert tree.find([b"a", b"b"]) == [node]
    assert tree.find([b"b"]) == []


@pytest.mark.parametrize(
    ("pads", "hits", "expected"),
    [
        ((0,), (32,), (32, 8)),
        ((0,), (40,), (39, 1)),
        ((0,), (0,), (0, 40)),
        ((0, 10), (32, 16), (26, 28)),
        ((0, 30), (32, 0), (30, 20)),
        ((0, 39), (16, 0), (0, 41)),  # 48 would be computed: padding is
    ],
)
def test_where_a_prompt_goes_on(pads, hits, expected):
    rows = Rows(np.zeros((len(pads), 40), dtype=np.int64), np.array(pads))
    assert rows.computed(np.array(hits)) == expected


def test_keys_are_of_whole_blocks_and_of_what_they_were_computed_with():
    rows = Rows(np.arange(80).reshape(2, 40), np.array([0, 9]))
    assert [len(rows.keys(row, 16, b"")) for row in (0, 1)] == [2, 1]
    assert rows.keys(1, 16, b"") == [np.arange(49, 65).tobytes()]
    assert rows.keys(0, 16, b"x")[0] != rows.keys(0, 16, b"y")[0]
    assert rows.keys(0, 16, b"x")[1] == rows.keys(0, 16, b"y")[1]


def test_all_is_given_back(same):
    model, twin = with_prefix_cache("llama")
    for n in range(3):
        same(model, twin, one(tokens(64, 1), [n]))
    assert prefix_use(model).nbytes
    pkv_hf.clear_prefix_cache(model)
    assert prefix_use(model).nbytes == 0
    same(model, twin, one(tokens(64, 1)))
    blocks = model._pkv_hf_state.prefix_cache._blocks
    assert blocks.nbytes
    pkv_hf.unpatch(model)
    assert blocks.nbytes == 0
    held = weakref.ref(blocks)
    del blocks
    gc.collect()
    assert held() is None


def test_no_cache_is_held(same):
    """The pages of calls die with them, kept or not."""
    model, twin = with_prefix_cache("llama")
    for n in range(3):
        same(model, twin, one(tokens(64, 1), [n]))
        same(model, twin, padded(tokens(64, 1), tokens(50, 1)), num_beams=2)
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is pkv_hf.PagedCache]


def test_caches_of_other_pages_go_on_from_what_is_kept(same):
    """Blocks are of the patch's page size, whatever a caller's cache has."""
    model, twin = with_prefix_cache("llama")
    prompt = one(tokens(70, 1))
    expected = twin.generate(**prompt, max_new_tokens=4, do_sample=False)
    for page_size in (32, 16, 64):
        cache = pkv_hf.PagedCache(model.config, page_size=page_size)
        given = model.generate(**prompt, **{pkv_hf.compat.CACHE: cache}, max_new_tokens=4, do_sample=False)
        assert torch.equal(given, expected)
    assert prefix_use(model).hits == 2


def test_memory_that_runs_out_costs_what_was_kept_alone(same, monkeypatch):
    model, twin = with_prefix_cache("llama")
    same(model, twin, one(tokens(40, 1)))

    def runs_out(*_):
        raise torch.OutOfMemoryError("now")

    with monkeypatch.context() as patched:
        patched.setattr(Blocks, "read_from", runs_out)
        same(model, twin, one(tokens(40, 1), tokens(20, 2)))
    assert "memory ran out when pages were to be kept" in prefix_use(model).not_cached
    assert prefix_use(model).nbytes == 0
    for _ in range(2):
        same(model, twin, one(tokens(40, 1)))
    assert prefix_use(model).hits == 2


def test_room_that_cannot_be_made_is_done_without(same, monkeypatch):
    from pkv_hf.runtime.prefix_cache import blocks

    model, twin = with_prefix_cache("llama", budget="64MiB")
    same(model, twin, one(tokens(40, 1)), max_new_tokens=2)
    held, room = prefix_use(model).nbytes, blocks._room

    def runs_out(like, count, size):
        if count > blocks.FIRST:
            raise torch.OutOfMemoryError("now")
        return room(like, count, size)

    monkeypatch.setattr(blocks, "_room", runs_out)
    for n in range(20):
        same(model, twin, one(tokens(120, 1 + n % 11)), max_new_tokens=2)
    assert prefix_use(model).nbytes == held


def test_an_error_inside_a_call_leaves_what_is_right(same):
    model, twin = with_prefix_cache("llama")
    same(model, twin, one(tokens(40, 1)))
    hook = model.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(**one(tokens(40, 1), tokens(40, 2)), max_new_tokens=2)
    hook.remove()
    for _ in range(2):
        same(model, twin, one(tokens(40, 1), tokens(40, 2)))
    assert prefix_use(model).hits == 2


def test_what_is_no_size_leaves_the_patch_as_it_was():
    model, _ = with_prefix_cache("llama")
    with pytest.raises(ValueError, match="prefix_cache='0GiB' is no size: pass bytes, or '2GiB' say"):
        pkv_hf.patch(model, prefix_cache="0GiB")
    assert prefix_use(model).budget == 4 << 20
