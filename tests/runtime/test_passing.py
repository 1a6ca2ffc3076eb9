"""Service that a passing cause took away comes back, and what the cause did meanwhile was transformers' own."""

from __future__ import annotations

import pytest
import torch
import transformers

import pkv_hf
from pkv_hf.compat import CACHE
from pkv_hf.runtime.captured.graphs import CaptureError
from pkv_hf.runtime.captured.static import StaticStep
from tiny import COMMON, left_padded, randomized, tiny

INPUTS = left_padded(12, 7)
FAMILIES = {"llama": "split", "olmo2": "auto"}


def model_of(family):
    if family == "llama":
        return tiny("llama", num_hidden_layers=2)
    return randomized(transformers.Olmo2ForCausalLM, transformers.Olmo2Config(**COMMON))


def generate(model, **settings):
    return model.generate(**INPUTS, **{"max_new_tokens": 4, "do_sample": False, **settings})


def hidden_states(model):
    with torch.no_grad():
        model(**INPUTS, output_hidden_states=True)


def fewer_layers(model):
    model.config.num_hidden_layers = 1
    with torch.no_grad():
        first = model(**INPUTS, **{CACHE: pkv_hf.PagedCache(model.config)}).logits[:, -1]
    generate(model)
    model.config.num_hidden_layers = COMMON["num_hidden_layers"] if len(model.model.layers) == 3 else 2
    return first


def eager_and_back(model):
    model.set_attn_implementation("eager")
    tokens = generate(model)
    model.set_attn_implementation("sdpa")
    return tokens


def hook_that_fails(model):
    def fails(*_):
        raise RuntimeError("the hook's own")

    handle = model.model.layers[1].register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="the hook's own"):
        generate(model)
    handle.remove()


def hook_that_masks(model):
    """A hook that keeps the last two tokens but one from attention."""

    def masks(_, args, kwargs):
        mask = kwargs["attention_mask"]
        if mask is None:
            mask = torch.ones(2, 1, 1, 1, dtype=torch.bool).tril()
        mask = mask.clone()
        mask[..., -2] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask}

    handle = model.model.layers[1].self_attn.register_forward_pre_hook(masks, with_kwargs=True)
    tokens = generate(model)
    handle.remove()
    return tokens


def other_scale(model):
    for layer in model.model.layers[1:]:
        layer.self_attn.scaling *= 3
    tokens = generate(model)
    for layer in model.model.layers[1:]:
        layer.self_attn.scaling /= 3
    return tokens


CAUSES = {
    cause.__name__: cause
    for cause in (hidden_states, fewer_layers, eager_and_back, hook_that_fails, hook_that_masks, other_scale)
}


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_service_comes_back(family, cause):
    other, model = model_of(family), pkv_hf.patch(model_of(family), route=FAMILIES[family])
    plain = generate(other)
    expected = CAUSES[cause](other)
    if family == "llama":
        assert torch.equal(generate(model), plain)
    got = CAUSES[cause](model)
    if expected is not None:
        torch.testing.assert_close(got, expected)
    before = pkv_hf.report(model)
    assert torch.equal(generate(model), plain)
    after = pkv_hf.report(model)
    assert after.calls.transformers == before.calls.transformers
    assert after.calls.pages == before.calls.pages + 4
    if family == "llama":
        assert after.steps.static == before.steps.static + 3


def test_hooks_see_transformers_masks():
    seen = []
    for patched in (False, True):
        model = tiny("mistral")
        if patched:
            pkv_hf.patch(model)
        masks = []
        for layer in model.model.layers:
            layer.register_forward_pre_hook(
                lambda _, __, kwargs, kept=masks: kept.append(kwargs["attention_mask"]), with_kwargs=True
            )
        generate(model, max_new_tokens=16)
        seen.append(masks)
    assert len(seen[0]) == len(seen[1]) > 0
    for ours, theirs in zip(seen[1], seen[0]):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    assert pkv_hf.report(model).calls.transformers == 0


@pytest.mark.parametrize("message", ["CUDA error: out of memory", "operation not permitted"])
def test_a_capture_that_fails(message, monkeypatch):
    """Where memory ran out the next call tries again; what cannot be captured is not tried until a module changes."""
    from pkv_hf.runtime import choice, forward

    tried = []

    def fails(step, *_):
        tried.append(step)
        raise CaptureError(message)

    model = tiny("llama", num_hidden_layers=1)
    expected = generate(model)
    pkv_hf.patch(model, route="split")
    uncaptured = choice.uncaptured
    for module in (choice, forward):
        monkeypatch.setattr(module, "uncaptured", lambda state, _: uncaptured(state, torch.device("cuda")))
    monkeypatch.setattr(StaticStep, "_replay", fails)
    every_call = "memory" in message
    for call in range(1, 4):  # of the first, the second step is tried, right after the one before
        assert torch.equal(generate(model), expected)
        assert len(tried) == (call if every_call else 1)
    model.model.layers[0].mlp = tiny("llama", num_hidden_layers=1).model.layers[0].mlp
    assert torch.equal(generate(model), expected)
    assert len(tried) == (4 if every_call else 2)
    assert pkv_hf.report(model).calls.transformers == 0
