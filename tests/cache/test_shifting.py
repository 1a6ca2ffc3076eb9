"""Continuations of unequal length from one prefix: rows under left padding, on the prefix's pages or on few copies."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

import pkv_hf
from pkv_hf import PagedCache, PoolAllocationError
from pkv_hf.cache.pool import PagePool
from pkv_hf.cache.shifting import shifted
from pkv_hf.compat import CACHE
from tiny import assert_on_pages, byte_tokenizer, left_padded, tiny

RAGGED = {
    "by one": (5, 6, 5),
    "by a page": (3, 19, 19),
    "by more than the prefix": (2, 43, 42, 60),
    "by many": (1, 4, 17, 20, 33, 36),
}
WINDOW = 24


def generate(model, inputs, **settings):
    settings = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, **settings}
    return model.generate(**inputs, **settings)


def continuations(lengths) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 128, (length,), generator=generator).tolist() for length in lengths]


def padded(prefix, rows) -> dict[str, torch.Tensor]:
    """Prefix and continuations as any other left-padded batch, with a padding token of its own."""
    longest = max(map(len, rows))
    whole = [[1] * (longest - len(row)) + prefix[0].tolist() + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * (prefix.shape[1] + len(row)) for row in rows]
    return {"input_ids": torch.tensor(whole), "attention_mask": torch.tensor(mask)}


def filled(name, length, **settings):
    """A cache of one row of random states that keeps its past."""
    config = tiny(name).config
    cache = PagedCache(config, **settings)
    cache.activate_past_recording()
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(1, 2, length, 16), torch.randn(1, 2, length, 16), layer)
    return cache


def refcounts(cache) -> list[np.ndarray]:
    gc.collect()
    return [table.pool.allocator.refcounts[table.pool.allocator.refcounts > 0] for table in cache.tables.values()]


@pytest.mark.contract
@pytest.mark.parametrize("patch", [True, False], ids=["patched", "unpatched"])
@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2-windows"])
def test_tokens_are_those_of_the_whole_batch(name, lengths, patch):
    model, prefix, rows = tiny(name), left_padded(40)["input_ids"], continuations(lengths)
    expected = generate(model, padded(prefix, rows)).sequences
    shared = pkv_hf.prefix(pkv_hf.patch(model) if patch else model, prefix)
    before = refcounts(shared._cache)
    for _ in range(2):
        inputs = shared.inputs(rows)
        assert inputs[CACHE].get_seq_length() == 40
        output = generate(model, inputs).sequences
        begin = inputs["input_ids"].shape[1]
        assert torch.equal(output[:, begin:], expected[:, begin:])
    if patch:
        assert_on_pages(model)
    del inputs
    assert all(map(np.array_equal, refcounts(shared._cache), before))


@pytest.mark.parametrize(
    ("name", "length", "lengths"),
    [("llama", 3, (1, 8)), ("llama", 40, (3, 19, 4)), ("qwen2-windows", 40, (2, 43, 60)), ("mistral", 20, (1, 2, 18))],
    ids=str,
)
def test_the_kernels_read_moved_rows(name, length, lengths):
    """The first call is a decode step itself where no continuation is longer, with queries that are padding."""
    pytest.importorskip("triton")
    model, rows = tiny(name, num_hidden_layers=2), continuations(lengths)
    prefix = left_padded(length)["input_ids"]
    expected = generate(model, padded(prefix, rows), max_new_tokens=3).sequences[:, length + max(lengths) :]
    with pkv_hf.patched(model, route="split"):
        output = generate(model, pkv_hf.prefix(model, prefix).inputs(rows), max_new_tokens=3).sequences
        assert torch.equal(output[:, length + max(lengths) :], expected)
        assert_on_pages(model)
        assert pkv_hf.report(model).route == "split"


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_beams_and_samples_go_on_from_rows_of_unequal_length(settings):
    model, prefix, rows = tiny("mistral"), left_padded(40)["input_ids"], continuations((3, 19, 8, 60))
    torch.manual_seed(2)
    expected = generate(model, padded(prefix, rows), **settings).sequences[:, 100:]
    with pkv_hf.patched(model):
        shared = pkv_hf.prefix(model, prefix)
        torch.manual_seed(2)
        assert torch.equal(generate(model, shared.inputs(rows), **settings).sequences[:, 100:], expected)
        assert_on_pages(model)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_quantised_pages_are_read_as_a_dense_cache_of_the_same_bytes(name):
    model, prefix, rows = tiny(name), left_padded(40)["input_ids"], continuations((3, 19, 8, 60))
    with pkv_hf.patched(model, kv_dtype="int8"):
        inputs = pkv_hf.prefix(model, prefix).inputs(rows)
        twin = {**inputs, CACHE: inputs[CACHE].fork()}
        output = generate(model, inputs).sequences
        assert_on_pages(model)
    assert torch.equal(output, generate(model, twin).sequences)


@pytest.mark.parametrize("kv_dtype", [None, "int8", "fp8"])
@pytest.mark.parametrize("length", [1, 32, 75])
@pytest.mark.parametrize("name", ["llama", "qwen2-windows"])
def test_rows_hold_the_bits_that_were_moved(name, length, kv_dtype):
    cache, pads = filled(name, length, kv_dtype=kv_dtype), np.array([0, 1, 16, 17, 33, 32, 49, 74, 75, 76, 200])
    moved = shifted(cache, pads)
    assert not any(table.pages[pads >= length].any() for table in moved.tables.values())
    for layer, own in zip(moved.layers, cache.layers):
        assert layer.length == length
        first = layer.first_visible()
        for which, dense in enumerate(own.dense(0, length)):
            for row, pad in enumerate(pads.tolist()):
                begin, kept = max(first, pad), max(length - pad, 0)
                tokens = layer.dense(first, length, slice(row, row + 1))[which]
                assert torch.equal(tokens[:, :, begin - first :], dense[:, :, max(begin - pad, 0) : kept])
                assert not tokens[:, :, : begin - first].any()  # nor is there NaN of memory that nothing wrote


def test_rows_share_pages_where_they_line_up_and_else_one_copy():
    cache = filled("llama", 75)
    held = cache.memory().pages_in_use
    moved = shifted(cache, np.array([16, 1, 0, 17, 33, 16, 3]))
    (table,), (own,) = moved.tables.values(), cache.tables.values()
    row = own.pages[0].tolist()
    assert table.pages[[0, 2, 5]].tolist() == [[0, *row[:4]], row, [0, *row[:4]]]
    copy = table.pages[1].tolist()
    assert table.pages[[3, 4]].tolist() == [[0, *copy[:4]], [0, 0, *copy[:3]]]
    assert not {*table.pages[6].tolist()} & {*row, *copy}
    assert moved.memory().pages_in_use == 3 * held
    both = refcounts(cache)
    del moved, table
    assert [counts.sum() for counts in refcounts(cache)] == [1 + held]
    assert both[0].max() == 4


def test_no_page_behind_a_window_is_handed_out_or_kept():
    model = pkv_hf.patch(tiny("mistral"))
    shared = pkv_hf.prefix(model, left_padded(90)["input_ids"])
    assert shared.cache().memory().pages_in_use == 90 // 16 + 1 - (90 - WINDOW + 1) // 16
    output = generate(model, shared.inputs(continuations((3, 70))), max_new_tokens=60)
    table = output[CACHE].tables[WINDOW]
    assert ((table.pages > 0).sum(axis=1) <= WINDOW // 16 + 2).all()
    del output, table
    assert [counts.sum() for counts in refcounts(shared._cache)] == [1 + 90 // 16 + 1]


def test_texts_of_unequal_length():
    model, tokenizer = tiny("llama", vocab_size=257), byte_tokenizer(bos_token="<s>")
    prefix, texts = "The capital of France is Paris.", [" And of Spain?", " So?", " The river there is"]
    expected = generate(model, padded(tokenizer(prefix, return_tensors="pt")["input_ids"],
        [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])).sequences  # fmt: skip
    with pkv_hf.patched(model):
        inputs = pkv_hf.prefix(model, prefix, tokenizer).inputs(texts)
        output = generate(model, inputs).sequences
    begin = inputs["input_ids"].shape[1]
    assert torch.equal(output[:, begin:], expected[:, begin:])


@pytest.mark.parametrize(("padding", "token"), [(7, 7), (None, 0), (-1, 0), (128, 0)])
def test_the_models_padding_token_stands_under_the_mask(padding, token):
    model = tiny("llama")
    model.config.pad_token_id = padding
    inputs = pkv_hf.prefix(model, [3, 4, 5]).inputs([[9], [8, 7, 6]])
    assert inputs["input_ids"].tolist() == [[token, token, 3, 4, 5, 9], [3, 4, 5, 8, 7, 6]]
    assert inputs["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("fails", ["require", "copy_tokens"])
def test_copies_that_do_not_fit_leave_no_page_held(fails, monkeypatch):
    model = pkv_hf.patch(tiny("qwen2-windows"))
    shared = pkv_hf.prefix(model, left_padded(40)["input_ids"])
    before, calls, plain = refcounts(shared._cache), [], getattr(PagePool, fails)

    def second(self, *args):
        calls.append(args)
        if len(calls) == 2:  # the table of the other kind is done by then
            raise PoolAllocationError("out of memory")
        return plain(self, *args)

    monkeypatch.setattr(PagePool, fails, second)
    with pytest.raises(PoolAllocationError):
        shared.inputs([[5], [6, 7]])
    monkeypatch.undo()
    assert all(map(np.array_equal, refcounts(shared._cache), before))
    assert shared.inputs([[5], [6, 7]])[CACHE].rows == 2
