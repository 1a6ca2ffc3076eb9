"""A hypothesis state machine: random operations on `PagedCache` beside transformers' `DynamicCache`."""

from __future__ import annotations

import copy
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from transformers import DynamicCache

from invariants import check
from pkv_hf import PagedCache
from tiny import tiny

HEADS, HEAD_DIM, LONGEST, MOST_ROWS, MOST_CACHES = 2, 6, 120, 6, 6
PADS = st.one_of(st.just([]), st.lists(st.integers(0, 40), min_size=1, max_size=3))


class Pair:
    """A paged cache, and what it must hold: a dense one, and how many leading positions of each row are padding."""

    def __init__(self, paged: PagedCache, dense: DynamicCache, pads: np.ndarray) -> None:
        self.paged, self.dense, self.pads = paged, dense, pads

    @property
    def rows(self) -> int:
        return self.paged.rows

    @property
    def length(self) -> int:
        return self.paged.get_seq_length()

    def empty(self, dense: DynamicCache) -> None:
        """The rows are gone: a dense cache keeps their number, a paged one takes any again."""
        self.dense, self.pads = dense, np.zeros(0, dtype=np.int64)

    def select(self, index: torch.Tensor) -> None:
        self.pads = self.pads[index.numpy()]

    def can_crop(self, count: int) -> bool:
        """Whether the dense cache still holds what is visible after it."""
        sliding = [layer for layer in self.dense.layers if layer.is_sliding]
        return all(
            self.length < layer.sliding_window
            or (layer.record_past and layer.keys.shape[2] - count >= min(layer.sliding_window - 1, self.length - count))
            for layer in sliding
        )

    def assert_equal(self, ours: torch.Tensor, theirs: torch.Tensor, end: int) -> None:
        """Compares dense states whose last position is `end - 1`, but for padding, which may be anything finite."""
        assert ours.shape == theirs.shape
        assert torch.isfinite(ours).all()
        real = torch.arange(end - ours.shape[2], end) >= torch.from_numpy(self.pads)[:, None]
        assert torch.equal(ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real])


