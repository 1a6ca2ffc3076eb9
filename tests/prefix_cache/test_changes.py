"""Weights, adapters and patches that change: nothing that was computed with others is gone on from."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import pkv_hf
from tiny import one, prefix_use, tiny, tokens, with_prefix_cache

PROMPT = one(tokens(40, 1))


def scaled(model, twin):
    for each in (model, twin):
        with torch.no_grad():
            each.model.layers[0].mlp.down_proj.weight.mul_(3)


def loaded(model, twin):
    other = tiny("llama", seed=5).state_dict()
    model.load_state_dict(other)
    twin.load_state_dict(other)


def assigned(model, twin):
    other = tiny("llama", seed=5).state_dict()
    for each in (model, twin):
        each.load_state_dict({name: tensor.clone() for name, tensor in other.items()}, assign=True)


def another_parameter(model, twin):
    for each in (model, twin):
        attention = each.model.layers[1].self_attn
        attention.k_proj.weight = torch.nn.Parameter(2 * attention.k_proj.weight.detach())


def a_setting(model, twin):
    for each in (model, twin):
        each.model.layers[1].self_attn.scaling *= 3


def by_data_then_said(model, twin):
    for each in (model, twin):
        each.model.layers[0].mlp.down_proj.weight.data.mul_(3)
    pkv_hf.clear_prefix_cache(model)


def trained(optimizer, steps=1, **settings):
    def train(model, twin):
        for each in (model, twin):
            steps_of = optimizer(each.parameters(), lr=0.05, **settings)
            for _ in range(steps):
                each.train()
                loss = each(**PROMPT, labels=PROMPT["input_ids"]).loss
                loss.backward()
                each.eval()
                each.generate(**PROMPT, max_new_tokens=1)  # between the gradients and the step
                steps_of.step()
                steps_of.zero_grad()

    return train


class Unseen:
    """An optimizer that is none of torch's, and writes around its counts."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr = list(parameters), lr

    def step(self):
        for parameter in self.parameters:
            parameter.data.sub_(self.lr * parameter.grad.sign())

    def zero_grad(self):
        pass


def trained_unseen(model, twin):
    for each in (model, twin):
        each.train()
        each(**PROMPT, labels=PROMPT["input_ids"]).loss.backward()
        Unseen(each.parameters(), 0.05).step()
        each.eval()


