"""Caches whose pages hold int8 or float8: what they hold, and generation from them."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import torch

import pkv_hf
from pkv_hf.cache.sizes import KV_DTYPES
from pkv_hf.compat import CACHE
from pkv_hf.kernels import launch
from pkv_hf.kernels import quantize as quantization
from pkv_hf.kernels.checks.attention import rms
from pkv_hf.kernels.quantize import dequantize, quantize
from tiny import assert_on_pages, decode_logits, left_padded, tiny

NAMES = ("int8", "fp8")
ROUTES = ("sdpa", "split", "workqueue")


def filled(kv_dtype, tokens=40, rows=2, dtype=torch.float32, **settings):
    """A cache of random states, and what they are once quantised, `[rows, H_kv, tokens, head_dim]` by layer."""
    config = tiny("llama").config
    cache = pkv_hf.PagedCache(config, kv_dtype=kv_dtype, **settings)
    expected = []
    for layer_idx in range(config.num_hidden_layers):
        states = torch.randn(2, rows, 2, tokens, 16).to(dtype)
        for part in states.split([25, tokens - 25], dim=3):
            cache.update(*part, layer_idx)
        expected.append([dequantize(*quantize(x, KV_DTYPES[kv_dtype]), dtype) for x in states])
    return cache, expected


def assert_holds(cache, expected):
    for layer, (k, v) in zip(cache.layers, expected):
        assert torch.equal(layer.keys, k)
        assert torch.equal(layer.values, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_dtype", NAMES)
def test_a_cache_holds_what_was_quantized(kv_dtype, dtype):
    cache, expected = filled(kv_dtype, dtype=dtype)
    assert_holds(cache, expected)
    assert cache.layers[0].keys.dtype == dtype
    assert cache.dtypes == {KV_DTYPES[kv_dtype]}


@pytest.mark.parametrize("at_once", [1, 7 * 64, 100 * 64])
@pytest.mark.parametrize("kv_dtype", NAMES)
def test_many_states_are_quantized_a_part_at_a_time(kv_dtype, at_once, monkeypatch):
    states = torch.randn(2, 3, 50, 16)
    expected = quantize(states, KV_DTYPES[kv_dtype])
    monkeypatch.setattr(quantization, "AT_ONCE", at_once)
    for ours, theirs in zip(quantize(states, KV_DTYPES[kv_dtype]), expected, strict=True):
        assert torch.equal(ours.float(), theirs.float())


@pytest.mark.parametrize("kv_dtype", NAMES)
def test_scales_go_where_pages_go(kv_dtype):
    cache, expected = filled(kv_dtype)
    twin, copied = cache.fork(), copy.deepcopy(cache)
    token = torch.randn(2, 2, 2, 1, 16)
    for layer_idx in range(3):  # into a page that the fork shares
        twin.update(*token, layer_idx)
    assert_holds(cache, expected)
    assert_holds(copied, expected)
    after = [dequantize(*quantize(x, KV_DTYPES[kv_dtype]), torch.float32) for x in token]
    assert_holds(twin, [[torch.cat(pair, dim=2) for pair in zip(layer, after)] for layer in expected])
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    assert_holds(cache, [[x[[1, 1, 0, 0]] for x in layer] for layer in expected])
    cache.crop(-7)
    assert_holds(cache, [[x[[1, 1, 0, 0], :, :-7] for x in layer] for layer in expected])


@pytest.mark.parametrize("kv_dtype", NAMES)
def test_half_the_bytes(kv_dtype):
    model = tiny("llama", head_dim=128)
    held = {}
    for name in (torch.float16, kv_dtype):
        cache = pkv_hf.PagedCache(model.config, kv_dtype=name, max_length=300)
        model(torch.ones(1, 200, dtype=torch.long), **{CACHE: cache})
        memory = cache.memory()
        held[name] = memory.held_bytes, memory.live_bytes
    for ours, theirs in zip(held[kv_dtype], held[torch.float16]):
        assert ours / theirs == pytest.approx((128 + 4) / 256, rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kv_dtype", "family", "route"),
    [
        ("int8", "qwen2-windows", "split"), ("fp8", "qwen2-windows", "workqueue"),
        ("int8", "qwen3", "workqueue"), ("fp8", "qwen3", "split"),
    ],
)  # fmt: skip
def test_routes_decode_from_quantized_pages_as_dense_ones_would(kv_dtype, family, route, monkeypatch):
    """The unpatched model reads the same cache dense; both see what the pages hold."""
    monkeypatch.setattr(pkv_hf.PagedCache.__init__, "__defaults__", (16, None, kv_dtype))
    model, inputs = tiny(family), left_padded(50, 9, 41)
    model.config.pad_token_id = 0
    expected = decode_logits(model, inputs, 6)
    with pkv_hf.patched(model, route=route, kv_dtype=kv_dtype):
        found = decode_logits(model, inputs, 6)
        assert pkv_hf.report(model).route == route
        assert_on_pages(model)
    # a last bit of K that differs can fall to the next value of 8 bits
    assert rms(found - expected) <= 2e-3 * rms(expected)


@pytest.mark.parametrize("kv_dtype", NAMES)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_generate_makes_quantized_caches(settings, kv_dtype):
    model, inputs = tiny("llama"), left_padded(30)
    cache = pkv_hf.PagedCache(model.config, kv_dtype=kv_dtype)
    expected = model.generate(**inputs, max_new_tokens=20, **{CACHE: cache}, do_sample=False, **settings)
    with pkv_hf.patched(model, kv_dtype=kv_dtype):
        found = model.generate(**inputs, max_new_tokens=20, return_dict_in_generate=True, do_sample=False, **settings)
        assert found[CACHE].dtypes == {KV_DTYPES[kv_dtype]}
        assert {"int8": "int8", "fp8": "float8_e4m3fn"}[kv_dtype] == pkv_hf.report(model).kv_dtype
    assert torch.equal(found.sequences, expected)


@torch.no_grad()
def test_int8_pages_hardly_change_what_smollm2_says(smollm2, pydoc_ids):
    """Perplexity of 32 tokens after 256, which steps read from the pages one at a time."""
    nlls = {}
    for kv_dtype in (None, "int8", "fp8"):
        with pkv_hf.patched(smollm2, kv_dtype=kv_dtype):
            cache = pkv_hf.PagedCache(smollm2.config, kv_dtype=kv_dtype)
            smollm2(pydoc_ids[:, :256], **{CACHE: cache}, logits_to_keep=1)
            logits = [smollm2(pydoc_ids[:, i : i + 1], **{CACHE: cache}).logits[0] for i in range(256, 288)]
        nlls[kv_dtype] = float(torch.nn.functional.cross_entropy(torch.cat(logits), pydoc_ids[0, 257:289]))
    assert nlls["int8"] == pytest.approx(nlls[None], abs=0.03)
    assert nlls["fp8"] == pytest.approx(nlls[None], abs=0.06)


@pytest.mark.parametrize("kv_dtype", ["int4", torch.int16, 8])
def test_other_dtypes_are_named(kv_dtype):
    with pytest.raises(ValueError, match=r"kv_dtype=.* is not one of"):
        pkv_hf.patch(tiny("llama"), kv_dtype=kv_dtype)


def test_fp8_names_the_gpus_that_have_it(monkeypatch):
    module = sys.modules["pkv_hf.patching"]
    held = SimpleNamespace(device=torch.device("cuda", 0))
    layer = SimpleNamespace(parameters=lambda: iter([held]), buffers=lambda: iter([]))
    monkeypatch.setattr(launch, "_properties", lambda _: (84, 99 * 1024, (8, 6)))
    with pytest.raises(ValueError, match="'fp8' needs sm_89 or newer, cuda:0 is sm_86: use 'int8'"):
        module._check_fp8("fp8", layer)
    module._check_fp8("int8", layer)
    monkeypatch.setattr(launch, "_properties", lambda _: (84, 99 * 1024, (8, 9)))
    module._check_fp8("fp8", layer)