class CacheMachine(RuleBasedStateMachine):
    family = "llama"
    pairs = Bundle("pairs")
    operations: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.config = tiny(self.family).config
        self.alive: list[Pair] = []
        self.counter = 0

    def add(self, pair: Pair) -> Pair:
        self.alive.append(pair)
        return pair

    def states(self, rows: int, count: int, kv_dtype: torch.dtype | None) -> torch.Tensor:
        """Vectors all different, and exact in 8 bits by a scale of 1: the largest value, then a number in base 16."""
        numbers = torch.arange(rows * HEADS * count) + self.counter
        self.counter += len(numbers)
        digits = [(numbers // 16**place % 16 - 8) for place in range(HEAD_DIM - 1)]
        largest = torch.full_like(numbers, 448 if kv_dtype == torch.float8_e4m3fn else 127)
        return torch.stack([largest, *digits], -1).float().view(rows, HEADS, count, HEAD_DIM)

    @rule(
        target=pairs,
        reserve=st.sampled_from([None, 1, 40, 200]),
        page_size=st.sampled_from([16, 32]),
        kv_dtype=st.sampled_from([None, None, "int8", "fp8"]),
        pads=PADS,
        copies=st.sampled_from([(1, 0), (1, 0), (2, 30), (3, 0)]),
    )
    def make(self, reserve, page_size, kv_dtype, pads, copies):
        if len(self.alive) >= MOST_CACHES:
            return multiple()
        paged, pads = PagedCache(self.config, page_size, reserve, kv_dtype), np.array(pads, dtype=np.int64)
        if len(pads):
            paged.start(len(pads), pads)
        paged.expect_copies(*copies)
        return self.add(Pair(paged, DynamicCache(config=self.config), pads))

    @rule(pair=pairs, pads=PADS)
    def start_again(self, pair, pads):
        """With other rows, where there is no token yet or none any more."""
        if not pair.length and pads:
            pair.pads = np.array(pads, dtype=np.int64)
            pair.paged.start(len(pads), pair.pads)

    @rule(pair=pairs, count=st.integers(1, 40), rows=st.integers(1, 3))
    def append(self, pair, count, rows):
        if not pair.length and len(pair.pads):
            count += int(pair.pads.max())  # a row has a token at least
        if pair.length + count > LONGEST:
            return
        if not pair.rows:
            pair.pads = np.zeros(rows, dtype=np.int64)
        begin, end = pair.length, pair.length + count
        for layer in range(self.config.num_hidden_layers):
            k, v = (self.states(len(pair.pads), count, pair.paged.kv_dtype) for _ in range(2))
            for ours, theirs in zip(pair.paged.update(k, v, layer), pair.dense.update(k, v, layer)):
                pair.assert_equal(ours, theirs, end)
        for table in pair.paged.tables.values():  # nobody else may see what was just written
            written = table.pages[:, begin // table.page_size : -(-end // table.page_size)]
            assert (table.pool.allocator.refcounts[written[written > 0]] == 1).all()

    @rule(pair=pairs, share=st.floats(0, 1))
    def crop(self, pair, share):
        count = int(share * pair.length)
        if not pair.length:
            return
        if pair.can_crop(count):
            pair.paged.crop(-count)
            pair.dense.crop(-count)
            pair.pads = np.minimum(pair.pads, pair.length)
            if not pair.length:
                pair.empty(DynamicCache(config=self.config))
        elif not all(table.can_shrink(pair.length - count) for table in pair.paged.tables.values()):
            with pytest.raises(RuntimeError, match="activate_past_recording"):
                pair.paged.crop(-count)

    @rule(pair=pairs)
    def record_past(self, pair):
        pair.paged.activate_past_recording()
        pair.dense.activate_past_recording()

    @rule(pair=pairs, number=st.integers(0, 1000))
    def reorder(self, pair, number):
        if pair.length:
            index = torch.from_numpy(np.random.default_rng(number).integers(0, pair.rows, pair.rows))
            pair.paged.reorder_cache(index)
            pair.dense.reorder_cache(index)
            pair.select(index)

    @rule(pair=pairs, number=st.integers(0, 1000), mask=st.booleans())
    def select(self, pair, number, mask):
        if pair.length:
            rng = np.random.default_rng(number)
            index = torch.from_numpy(np.sort(rng.permutation(pair.rows)[: rng.integers(1, pair.rows + 1)]))
            given = torch.isin(torch.arange(pair.rows), index) if mask else index
            pair.paged.batch_select_indices(given)
            pair.dense.batch_select_indices(given)
            pair.select(index)

    @rule(pair=pairs)
    def repeat(self, pair):
        if pair.length and 2 * pair.rows <= MOST_ROWS:
            pair.select(torch.arange(pair.rows).repeat_interleave(2))
            pair.paged.batch_repeat_interleave(2)
            pair.dense.batch_repeat_interleave(2)

    @rule(pair=pairs, keep=st.floats(0.1, 1))
    def assign(self, pair, keep):
        """What a script prunes, of our own K and V: padding is not the same in both, and a token from here on."""
        count = int(keep * pair.length)
        if not count or any(pair.paged.is_sliding):
            return
        for ours, theirs in zip(pair.paged.layers, pair.dense.layers):
            ours.keys, ours.values = ours.keys[:, :, -count:], ours.values[:, :, -count:]
            theirs.keys, theirs.values = ours.keys.clone(), ours.values.clone()  # our pages will be others'
        pair.pads = np.zeros_like(pair.pads)

    @rule(pair=pairs, layer=st.integers(0, 2), back=st.integers(1, 40))
    def edit(self, pair, layer, back):
        """In place: the heads of a token change places."""
        if pair.length >= back:
            for states in ("keys", "values"):
                held = [getattr(cache.layers[layer], states) for cache in (pair.paged, pair.dense)]
                for tensor in held:
                    if min(x.shape[2] for x in held) >= back:
                        tensor[:, :, -back] = tensor[:, :, -back].flip(1)

    @rule(target=pairs, pair=pairs)
    def fork(self, pair):
        if len(self.alive) >= MOST_CACHES:
            return multiple()
        return self.add(Pair(pair.paged.fork(), copy.deepcopy(pair.dense), pair.pads))

    @rule(target=pairs, pair=pairs)
    def deepcopy(self, pair):
        if len(self.alive) >= MOST_CACHES:
            return multiple()
        return self.add(Pair(copy.deepcopy(pair.paged), copy.deepcopy(pair.dense), pair.pads))

    @rule(pair=pairs)
    def reset(self, pair):
        pair.paged.reset()
        pair.empty(DynamicCache(config=self.config))

    @rule(pair=consumes(pairs))
    def forget(self, pair):
        self.alive.remove(pair)
        pair.paged = None  # its pages go back when the cache goes

    @invariant()
    def contents_are_equal(self):
        type(self).operations += 1
        for pair in self.alive:
            assert pair.length == pair.dense.get_seq_length()
            assert pair.paged.pads.tolist() == pair.pads.tolist()
            if not pair.length:
                continue
            for layer, (ours, theirs) in enumerate(zip(pair.paged.layers, pair.dense.layers)):
                assert pair.paged.get_mask_sizes(3, layer) == pair.dense.get_mask_sizes(3, layer)
                assert ours.length == pair.length
                for held, expected in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                    if ours.record_past:  # the dense one then shows what has left the window too
                        expected = expected[:, :, -held.shape[2] :] if held.shape[2] else expected[:, :, :0]
                    pair.assert_equal(held, expected, pair.length)

    @invariant()
    def caches_are_consistent(self):
        pools = {}
        for pair in self.alive:
            pools.setdefault(id(next(iter(pair.paged.tables.values())).pool), []).append(pair.paged)
        for caches in pools.values():
            check(*caches)

    @invariant()
    def the_device_sees_the_table(self):
        for pair in self.alive:
            for table in pair.paged.tables.values():
                mirror, first_held = table.on(torch.device("cpu"))
                rows, width = table.pages.shape
                assert mirror[:, :width].tolist() == table.pages.tolist()
                assert not mirror[:, width:].any()
                assert first_held.tolist() == table.first_held()
                assert len(mirror) == rows

    def teardown(self):
        pools = {id(table.pool): table.pool for pair in self.alive for table in pair.paged.tables.values()}
        for pair in self.alive:
            pair.paged = None
        for pool in pools.values():
            assert pool.allocator.free == pool.allocator.capacity


class SlidingCacheMachine(CacheMachine):
    family = "qwen2-windows"


MACHINES = (CacheMachine, SlidingCacheMachine)


def run(machine: type[CacheMachine], examples: int, steps: int, number: int | None = None) -> int:
    """Runs `examples` sequences of at most `steps` operations, drawn from seed `number`, or afresh without one.

    Returns the operations that were run.
    """
    counted = type(machine.__name__, (machine,), {"operations": 0})
    run_state_machine_as_test(
        counted if number is None else seed(number)(counted),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            # a long run has no minutes to spare for making its failures shorter
            phases=tuple(Phase) if number is None else (Phase.generate,),
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return counted.operations
