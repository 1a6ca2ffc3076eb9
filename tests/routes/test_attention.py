"""Attention in torch over pages against the reference: long rows cut in parts, ragged starts, windows, query blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pkv_hf.cache.layer import PagedLayer
from pkv_hf.cache.packing import Packing
from pkv_hf.cache.tables import Tables
from pkv_hf.kernels.reference import paged_attention
from pkv_hf.routes.base import Bounds, Scores
from pkv_hf.routes.registry import ROUTES
from pkv_hf.routes.sdpa import LONG_ON_CPU, over_packed_prompt, over_pages, over_prompt, sdpa


def filled(length: int, pads: tuple[int, ...], window: int = 0, reserve: int = 0) -> tuple[PagedLayer, torch.Tensor]:
    """A layer with `length` positions in pages, and queries for the last of them (2 KV heads, groups of 3)."""
    layer = PagedLayer(Tables([window], 16, reserve), 0)
    layer.table.start(len(pads), np.array(pads))
    layer.table.keep_past = True
    layer.write(*(torch.randn(len(pads), 2, length, 32) for _ in range(2)))
    return layer, torch.randn(len(pads), 6, 8, 32)


@pytest.mark.parametrize("reserve", [0, 5000])
@pytest.mark.parametrize("window", [0, 30, LONG_ON_CPU + 100])
@pytest.mark.parametrize("pads", [(0,), (0, 0), (7, 40, 2000), (0, 2045)])
@pytest.mark.parametrize("length", [2047, 2048, LONG_ON_CPU + 501])
@pytest.mark.parametrize("q_len", [1, 5])
def test_over_pages(q_len, length, pads, window, reserve):
    layer, q = filled(length, pads, window, reserve)
    q = q[:, :, :q_len]
    out = over_pages(layer, q, Scores(0.3), np.array(pads), length - q_len)
    table, _ = layer.table.on(torch.device("cpu"))
    starts, ends = torch.tensor(pads, dtype=torch.int32), torch.full((len(pads),), length, dtype=torch.int32)
    expected = paged_attention(q.double(), *layer.pages, table, starts, ends, scale=0.3, window=window)
    torch.testing.assert_close(out.transpose(1, 2).double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("group", [1, 3])
def test_causal_queries_may_follow_others(group):
    q, k, v = torch.randn(2, 2 * group, 7, 32), *torch.randn(2, 2, 2, 300, 32)
    last = sdpa(torch.randn(2, 2 * group, 300, 32).index_copy_(2, torch.arange(293, 300), q), k, v, 0.3, causal=True)
    torch.testing.assert_close(sdpa(q, k, v, 0.3, causal=True), last[:, :, 293:])


@pytest.mark.parametrize("window", [0, 30, 290])
@pytest.mark.parametrize("pads", [(0, 0), (7, 0, 299)])
def test_prefill(pads, window):
    layer, _ = filled(300, pads)
    q, k, v = torch.randn(len(pads), 6, 300, 32), *layer.dense(0, 300)
    k, v = k.clone(), v.clone()
    for states in (k, v):  # what padding holds must not matter
        for row, pad in enumerate(pads):
            states[row, :, :pad] = float("nan")
    out = over_prompt(q, k, v, Scores(0.3), np.array(pads), window)
    table, _ = layer.table.on(torch.device("cpu"))
    starts, ends = torch.tensor(pads, dtype=torch.int32), torch.full((len(pads),), 300, dtype=torch.int32)
    expected = paged_attention(q.double(), *layer.pages, table, starts, ends, scale=0.3, window=window)
    torch.testing.assert_close(out.transpose(1, 2).double(), expected, atol=2e-6, rtol=1e-5)
    for row, pad in enumerate(pads):
        assert not out[row, :, :pad].any()


ASKED: dict[str, dict] = {
    "soft cap": {"softcap": 0.7},
    "sinks": {"sinks": True},
    "chunks": {"chunked": True},
    "all": {"softcap": 0.7, "sinks": True, "chunked": True},
    "plain": {},
}


@pytest.mark.parametrize("dims", [(32, 32), (48, 32), (32, 48)])
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("window", [0, 30])
def test_what_layers_ask_for(window, asked, dims, monkeypatch):
    """Prompts, packed and padded, blocks of queries, and single ones; in blocks of few queries."""
    settings = ASKED[asked]
    if settings.get("chunked") and not window:
        pytest.skip("chunks are of as many tokens as a window has")
    monkeypatch.setattr("pkv_hf.routes.sdpa.MASK_ELEMENTS", 1 << 14)
    pads, length = np.array([7, 0, 50]), 90
    layer = PagedLayer(Tables([window], 16), 0)
    layer.table.start(len(pads), pads)
    layer.table.keep_past = True
    q, k, v = (torch.randn(3, heads, length, dim) for heads, dim in zip((6, 2, 2), (dims[0], *dims)))
    layer.write(k, v)
    sinks = torch.randn(6) if settings.get("sinks") else None
    scores = Scores(0.3, settings.get("softcap", 0.0), sinks, settings.get("chunked", False))
    table, _ = layer.table.on(torch.device("cpu"))
    starts, ends = torch.from_numpy(pads).int(), torch.full((3,), length, dtype=torch.int32)

    def expected(count):
        states = q[:, :, -count:].double(), *layer.pages, table, starts, ends
        return paged_attention(*states, window=window, **scores._asdict()).transpose(1, 2)

    def assert_right(out, count):
        torch.testing.assert_close(out.double(), expected(count), atol=2e-6, rtol=1e-5)

    assert_right(over_prompt(q, k, v, scores, pads, window), length)
    packing = Packing(pads, length)
    packed = [packing.pack(states.transpose(1, 2)).transpose(1, 2) for states in (q, k, v)]
    out = over_packed_prompt(*packed, scores, packing, window).transpose(1, 2)
    assert_right(packing.unpack(out).transpose(1, 2), length)
    for count in (1, 20, 60):  # the last row has 20 tokens of padding among 60
        assert_right(over_pages(layer, q[:, :, -count:], scores, pads, length - count), count)


def test_keys_and_values_of_two_sizes_are_not_left_to_the_kernel_that_builds_all_scores():
    q, k, v = torch.randn(1, 4, 50, 48), torch.randn(1, 2, 50, 48), torch.randn(1, 2, 50, 32)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):  # no other may run
        assert sdpa(q, k, v, 0.3, causal=True).shape == (1, 4, 50, 32)


def test_flashinfer_plans_for_each_kind_of_layer(monkeypatch):
    made = []

    class Planned:
        def __init__(self, *_, **__): ...

        def plan(self, indices, ends, q, pages, scale):
            made.append((q.shape[1], *pages.shape[1:], scale))

        def run(self, q, *_):
            return made[-1]

    monkeypatch.setattr("pkv_hf.routes.flashinfer.Planned", Planned)
    layer = PagedLayer(Tables([0], 16), 0)
    layer.write(torch.randn(1, 2, 20, 64), torch.randn(1, 2, 20, 64))
    bounds, route = Bounds(np.zeros(1, dtype=np.int64), 19, 1), ROUTES["flashinfer"]
    for heads, scale in ((8, 0.1), (8, 0.1), (8, 0.2), (4, 0.2)):
        assert route.decode(layer, torch.randn(1, heads, 1, 64), Scores(scale), bounds) == (heads, 2, 16, 64, scale)
    assert len(made) == 3
