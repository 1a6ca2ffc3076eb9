"""Masks that a model makes before it calls its decoder: which of them are no more than causal, and what is real."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig
from transformers.masking_utils import create_masks_for_generate

import pkv_hf
from pkv_hf import PagedCache, compat
from pkv_hf.errors import NotServed
from pkv_hf.runtime import masks
from pkv_hf.runtime.masks import Expanded, read_expanded
from tiny import assert_on_pages, left_padded, tiny

ROWS, PAST, WINDOW = 3, 11, 8


def config(layer_types: list[str], implementation: str) -> Any:
    made = Gemma3TextConfig(
        num_hidden_layers=len(layer_types), layer_types=layer_types, sliding_window=WINDOW, hidden_size=8,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    made._attn_implementation = implementation
    return made


def case(layer_types: list[str], past: int, q_len: int, implementation: str = "sdpa", **overlay: Any) -> Any:
    """A cache of `past` tokens, what tokens are real, and the masks that transformers makes of them."""
    settings = config(layer_types, implementation)
    cache = PagedCache(settings)
    pads = torch.tensor([0, 3, 5])
    if past:
        cache.start(ROWS, pads.numpy())
        for layer in range(len(layer_types)):
            cache.update(torch.randn(ROWS, 1, past, 4), torch.randn(ROWS, 1, past, 4), layer)
    real = (torch.arange(past + q_len) >= pads[:, None]).long()
    named = {compat.CACHE: cache}
    given = create_masks_for_generate(settings, torch.zeros(ROWS, q_len, 8), real, **named, **overlay)
    return SimpleNamespace(cache=cache, real=real, given=given, q_len=q_len)


def read(case: Any, given: Any = None) -> Expanded:
    return read_expanded(case.given if given is None else given, case.cache, ROWS, case.q_len)


BOTH = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("layer_types", [BOTH, BOTH[:1] * 2, BOTH[1:]], ids=["both", "windows", "full"])
@pytest.mark.parametrize(("past", "q_len"), [(0, 13), (PAST, 1), (PAST, 5), (PAST, 12)])
def test_masks_that_transformers_makes_are_causal_and_say_what_is_real(layer_types, past, q_len, implementation):
    made = case(layer_types, past, q_len, implementation)
    found = read(made)
    assert found.causal
    assert found.explicit
    assert torch.equal(found.real, made.real)
    if len(made.given) == 1:  # one mask for all layers
        (mask,) = made.given.values()
        assert read(made, mask).causal


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(("past", "q_len"), [(0, 13), (PAST, 1), (PAST, 5)])
def test_an_entry_that_differs_shows(past, q_len, kind, monkeypatch):
    monkeypatch.setattr(masks, "MASK_ELEMENTS", 64)  # looked at in blocks of queries
    made = case(BOTH, past, q_len)
    mask = made.given[kind]
    for place in torch.randint(0, mask.numel(), (8,)):
        other = {name: value.clone() for name, value in made.given.items()}
        other[kind].view(-1)[place] ^= True
        found = read(made, other)
        assert not found.causal or not torch.equal(found.real, made.real)  # of one query: which tokens are real
    longer = {**made.given, kind: made.given[kind][..., 1:]}
    assert read(made, longer).causal  # a past that the mask does not reach back to is the cache's


def test_tokens_that_see_each_other_are_more_than_causal():
    blocks = torch.full((ROWS, 13), -1)
    blocks[:, 7:10] = 0
    made = case(BOTH[1:], 0, 13, block_sequence_ids=blocks)
    found = read(made)
    assert not found.causal
    assert torch.equal(found.real, made.real)


def test_one_mask_for_layers_of_two_kinds_is_more_than_causal():
    made = case(BOTH, 0, 13)
    assert not read(made, made.given["full_attention"]).causal


def test_no_mask_says_that_all_is_real_and_leaves_it_to_the_layers_whether_they_are_causal():
    made = case(BOTH, 0, 13)
    found = read(made, dict.fromkeys(BOTH))
    assert found == Expanded(None, True, False)


def test_masks_of_layers_that_keep_states_have_to_name_the_same_tokens():
    made = case(BOTH[1:], 0, 13)
    assert read(made, {**made.given, "linear_attention": made.real}).causal
    assert not read(made, {**made.given, "linear_attention": torch.ones_like(made.real)}).causal


@pytest.mark.parametrize("given", [torch.ones(2, 1, 13, 13), torch.ones(ROWS, 1, 12, 13), torch.ones(ROWS, 1, 13, 99)])
def test_a_mask_of_another_shape_is_not_served(given):
    with pytest.raises(NotServed, match=r"attention_mask is \["):
        read(case(BOTH[1:], 0, 13), given)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(9, 9), (9, 6)], ids=["equal", "padded"])
@pytest.mark.parametrize("both_ways", [False, True])
def test_a_known_familys_prompt_attends_as_its_mask_says(lengths, both_ways):
    """Padding is left out of such a prompt only where the mask is no more than causal."""
    model, inputs = tiny("llama", num_hidden_layers=1), left_padded(*lengths)
    mask = torch.ones(9, 9, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[:, :, 3:6, 3:6] |= both_ways
    mask &= inputs["attention_mask"][:, None, None] != 0
    expected = model.model(inputs["input_ids"], attention_mask=mask).last_hidden_state
    pkv_hf.patch(model)
    cache = PagedCache(model.config)
    found = model.model(inputs["input_ids"], attention_mask=mask, **{compat.CACHE: cache}).last_hidden_state
    real = inputs["attention_mask"] != 0
    torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)
    assert_on_pages(model)
    assert pkv_hf.report(model).calls.masked == both_ways
