"""Models of every kind run ahead on static buffers as transformers' loop decodes them, or say why they do not."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from transformers.models.mistral3.modeling_mistral3 import Mistral3Model

import pkv_hf
from families.models import WRAPPERS, family_model
from families.modes import BOTH, media
from pkv_hf.compat import CACHE, decoder_of
from pkv_hf.replaced import STATE
from pkv_hf.runtime.ahead.logits import find
from tiny import COMMON, left_padded, randomized, tiny

pytestmark = pytest.mark.contract

NEW_TOKENS = 6


def generate(model, inputs, **settings):
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True, **settings}
    torch.manual_seed(0)
    return model.generate(**inputs, **settings), torch.rand(1)


def served(name):
    """A tiny model and its inputs: of images, where it takes them."""
    if name in WRAPPERS:
        model = family_model(name)
        inputs = media(model, name, BOTH)
    else:
        config, of_class, settings = SCALED[name]
        config = getattr(transformers, config)(**COMMON, **settings)
        model, inputs = randomized(getattr(transformers, of_class), config), left_padded(9, 4)
    if name in ("gemma2", "paligemma"):
        model.set_attn_implementation("eager")  # caps scores, in all releases
    return model, inputs


SCALED = {
    "granite": ("GraniteConfig", "GraniteForCausalLM", {"logits_scaling": 3.0}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {"logit_scale": 0.3}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"head_dim": 16, "final_logit_softcapping": 7.0}),
}
MADE = {
    "granite": (1 / 3.0, None),
    "cohere": (0.3, None),
    "gemma2": (1.0, 7.0),
    "qwen2.5-vl": (1.0, None),
    "qwen3-vl": (1.0, None),
    "gemma3": (1.0, None),
    "mistral3": (1.0, None),
    "gemma4": (1.0, None),
}
"""Scale and cap of the logits."""


@pytest.mark.parametrize("name", [*MADE, "paligemma"])  # which counts positions from 1, and caps in some releases
def test_steps_run_ahead_and_give_the_same_tokens(name, steps):
    model, inputs = served(name)
    expected, drawn = generate(model, inputs, output_logits=True)
    deltas = getattr(model.model, "rope_deltas", None)
    end = int(expected.sequences[0, -2])
    stopped, _ = generate(model, inputs, eos_token_id=end, pad_token_id=7)
    with pkv_hf.patched(model, fuse=False):
        for ran in ((NEW_TOKENS - 2, NEW_TOKENS - 1), (NEW_TOKENS - 1,)):  # the first step may show what layers bring
            ours, left = generate(model, inputs, output_logits=True)
            assert torch.equal(ours.sequences, expected.sequences)
            torch.testing.assert_close(torch.stack(ours.logits), torch.stack(expected.logits), atol=1e-3, rtol=1e-3)
            assert left == drawn, "the random generator was left elsewhere"
            assert len(steps) in ran
            steps.clear()
        (found,) = [found.logits for found in getattr(model, STATE).known.look().ahead.values()]
        assert (found.scale, found.cap) == MADE.get(name, (found.scale, found.cap))
        assert deltas is None or torch.equal(model.model.rope_deltas, deltas)
        ours, _ = generate(model, inputs, eos_token_id=end, pad_token_id=7)
        assert torch.equal(ours.sequences, stopped.sequences)
        assert ours[CACHE].get_seq_length() == stopped[CACHE].get_seq_length()
        assert not pkv_hf.report(model).not_run_ahead
        assert not pkv_hf.report(model).left


def test_what_else_a_decoder_is_given_of_its_tokens_goes_through_buffers(steps):
    """Gemma 4's wrapper makes an input of every layer."""
    model = family_model("gemma4")
    inputs = media(model, "gemma4", BOTH)
    expected, _ = generate(model, inputs, output_logits=True)
    with pkv_hf.patched(model, fuse=False, run_ahead=False):
        for _ in range(2):
            before = pkv_hf.report(model).steps.static
            ours, _ = generate(model, inputs, output_logits=True)
            assert torch.equal(ours.sequences, expected.sequences)
            torch.testing.assert_close(torch.stack(ours.logits), torch.stack(expected.logits), atol=1e-3, rtol=1e-3)
            assert pkv_hf.report(model).steps.static - before in (NEW_TOKENS - 2, NEW_TOKENS - 1)
    assert not steps


