"""Pages behind a sliding window are given back: what a cache holds does not grow with what is generated."""

from __future__ import annotations

import pytest
import torch

import pkv_hf
from pkv_hf import PagedCache
from pkv_hf.compat import CACHE
from tiny import assert_on_pages, left_padded, tiny

WINDOW = 24
PAGES = WINDOW // 16 + 2
"""Of a row: those that a window spans at most, and the one that is written next."""


def held(cache) -> tuple[int, int]:
    """Pages that the window's table holds and bytes of its pool."""
    table = cache.tables[WINDOW]
    return len({int(page) for page in table.pages.flat if page}), table.pool.nbytes


def test_memory_is_flat_over_20_000_tokens():
    config = tiny("mistral", num_hidden_layers=1).config
    cache, token = PagedCache(config), torch.randn(1, 2, 1, 16)
    most = [0, 0]
    for step in range(20_000):
        cache.update(token, token, 0)
        if step == 100:
            early = list(most)
        if step % 7 == 0:
            most = [max(pair) for pair in zip(most, held(cache))]
    assert cache.get_seq_length() == 20_000
    assert most == early
    assert most[0] <= PAGES


@pytest.mark.contract
@pytest.mark.parametrize("settings", [{}, {"prompt_lookup_num_tokens": 4}], ids=["greedy", "lookup"])
@pytest.mark.parametrize("name", ["mistral", "qwen2-windows"])
def test_generation_holds_a_windows_pages_at_each_step(name, settings):
    """For more than ten windows; the full layer of Qwen2 grows all the while."""
    model = tiny(name, num_hidden_layers=2)
    seen = []

    class Watch:
        def put(self, _):
            seen.append(held(cache) if cache.rows else None)

        def end(self):
            pass

    cache = PagedCache(model.config)
    with pkv_hf.patched(model):
        settings = {"do_sample": False, CACHE: cache, "streamer": Watch(), **settings}
        model.generate(**left_padded(90), max_new_tokens=300, **settings)
        assert_on_pages(model)
    assert len(seen) > 250
    assert max(pages for pages, _ in seen[2:]) <= PAGES  # until a first draft is judged the whole prompt is kept
    assert len({nbytes for _, nbytes in seen[20:]}) == 1
    if name == "qwen2-windows":
        assert cache.memory().pages_in_use >= 389 // 16
