"""Rows packed side by side go to the pages that padded ones go to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pkv_hf import PagedCache
from pkv_hf.cache.packing import Packing
from tiny import tiny


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_rows_go_where_padded_ones_go(family, kv_dtype):
    """Padding reads as zeros, and the null page stays so: what a mask hides would still be NaN in a product."""
    config, pads = tiny(family, num_hidden_layers=1).config, np.array([0, 7, 33, 59])
    padded, packed = (PagedCache(config, kv_dtype=kv_dtype) for _ in range(2))
    packing, states = Packing(pads, 60), torch.randn(2, 4, 2, 60, 16)
    for cache in (padded, packed):
        cache.start(len(pads), pads)
    padded.update(*states, 0)
    packed.layers[0].write_packed(*(packing.pack(each.transpose(1, 2)).transpose(1, 2) for each in states), packing)
    real = torch.arange(60) >= torch.from_numpy(pads)[:, None]
    (table,) = packed.tables.values()
    real &= torch.arange(60) >= torch.tensor(table.first_held())[:, None]
    for ours, theirs in zip(packed.layers[0].dense(0, 60), padded.layers[0].dense(0, 60)):
        assert torch.equal(ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real])
        assert not ours.transpose(1, 2)[~real].any()
    assert not any(tensor[:, 0].any() for tensor in table.pool.storage[0].tensors)


def test_unpacking_undoes_packing():
    packing, states = Packing(np.array([0, 3, 1]), 5), torch.randn(3, 5, 2)
    for row, start in enumerate(packing.starts):
        states[row, :start] = 0
    assert packing.pack(states).shape == (1, packing.tokens, 2)
    assert torch.equal(packing.unpack(packing.pack(states)), states)
    assert packing.bounds_on(torch.device("cpu")).tolist() == [0, 5, 7, 11]
