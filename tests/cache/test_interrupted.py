"""An operation that is interrupted before any of its lines has happened or has not, and no page is lost."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from invariants import Interrupt, check
from pkv_hf import PagedCache
from tiny import tiny

LAYERS, HEADS, DIM = 3, 2, 6
CONFIGS = {name: tiny(name).config for name in ("llama", "qwen2-windows")}


class Moved:
    """Stands for a `Reordering`: beams' order on its way from a GPU."""

    def __init__(self, rows):
        self._rows = np.array(rows)

    def rows(self):
        return self._rows


def states(rows, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, HEADS, count, DIM, generator=generator)


def append(cache, count, seed=1):
    for layer in range(LAYERS):
        cache.update(*states(cache.rows or 2, count, seed + layer), layer)


def made(kind):
    """A cache, and all that are on its pages."""
    cache = PagedCache(
        CONFIGS["qwen2-windows" if kind == "windows" else "llama"],
        max_length={"reserved": 60}.get(kind),
        kv_dtype="int8" if kind == "int8" else None,
    )
    if kind in ("ragged", "int8"):
        cache.start(2, np.array([0, 20]))
    append(cache, 34)
    if kind == "repeated":
        cache.batch_repeat_interleave(2)
    return (cache, cache.fork()) if kind == "forked" else (cache,)


def assign(cache):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, -9:], layer.values[:, :, -9:]


def edit(cache):
    for layer in cache.layers:
        layer.keys[:, :, :4] = 1.0
        layer.values.mul_(2)


def pend(cache):
    cache._tables.reordering = Moved([1, 0])


OPERATIONS = {
    "crop": (None, lambda cache: cache.crop(-3), ("ragged", "forked")),
    "truncate": (None, lambda cache: cache.truncate(17), ("reserved",)),
    "reset": (None, lambda cache: cache.reset(), ("forked",)),
    "reorder": (None, lambda cache: cache.reorder_cache(torch.tensor([1, 0])), ("ragged", "windows")),
    "pending reorder": (pend, lambda cache: cache.tables, ("ragged",)),
    "select": (None, lambda cache: cache.batch_select_indices(torch.tensor([1])), ("reserved", "windows")),
    "repeat": (None, lambda cache: cache.batch_repeat_interleave(2), ("reserved",)),
    "fork": (None, lambda cache: cache.fork() and None, ("windows",)),
    "start": (lambda cache: cache.reset(), lambda cache: cache.start(3, np.array([0, 4, 20])), ("plain",)),
    "first update": (lambda cache: cache.reset(), lambda cache: cache.update(*states(2, 34, 7), 0), ("reserved",)),
    "update": (None, lambda cache: cache.update(*states(2, 20, 7), 0), ("forked", "windows")),
    "assigned": (assign, lambda cache: cache.tables, ("ragged", "int8", "forked", "repeated")),
    "edited": (edit, lambda cache: cache.tables, ("int8", "forked", "repeated", "windows")),
}
"""What comes before, the operation, and the kinds of caches that it is done to."""


def seen(cache):
    """What a cache shows, which is its own tensors: nothing is settled to see it."""
    return [
        (layer.length, *(None if x is None else x.clone() for x in (layer.keys, layer.values)))
        for layer in cache.layers
    ]


def same(ours, theirs):
    return all(
        a == b if not isinstance(a, torch.Tensor) else isinstance(b, torch.Tensor) and torch.equal(a, b)
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one, other, strict=True)
    )


CASES = [(name, kind) for name, (*_, kinds) in OPERATIONS.items() for kind in kinds]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_an_interrupted_operation_has_happened_or_has_not(name, kind):
    ready, operation, _ = OPERATIONS[name]

    def prepared():
        caches = made(kind)
        if ready is not None:
            ready(caches[0])
        return caches, [seen(cache) for cache in caches]

    caches, before = prepared()
    with Interrupt() as whole:
        operation(caches[0])
    after = [seen(cache) for cache in caches]
    for n in whole.places():
        caches, _ = prepared()
        with pytest.raises(KeyboardInterrupt), Interrupt(n):
            operation(caches[0])
        gc.collect(0)
        found = [seen(cache) for cache in caches]
        assert any(same(found[0], expected[0]) for expected in (before, after)), n
        assert all(same(ours, theirs) for ours, theirs in zip(found[1:], before[1:])), n
        if "update" not in name or not caches[0].layers[0].length - caches[0].layers[1].length:
            check(*caches)
        if same(found[0], before[0]):
            operation(caches[0])
        assert same(seen(caches[0]), after[0]), n
        caches[0].reset()
        append(caches[0], 5)
        check(*caches)
        assert torch.isfinite(caches[0].layers[2].keys).all()


@pytest.mark.parametrize("kind", ["plain", "ragged", "int8", "forked"])
def test_a_step_that_was_interrupted_anywhere_is_truncated(kind):
    """As a patched model's step does it: pages are prepared and layers written, one after the other."""

    def step(cache):
        for layer in cache.layers:
            layer.write(*states(2, 20, layer.layer_idx))

    before, caches = seen(made(kind)[0]), made(kind)
    with Interrupt() as whole:
        step(caches[0])
    for n in whole.places():
        caches = made(kind)
        with pytest.raises(KeyboardInterrupt), Interrupt(n):
            step(caches[0])
        caches[0].truncate(34)
        gc.collect(0)
        check(*caches)
        assert all(same(seen(cache), before) for cache in caches), n
