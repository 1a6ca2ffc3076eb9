"""Random sequences of cache operations on a `PagedCache` and on transformers' `DynamicCache`: equal to the bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from transformers import DynamicCache

from pkv_hf import PagedCache
from tiny import tiny

HEADS, HEAD_DIM, LONGEST, MOST_ROWS = 2, 4, 120, 6


class Pair:
    """A paged cache, and the dense one that says what it must hold."""

    def __init__(self, paged: PagedCache, dense: DynamicCache) -> None:
        self.paged, self.dense = paged, dense

    @property
    def rows(self) -> int:
        return self.paged.rows

    @property
    def length(self) -> int:
        return self.paged.get_seq_length()


class CacheMachine(RuleBasedStateMachine):
    family = "llama"
    pairs = Bundle("pairs")

    def __init__(self) -> None:
        super().__init__()
        self.config = tiny(self.family).config
        self.alive: list[Pair] = []
        self.counter = 0

    def add(self, pair: Pair) -> Pair:
        self.alive.append(pair)
        return pair

    @rule(target=pairs, reserve=st.sampled_from([None, 1, 40, 200]), page_size=st.sampled_from([16, 32]))
    def make(self, reserve, page_size):
        return self.add(Pair(PagedCache(self.config, page_size, reserve), DynamicCache(config=self.config)))

    @rule(pair=pairs, count=st.integers(1, 40), rows=st.integers(1, 3))
    def append(self, pair, count, rows):
        rows = pair.rows or rows
        if pair.length + count > LONGEST:
            return
        for layer in range(self.config.num_hidden_layers):
            states = []
            for _ in range(2):
                self.counter += 1
                size = rows * HEADS * count * HEAD_DIM
                values = torch.arange(size, dtype=torch.float32) + self.counter * 1000.0
                states.append(values.view(rows, HEADS, count, HEAD_DIM))
            for ours, theirs in zip(pair.paged.update(*states, layer), pair.dense.update(*states, layer)):
                assert torch.equal(ours, theirs)

    @rule(pair=pairs, share=st.floats(0, 1))
    def crop(self, pair, share):
        count = int(share * pair.length)
        if pair.length and not self.config_slides:
            pair.paged.crop(-count)
            pair.dense.crop(-count)
            if not pair.length:  # the dense one keeps the number of its rows, the paged one takes any again
                pair.dense = DynamicCache(config=self.config)

    @rule(pair=pairs, seed=st.integers(0, 1000))
    def reorder(self, pair, seed):
        if pair.length:
            index = torch.from_numpy(np.random.default_rng(seed).integers(0, pair.rows, pair.rows))
            pair.paged.reorder_cache(index)
            pair.dense.reorder_cache(index)

    @rule(pair=pairs, seed=st.integers(0, 1000), mask=st.booleans())
    def select(self, pair, seed, mask):
        if pair.length:
            rng = np.random.default_rng(seed)
            index = torch.from_numpy(np.sort(rng.permutation(pair.rows)[: rng.integers(1, pair.rows + 1)]))
            if mask:
                index = torch.isin(torch.arange(pair.rows), index)
            pair.paged.batch_select_indices(index)
            pair.dense.batch_select_indices(index)

    @rule(pair=pairs)
    def repeat(self, pair):
        if pair.length and 2 * pair.rows <= MOST_ROWS:
            pair.paged.batch_repeat_interleave(2)
            pair.dense.batch_repeat_interleave(2)

    @rule(target=pairs, pair=pairs)
    def fork(self, pair):
        if len(self.alive) >= 6:
            return multiple()
        return self.add(Pair(pair.paged.fork(), copy.deepcopy(pair.dense)))

    @rule(target=pairs, pair=pairs)
    def deepcopy(self, pair):
        if len(self.alive) >= 6:
            return multiple()
        return self.add(Pair(copy.deepcopy(pair.paged), copy.deepcopy(pair.dense)))

    @rule(pair=pairs)
    def reset(self, pair):
        pair.paged.reset()
        pair.dense = DynamicCache(config=self.config)

    @rule(pair=consumes(pairs))
    def forget(self, pair):
        self.alive.remove(pair)
        pair.paged = None  # its pages go back when the cache goes

    @property
    def config_slides(self) -> bool:
        return any(layer.is_sliding for layer in DynamicCache(config=self.config).layers)

    @invariant()
    def contents_are_equal(self):
        for pair in self.alive:
            assert pair.length == pair.dense.get_seq_length()
            if not pair.length:
                continue
            for layer, (ours, theirs) in enumerate(zip(pair.paged.layers, pair.dense.layers)):
                assert pair.paged.get_mask_sizes(3, layer) == pair.dense.get_mask_sizes(3, layer)
                assert torch.equal(ours.keys, theirs.keys)
                assert torch.equal(ours.values, theirs.values)

    @invariant()
    def pages_are_counted_right(self):
        tables = [table for pair in self.alive for table in pair.paged.tables.values()]
        for pool in {id(table.pool): table.pool for table in tables}.values():
            named = np.zeros_like(pool.allocator.refcounts)
            for table in tables:
                if table.pool is pool:
                    np.add.at(named, table.pages[table.pages > 0], 1)
            assert (pool.allocator.refcounts[1:] == named[1:]).all()


class SlidingCacheMachine(CacheMachine):
    family = "qwen2-windows"


@pytest.mark.parametrize("machine", [CacheMachine, SlidingCacheMachine])
def test_random_operations(machine):
    case = machine.TestCase
    case.settings = settings(
        max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )
    case("runTest").runTest()
