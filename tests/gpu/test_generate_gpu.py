"""Patched models on a GPU: the routes that `auto` takes there, on real weights."""

from __future__ import annotations

import copy

import pytest
import torch

import pkv_hf
from pkv_hf.compat import CACHE
from pkv_hf.routes.base import Scores
from pkv_hf.routes.sdpa import attend_block
from tiny import FAMILIES, assert_on_pages, left_padded, tiny

pytestmark = pytest.mark.gpu


def generate(model, inputs, new_tokens=40):
    return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)


@pytest.mark.parametrize("lengths", [(50,), (60, 53, 27, 1)])
@pytest.mark.parametrize("route", ["split", "workqueue", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_identical(family, lengths, route):
    model = tiny(family).cuda()
    inputs = {name: tensor.cuda() for name, tensor in left_padded(*lengths).items()}
    expected = generate(model, inputs, 200)
    with pkv_hf.patched(model, route=route):
        assert torch.equal(generate(model, inputs, 200), expected)
        assert pkv_hf.report(model).route == route


@pytest.mark.parametrize("length", [1024, 4096, 7900])
def test_smollm2(smollm2, pydoc_ids, length):
    model, inputs = smollm2.cuda(), {"input_ids": pydoc_ids[:, :length].cuda()}
    expected = generate(model, inputs, 64)
    with pkv_hf.patched(model):
        assert torch.equal(generate(model, inputs, 64), expected)
    smollm2.cpu()


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_queries_that_follow_others_are_as_exact_as_under_a_mask(dtype, group):
    q, k, v = (torch.randn(2, heads, tokens, 64, device="cuda", dtype=dtype)
               for heads, tokens in ((2 * group, 70), (2, 300), (2, 300)))  # fmt: skip
    mask = torch.ones(70, 300, dtype=torch.bool, device="cuda").tril(230)
    exact, masked = (
        torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=mask, enable_gqa=True)
        for states in ((q.double(), k.double(), v.double()), (q, k, v))
    )
    ours = attend_block(q, k, v, Scores(64**-0.5), 230, 0, 0)
    assert (ours - exact).square().mean() <= 4 * (masked - exact).square().mean()


@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 16_384}], ids=str)
def test_prompts_to_131072_tokens_build_no_mask(settings):
    """A mask of the longest row alone, a byte an entry, would be 16 GiB."""
    lengths = (131_072,) if settings else (131_072, 70_001, 5)
    model = tiny("llama", num_hidden_layers=1, max_position_embeddings=131_200).cuda()
    inputs = {name: tensor.cuda() for name, tensor in left_padded(*lengths).items()}
    alone = [  # in chunks, whose masks are small
        model.generate(inputs["input_ids"][row : row + 1, -length:], max_new_tokens=8, prefill_chunk_size=4096)[0, -8:]
        for row, length in enumerate(lengths)
    ]
    with pkv_hf.patched(model):
        torch.cuda.reset_peak_memory_stats()
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False, **settings)
        assert torch.cuda.max_memory_allocated() < 4 * 2**30
        assert_on_pages(model)
    assert torch.equal(output[:, -8:], torch.stack(alone))


@pytest.mark.parametrize("default", [None, "cuda"])
def test_layers_hold_the_beams_in_their_last_order(default):
    model, results = tiny("llama").cuda(), []
    inputs = {name: tensor.cuda() for name, tensor in left_padded(20, 20).items()}
    settings = {"num_beams": 3, "do_sample": False, "max_new_tokens": 20, "return_dict_in_generate": True}
    torch.set_default_device(default)
    try:
        results.append(model.generate(**inputs, **settings))
        with pkv_hf.patched(model):
            results.append(model.generate(**inputs, **settings))
    finally:
        torch.set_default_device(None)
    dense, paged = (result[CACHE].layers for result in results)
    assert torch.equal(results[0].sequences, results[1].sequences)
    for ours, theirs in zip(paged, dense):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=1e-4)


def test_beams_change_places_without_waiting_for_the_gpu():
    model = tiny("llama").cuda()
    heads, width = model.config.num_key_value_heads, model.config.head_dim
    cache = pkv_hf.PagedCache(model.config)
    k, v, new = (torch.randn(3, heads, tokens, width, device="cuda") for tokens in (21, 21, 1))
    cache.update(k, v, 0)
    beams = torch.tensor([2, 2, 0], device="cuda")
    cache.reorder_cache(beams)  # the first one allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.reorder_cache(beams)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.memory().pages_shared == 2
    again = copy.deepcopy(cache)
    order = beams[beams]
    for each in (cache, again):
        for seen, states in zip(each.update(new, new, 0), (k, v)):
            assert torch.equal(seen, torch.cat([states[order], new], dim=2))
