"""Real weights and real text: SmolLM2-135M in the classes that its weights fit."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import MistralForCausalLM, Qwen2ForCausalLM

import pkv_hf
from pkv_hf import PagedCache
from pkv_hf.bench.inputs.smollm2 import in_class
from pkv_hf.compat import CACHE
from tiny import assert_on_pages


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2"])
def model(request, smollm2):
    if request.param == "mistral":
        return in_class(smollm2, MistralForCausalLM, sliding_window=256)
    return in_class(smollm2, Qwen2ForCausalLM) if request.param == "qwen2" else smollm2


def generate(model, inputs, new_tokens=16, **settings):
    return model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, **settings
    )


def test_one_row(model, pydoc_ids):
    inputs = {"input_ids": pydoc_ids[:, :500]}
    expected = generate(model, inputs)
    with pkv_hf.patched(model):
        output = generate(model, inputs)
        assert_on_pages(model)
    assert isinstance(output[CACHE], PagedCache)
    assert torch.equal(output.sequences, expected.sequences)


def test_left_padded_rows(model, pydoc_ids):
    lengths = (300, 170, 30)
    ids = torch.full((3, 300), model.config.pad_token_id)
    for row, length in enumerate(lengths):
        ids[row, 300 - length :] = pydoc_ids[0, 5000 * row : 5000 * row + length]
    mask = torch.stack([(torch.arange(300) >= 300 - length).long() for length in lengths])
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = generate(model, inputs)
    with pkv_hf.patched(model):
        assert torch.equal(generate(model, inputs).sequences, expected.sequences)
        assert_on_pages(model)


def test_beams_assisted_and_prompt_lookup(smollm2, pydoc_ids):
    inputs = {"input_ids": pydoc_ids[:, :300]}
    draft = copy.deepcopy(smollm2)  # its first layers, which agree with it now and then
    draft.model.layers = draft.model.layers[:6]
    draft.config.num_hidden_layers = 6
    for settings in ({"prompt_lookup_num_tokens": 5}, {"num_beams": 3}, {"assistant_model": draft}):
        expected = generate(smollm2, inputs, 16, **settings)
        with pkv_hf.patched(smollm2), pkv_hf.patched(draft):
            assert torch.equal(generate(smollm2, inputs, 16, **settings).sequences, expected.sequences)
            assert_on_pages(smollm2)


def test_two_turns(smollm2, pydoc_ids):
    def conversation(cache):
        ids = pydoc_ids[:, :200]
        for begin in (200, 260):
            ids = generate(smollm2, {"input_ids": ids}, **{CACHE: cache}).sequences
            ids = torch.cat([ids, pydoc_ids[:, begin : begin + 60]], dim=1)
        return ids

    expected = conversation(None)
    with pkv_hf.patched(smollm2):
        assert torch.equal(conversation(PagedCache(smollm2.config)), expected)