def test_tokens_whose_place_another_takes(steps):
    """Those of images, which a model may generate too."""
    model = family_model("gemma4")
    inputs = media(model, "gemma4", BOTH)
    config = model.config
    special = [config.image_token_id, config.audio_token_id, config.video_token_id]
    others = [token for token in range(config.text_config.vocab_size) if token not in special]
    settings = {"suppress_tokens": others, "output_logits": True}
    expected, _ = generate(model, inputs, **settings)
    with pkv_hf.patched(model, fuse=False):
        for _ in range(2):
            ours, _ = generate(model, inputs, **settings)
            assert torch.equal(ours.sequences, expected.sequences)
            torch.testing.assert_close(torch.stack(ours.logits), torch.stack(expected.logits), atol=1e-3, rtol=1e-3)
        (found,) = getattr(model, STATE).known.look().ahead.values()
    assert set(special) <= {*found.stand_in.tokens, found.stand_in.by}
    assert len(steps) > NEW_TOKENS


def own_logits(model):
    """What a model makes of its decoder's hidden states, by its own functions."""

    def run(hidden):
        decoder_of(model).forward = lambda **_: transformers.modeling_outputs.BaseModelOutputWithPast(hidden)
        try:
            return model(torch.zeros(hidden.shape[:2], dtype=torch.long)).logits
        finally:
            del decoder_of(model).forward

    return run


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCALED)
def test_other_logits_are_not_taken_for_known_ones(name, dtype):
    model = served(name)[0].to(dtype)
    run = own_logits(model)
    others = {
        "more": lambda hidden: run(hidden) * 1.01,
        "cut": lambda hidden: run(hidden)[..., :-1],
        "biased": lambda hidden: run(hidden) + 0.1,
        "capped": lambda hidden: 60 * torch.tanh(run(hidden) / 60),
        "of half": lambda hidden: run(hidden * torch.tensor([1, 0.5]).repeat(32).to(dtype)),
    }
    found, why = find(model, decoder_of(model), run, 2)
    assert (found.scale, found.cap) == MADE[name]
    assert not why
    for other in others.values():
        found, why = find(model, decoder_of(model), other, 2)
        assert found is None
        assert "are not its output embeddings'" in why


def other_embeddings(model, monkeypatch):
    scaled = torch.nn.Embedding.from_pretrained(1.5 * model.get_input_embeddings().weight.detach())
    monkeypatch.setattr(Mistral3Model, "get_input_embeddings", lambda _: scaled)


def of_one_token(model, monkeypatch):
    """The embedding of a token that the settings name, which the model makes something of."""
    weight = model.get_input_embeddings().weight.detach().clone()
    weight[model.config.image_token_id] = 0
    own = torch.nn.Embedding.from_pretrained(weight)
    monkeypatch.setattr(Mistral3Model, "get_input_embeddings", lambda _: own)


def other_positions(model, monkeypatch):
    prepare = type(model).prepare_inputs_for_generation

    def doubled(self, *args, **kwargs):
        inputs = prepare(self, *args, **kwargs)
        return {**inputs, "position_ids": 2 * inputs["position_ids"]}

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", doubled)
    monkeypatch.setattr(pkv_hf.origins, "of_a_library", lambda _: True)


def twice(model, monkeypatch):
    call = Mistral3Model.forward

    def forward(self, *args, **kwargs):
        call(self, *args, **{**kwargs, CACHE: None})
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Mistral3Model, "forward", forward)
    monkeypatch.setattr(pkv_hf.origins, "of_a_library", lambda _: True)


def generation_of_its_own(model, monkeypatch):
    prepare = type(model).prepare_inputs_for_generation
    around = functools.wraps(prepare)(lambda *args, **kwargs: prepare(*args, **kwargs))
    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", around)


OTHERS = {
    other_embeddings: "makes something else of tokens than of inputs_embeds",
    of_one_token: "makes something else of tokens than of inputs_embeds",
    other_positions: "do not go on by one",
    twice: "does not call its decoder just once",
    generation_of_its_own: "prepare_inputs_for_generation of the Mistral3ForConditionalGeneration",
}


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.__name__)
def test_what_is_not_known_runs_as_it_is(other, steps, monkeypatch):
    model, inputs = served("mistral3")
    other(model, monkeypatch)
    expected, _ = generate(model, inputs)
    with pkv_hf.patched(model, fuse=False):
        for _ in range(2):
            assert torch.equal(generate(model, inputs)[0].sequences, expected.sequences)
        assert OTHERS[other] in pkv_hf.report(model).not_run_ahead
        assert OTHERS[other] in repr(pkv_hf.report(model))
    assert not steps


def test_that_run_ahead_is_off_is_said():
    with pkv_hf.patched(tiny("llama"), run_ahead=False) as model:
        assert pkv_hf.report(model).not_run_ahead == "patch() was called with run_ahead=False"


def test_a_model_none_of_whose_settings_is_a_token_runs_ahead(steps):
    model, inputs = served("granite")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, None)
    expected, _ = generate(model, inputs)
    with pkv_hf.patched(model, fuse=False):
        for _ in range(2):
            assert torch.equal(generate(model, inputs)[0].sequences, expected.sequences)
        assert not pkv_hf.report(model).not_run_ahead
    assert len(steps) > NEW_TOKENS