CHANGES = {
    "in place": scaled,
    "load_state_dict": loaded,
    "load_state_dict, assigned": assigned,
    "another parameter": another_parameter,
    "a setting": a_setting,
    "by .data, then said": by_data_then_said,
    "AdamW": trained(torch.optim.AdamW),
    "fused AdamW": trained(torch.optim.AdamW, fused=True),
    "SGD": trained(torch.optim.SGD),
    "an optimizer of one's own": trained_unseen,
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_empty_the_cache(change, same):
    model, twin = with_prefix_cache("llama")
    before = same(model, twin, PROMPT)
    CHANGES[change](model, twin)
    hits = prefix_use(model).hits
    assert not torch.equal(same(model, twin, PROMPT), before)
    assert prefix_use(model).hits == hits
    same(model, twin, PROMPT)
    assert prefix_use(model).hits == hits + 1


def test_a_setting_that_comes_back_finds_its_pages(same):
    model, twin = with_prefix_cache("llama")
    for scaling in (1.0, 3.0, 1.0, 3.0):
        for each in (model, twin):
            each.model.layers[1].self_attn.scaling = scaling
        same(model, twin, PROMPT)
    assert prefix_use(model).hits == 2


def test_a_dtype_of_its_own_under_autocast():
    model, twin = with_prefix_cache("llama")
    for _ in range(2):
        for dtype in (torch.bfloat16, None):
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                given = model.generate(**PROMPT, max_new_tokens=3, do_sample=False)
                if dtype is None:
                    assert torch.equal(given, twin.generate(**PROMPT, max_new_tokens=3, do_sample=False))
    assert prefix_use(model).hits == 0


class Changes(BaseStreamer):
    """Changes a model before one of its tokens."""

    def __init__(self, change, model, tokens):
        self.change, self.model, self.left = change, model, tokens

    def put(self, value):
        self.left -= 1
        if not self.left:
            self.change(self.model)

    def end(self):
        pass


def tripled(model):
    model.model.layers[0].mlp.down_proj.weight.data.mul_(3)
    if hasattr(model, "_pkv_hf_state"):
        pkv_hf.clear_prefix_cache(model)


def sharpened(model):
    model.model.layers[1].self_attn.scaling *= 3


@pytest.mark.parametrize(("change", "saved"), [(tripled, 0), (sharpened, 32)])
def test_changes_within_a_call_leave_nothing_of_what_came_after(change, saved, same):
    """Of weights not even the prompt, though it was computed before; a setting's prompt is right under the old one."""
    model, twin = with_prefix_cache("llama")
    before = model.model.layers[1].self_attn.scaling
    asked = {"max_new_tokens": 30, "do_sample": False}
    given, expected = (each.generate(**PROMPT, **asked, streamer=Changes(change, each, 20)) for each in (model, twin))
    assert torch.equal(given, expected)
    for each in (model, twin):
        each.model.layers[1].self_attn.scaling = before
    same(model, twin, one(given[0].tolist()))
    assert prefix_use(model).tokens_saved == saved


@pytest.fixture
def adapted():
    """A patched PEFT model of two adapters, and its twin."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = {"target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False, "r": 4}
    twin = peft.get_peft_model(tiny("llama"), peft.LoraConfig(**config, lora_alpha=64)).eval()
    twin.add_adapter("other", peft.LoraConfig(**config, lora_alpha=64))
    return pkv_hf.patch(copy.deepcopy(twin), prefix_cache="4MiB"), twin


def test_adapters_have_pages_of_their_own(adapted, same):
    model, twin = adapted
    given = {}
    for turn in range(2):
        for name in ("default", "other"):
            for each in adapted:
                each.set_adapter(name)
            given[name] = same(model, twin, PROMPT)
        with model.disable_adapter(), twin.disable_adapter():
            given[""] = same(model, twin, PROMPT)
        assert prefix_use(model).hits == 3 * turn
    assert len({tuple(row[0].tolist()) for row in given.values()}) == 3


def test_adapters_that_change_are_merged_or_go(adapted, same):
    model, twin = adapted

    def changed(change):
        for each in adapted:
            change(each)
        hits = prefix_use(model).hits
        same(model, twin, PROMPT)
        assert prefix_use(model).hits == hits
        same(model, twin, PROMPT)
        assert prefix_use(model).hits == hits + 1

    same(model, twin, PROMPT)
    changed(lambda each: each.merge_adapter())
    changed(lambda each: each.unmerge_adapter())
    with torch.no_grad():
        changed(lambda each: each.base_model.model.model.layers[0].mlp.down_proj.lora_B["default"].weight.mul_(-2))
    changed(lambda each: each.delete_adapter("other"))


def test_a_patch_keeps_what_is_its_own(same):
    model, twin = with_prefix_cache("llama")
    same(model, twin, PROMPT)
    pkv_hf.unpatch(model)
    same(model, twin, PROMPT)
    pkv_hf.patch(model, prefix_cache="4MiB")
    same(model, twin, PROMPT)
    assert (prefix_use(model).prompts, prefix_use(model).hits) == (1, 0)
    with pkv_hf.patched(model):
        assert prefix_use(model) is None
        assert "prefixes" not in repr(pkv_hf.report(model))
        same(model, twin, PROMPT)
    same(model, twin, PROMPT)
    assert (prefix_use(model).budget, prefix_use(model).hits) == (4 << 20, 0)
    assert "0 of 1 prompts began in kept pages" in repr(pkv_hf.report(model))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_keeps_prompts_of_its_own(copied, same):
    model, twin = with_prefix_cache("llama")
    same(model, twin, PROMPT)
    other = copied(model)
    assert (prefix_use(other).budget, prefix_use(other).prompts, prefix_use(other).nbytes) == (4 << 20, 0, 0)
    scaled(other, twin)
    for _ in range(2):
        same(other, twin, PROMPT)
    assert (prefix_use(other).hits, prefix_use(model).hits) == (1, 0)


def test_only_a_patched_model_is_cleared():
    with pytest.raises(ValueError, match="LlamaForCausalLM is not patched"):
        pkv_hf.clear_prefix_cache(tiny("llama"))
    pkv_hf.clear_prefix_cache(pkv_hf.patch(tiny("llama")))
