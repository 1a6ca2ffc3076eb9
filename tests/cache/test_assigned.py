"""Scripts that assign a layer's keys and values, edit them in place or iterate over a cache, as over a DynamicCache."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import pkv_hf
from invariants import check
from pkv_hf import PagedCache
from pkv_hf.compat import CACHE
from tiny import assert_on_pages, left_padded, tiny

pytestmark = pytest.mark.contract

CONFIG, WINDOWS = tiny("llama").config, tiny("qwen2-windows").config
LAYERS, HEADS, DIM = 3, 2, 16
PADS = np.array([0, 20])
KINDS = ("plain", "ragged", "forked", "repeated", "int8", "windows")


def states(rows, count):
    """Numbers that pages of 8 bits hold exactly, by a scale of 1."""
    numbers = torch.randint(-100, 100, (2, rows, HEADS, count, DIM)).float()
    numbers[..., 0] = 127
    return numbers


def append(count, *caches):
    for layer in range(LAYERS):
        k, v = states(2 if not caches[0].get_seq_length(LAYERS - 1) else len(caches[-1].layers[-1].keys), count)
        for cache in caches:
            cache.update(k, v, layer)


def made(kind):
    """A paged cache, a dense one that holds the same but for padding, and what else is on the pages."""
    config = WINDOWS if kind == "windows" else CONFIG
    paged, dense = PagedCache(config, kv_dtype="int8" if kind == "int8" else None), DynamicCache(config=config)
    if kind in ("ragged", "int8"):
        paged.start(2, PADS)
    append(40, paged, dense)
    others = [(paged.fork(), copy.deepcopy(dense))] if kind == "forked" else []
    if kind == "repeated":
        for cache in (paged, dense):
            cache.batch_repeat_interleave(2)
    if kind in ("ragged", "int8"):
        for layer in dense.layers:
            layer.keys[1, :, :16] = layer.values[1, :, :16] = 0  # the page of padding alone
    return paged, dense, others


def assert_same(paged, dense):
    assert paged.get_seq_length() == dense.get_seq_length()
    for ours, theirs in zip(paged, dense, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


def prune(cache):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, -16:], layer.values[:, :, -16:]


def lengthen(cache):
    for layer in cache.layers:
        layer.keys, layer.values = (torch.cat([x, x.flip(2)], dim=2) for x in (layer.keys, layer.values))


def one_row(cache):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[1:], layer.values[1:]


def one_layer(cache):
    cache.layers[1].keys = cache.layers[1].keys + 1
    cache.layers[1].values = cache.layers[1].values.flip(2)


def keys_alone(cache):
    cache.layers[2].keys = cache.layers[2].keys.flip(0)


def crop_layers(cache):
    for layer in cache.layers:
        layer.crop(-5)
        layer.batch_select_indices(torch.tensor([1, 0]))


def edit(cache):
    cache.layers[0].keys[:, :, 20:24] = 127
    cache.layers[2].values[:, :, 20:].clamp_(-50)
    cache.layers[2].values[1, :, -1].mul_(-1)


ASSIGNMENTS = (prune, lengthen, one_row, one_layer, keys_alone, crop_layers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [*ASSIGNMENTS, edit], ids=lambda change: change.__name__)
@pytest.mark.parametrize("inference", [False, True])
def test_changes_are_those_of_a_dynamic_cache(kind, change, inference):
    if (kind == "windows" and change is not edit) or (kind == "int8" and change is one_layer):
        return  # refused; and other numbers than 8 bits hold
    with torch.inference_mode(inference):
        paged, dense, others = made(kind)
        for cache in (paged, dense):
            change(cache)
        assert_same(paged, dense)  # before the cache is used
        assert_same(copy.deepcopy(paged), dense)
        for cache in (paged, dense):
            if change is not one_row:
                cache.reorder_cache(torch.arange(len(dense.layers[0].keys)).flip(0))
        append(5, paged, dense)
        assert_same(paged, dense)
        for cache in (paged, dense):
            cache.activate_past_recording()
        append(20, paged, dense)
        for cache in (paged, dense):
            cache.crop(-9)
        for ours, theirs in others:
            assert_same(ours, theirs)
        check(paged, *(ours for ours, _ in others))


def test_layers_that_are_not_assigned_keep_what_they_hold_at_their_length():
    paged, dense, _ = made("ragged")
    for cache in (paged, dense):
        cache.layers[1].keys, cache.layers[1].values = (x[:, :, 30:] for x in states(2, 40))
    assert [paged.get_seq_length(i) for i in range(3)] == [dense.get_seq_length(i) for i in range(3)] == [40, 10, 40]


def test_lengths_of_layers_follow_what_is_assigned():
    paged, dense, _ = made("forked")
    given = states(2, 10)
    for cache in (paged, dense):
        cache.layers[1].keys, cache.layers[1].values = given
    append(3, paged, dense)
    twin, other = paged.fork(), copy.deepcopy(dense)
    append(4, paged, dense)
    append(20, twin, other)
    for ours, theirs in ((paged, dense), (twin, other)):
        assert [ours.get_seq_length(i) for i in range(3)] == [theirs.get_seq_length(i) for i in range(3)]
        assert_same(ours, theirs)


def test_pads_end_with_an_assignment_and_stay_with_an_edit():
    paged, *_ = made("ragged")
    paged.layers[0].keys[:, :, 30] = 0
    assert paged.pads.tolist() == PADS.tolist()
    prune(paged)
    assert paged.pads.tolist() == [0, 0]
    assert paged.memory().pages_in_use == 2


@pytest.mark.parametrize("route", ["sdpa", "split"])
@pytest.mark.parametrize("lengths", [(40,), (40, 12)], ids=str)
def test_a_model_goes_on_from_what_was_assigned(route, lengths):
    inputs, results = left_padded(*lengths), []
    mask = torch.cat([inputs["attention_mask"][:, -23:], torch.ones(len(lengths), 1).long()], dim=1)

    def run(model):
        cache = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)[CACHE]
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, -23:], layer.values[:, :, -23:]
        cache.layers[1].values[:, :, -3:] *= 0.5
        with torch.no_grad():
            token = torch.full((len(lengths), 1), 5)
            return model(token, attention_mask=mask, position_ids=token + 50, **{CACHE: cache}).logits

    model = tiny("llama")
    results = [run(model)]
    with pkv_hf.patched(model, route=route):
        results.append(run(model))
        assert_on_pages(model)
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)


def test_an_edit_stays_with_the_rows_that_it_is_made_to():
    shared = pkv_hf.prefix(pkv_hf.patch(tiny("llama")), left_padded(40)["input_ids"])
    one, other = shared.cache(2), shared.cache(2)
    before = other.layers[0].keys.clone()
    one.layers[0].keys[1].zero_()
    assert one.tables is not None  # the next use
    assert not one.layers[0].keys[1].any()
    assert torch.equal(one.layers[0].keys[0], before[0])
    assert torch.equal(other.layers[0].keys, before)
    assert torch.equal(shared.cache(2).layers[0].keys, before)


def test_a_copy_that_nobody_edited_is_dropped_with_the_next_use():
    paged, *_ = made("int8")
    kept = paged.layers[0].keys
    assert paged.layers[0].keys is kept
    append(1, paged)
    assert not paged._tables.states
    assert paged.layers[0].keys.shape[2] == 41


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "keys is None"),
        (torch.zeros(2, 2, 5, 16, dtype=torch.long), r"keys is torch.int64 \[2, 2, 5, 16\]"),
        (torch.zeros(2, 5, 16), r"keys is torch.float32 \[2, 5, 16\]"),
        (torch.zeros(0, 2, 5, 16), r"keys is torch.float32 \[0, 2, 5, 16\]"),
        (torch.zeros(2, 3, 5, 16), "keys has 3 heads of 16, but the PagedCache holds 2 of 16"),
        (torch.zeros(2, 2, 5, 16, device="meta"), "keys is on meta, the layer's pages on cpu: move it"),
    ],
)
def test_what_no_page_holds_is_named(given, says):
    paged, dense, _ = made("plain")
    with pytest.raises(ValueError, match=says):
        paged.layers[0].keys = given
    assert_same(paged, dense)


def test_assignments_that_do_not_go_together_are_named_when_the_cache_is_used():
    paged, *_ = made("plain")
    paged.layers[0].keys = paged.layers[0].keys[:, :, :7]
    with pytest.raises(ValueError, match=r"layer 0 has keys \[2, 2, 7\] and values \[2, 2, 40\].*assign both alike"):
        paged.fork()
    paged.layers[0].values = paged.layers[0].values[:, :, :7]
    paged.layers[1].keys, paged.layers[1].values = states(1, 40)
    with pytest.raises(ValueError, match=r"keys and values of \[1, 2\] rows: assign those of every layer"):
        append(1, paged)
    paged.reset()
    append(3, paged)
    check(paged)


def test_a_window_refuses_what_it_cannot_place():
    paged, dense, _ = made("windows")
    sliding = next(layer for layer in paged.layers if layer.is_sliding)
    with pytest.raises(NotImplementedError, match=r"window of 24 cannot be assigned: pass DynamicCache\(config="):
        sliding.keys = sliding.keys
    with pytest.raises(NotImplementedError, match=r"reset\(\) of the cache"):
        sliding.reset()
    assert_same(paged, dense)


@pytest.mark.parametrize("config", [CONFIG, WINDOWS], ids=["full", "windows"])
def test_it_is_a_dynamic_cache_to_iterate_over(config):
    paged, dense = PagedCache(config), DynamicCache(config=config)
    assert isinstance(paged, DynamicCache)
    for _ in range(2):
        assert len(paged) == len(dense) == len([*paged])
        assert_same(paged, dense)
        append(30, paged, dense)
    rebuilt = DynamicCache([*paged], config=config)
    if config is CONFIG:
        assert_same(paged, rebuilt)
    assert (paged.offloading, paged.is_compileable) == (dense.offloading, dense.is_compileable)
    assert len(torch.utils._pytree.tree_leaves(paged)) == 1  # transformers registers its own class, by exact type
    with pytest.raises(NotImplementedError, match="offloaded"):
        paged.offload(0, only_non_sliding=False)
