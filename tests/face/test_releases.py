"""What holds with every release of transformers: pages are used, whatever it calls a cache, or it is said that not."""

from __future__ import annotations

import contextlib
import logging
import re
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaModel

import pkv_hf
from pkv_hf import PagedCache, compat
from pkv_hf.compat import CACHE
from tiny import COMMON, assert_on_pages, left_padded, randomized, tiny

pytestmark = pytest.mark.contract

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def there(inputs):
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "assistant": {"assistant_model": "patched"},
}


@contextlib.contextmanager
def listening():
    """What is said while it lasts: warnings, transformers' words and ours."""
    said = set()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.add(str(record.msg))
    loggers = [transformers.utils.logging.get_logger("transformers"), logging.getLogger("pkv_hf")]
    transformers.utils.logging.warning_once.cache_clear()  # each is said once a process
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield said
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
    said |= {str(warning.message) for warning in caught}


@pytest.mark.parametrize("route", ["auto", "split"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_runs_on_pages_without_a_word(mode, route):
    if route == "split":
        pytest.importorskip("triton")
    settings, inputs = dict(MODES[mode]), there(left_padded(30))
    if "assistant_model" in settings:
        settings["assistant_model"] = pkv_hf.patch(tiny("llama", 1, num_hidden_layers=1).to(DEVICE), route=route)
    model = tiny("llama", num_hidden_layers=1).to(DEVICE)

    def generate():
        torch.manual_seed(3)
        return model.generate(**inputs, max_new_tokens=8, **{"do_sample": False, **settings})

    with listening() as before:
        expected = generate()
    pkv_hf.patch(model, route=route)
    with listening() as said:
        assert torch.equal(generate(), expected)
        model.generate(**pkv_hf.prefix(model, inputs["input_ids"]).inputs([5, 6]), max_new_tokens=2, do_sample=False)
    assert {re.sub(r"\{.*?\}", "", text) for text in said} == {re.sub(r"\{.*?\}", "", text) for text in before}
    assert_on_pages(model)


def test_a_cache_by_its_older_name_is_used():
    """transformers takes the older names with a warning; so does a decoder that is called by itself."""
    model, inputs = tiny("llama"), left_padded(20, 20)
    for name in compat.CACHE_NAMES[compat.CACHE_NAMES.index(CACHE) :]:
        with warnings.catch_warnings(action="ignore"):
            expected = model.model(**inputs, **{name: DynamicCache(config=model.config)})[0]
        with pkv_hf.patched(model), torch.no_grad():
            cache = PagedCache(model.config)
            torch.testing.assert_close(model.model(**inputs, **{name: cache})[0], expected, atol=1e-4, rtol=1e-4)
            assert cache.get_seq_length() == 20
            assert_on_pages(model)


def test_a_cache_by_its_place_is_used():
    model = pkv_hf.patch(tiny("llama"))
    ids, cache = left_padded(20)["input_ids"], PagedCache(model.config)
    with torch.no_grad():
        model.model(ids, None, None, cache)
    assert cache.get_seq_length() == 20
    assert_on_pages(model)


class Renamed(LlamaModel):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, memory=None, **kwargs):
        return super().forward(input_ids, attention_mask, position_ids, memory, **kwargs)


class Passing(LlamaModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def with_decoder(decoder: type) -> LlamaForCausalLM:
    model = randomized(LlamaForCausalLM, LlamaConfig(**COMMON))
    model.model.__class__ = decoder
    return model


def test_a_decoder_that_takes_the_cache_by_another_name_is_refused():
    with pytest.raises(
        pkv_hf.UnsupportedModelError, match=f"its Renamed takes no '{CACHE}'.*{transformers.__version__}"
    ):
        pkv_hf.patch(with_decoder(Renamed))


def test_a_decoder_that_hands_all_arguments_on_is_served():
    model, inputs = with_decoder(Passing), left_padded(20, 9)
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    pkv_hf.patch(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), expected)
    assert_on_pages(model)


@pytest.mark.parametrize("tested", ["5.16.0", transformers.__version__])
def test_a_release_newer_than_any_tested_is_named_once(tested, monkeypatch, caplog):
    monkeypatch.setattr(compat, "NEWEST_TRANSFORMERS", tested)
    compat.warn_of_untested.cache_clear()
    for _ in range(2):
        pkv_hf.patch(tiny("llama"))
    said = [record.getMessage() for record in caplog.records if "newer" in record.getMessage()]
    assert len(said) == (tested != transformers.__version__)
    assert all(f"transformers {transformers.__version__} is newer" in text for text in said)
    assert all(f"{compat.OLDEST_TRANSFORMERS} to {tested}" in text for text in said)
    compat.warn_of_untested.cache_clear()


def test_a_release_with_another_name_for_a_cache_fails_at_patch_and_not_at_import():
    code = (
        "import dataclasses, transformers.modeling_outputs as outputs\n"
        "outputs.BaseModelOutputWithPast = dataclasses.make_dataclass('Renamed', ['last_hidden_state', 'memory'])\n"
        "import pkv_hf\n"
        "try: pkv_hf.patch(None)\n"
        "except pkv_hf.UnsupportedVersionError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"pip install 'transformers<={compat.NEWEST_TRANSFORMERS}'" in done.stdout
    assert "calls the cache of a forward by none of the names" in done.stdout


def test_forwards_and_steps_are_counted_by_what_ran_them():
    pytest.importorskip("triton")
    inputs = there(left_padded(20, 9))
    fused = {"static": 1, "captured": 4} if DEVICE == "cuda" else {"static": 5}  # the first of a shape is not captured
    for settings, steps in (
        ({"route": "split"}, fused),
        ({"route": "split", "fuse": False, "cuda_graphs": False}, {"eager": 5}),
        ({"route": "sdpa"}, {"eager": 5}),
    ):
        model = pkv_hf.patch(tiny("llama").to(DEVICE), **settings)
        model.generate(**inputs, max_new_tokens=6, do_sample=False)
        report = pkv_hf.report(model)
        assert (report.calls.pages, report.calls.transformers) == (6, 0)  # the prompt, and 5 tokens of 6
        assert vars(report.steps) == {"captured": 0, "static": 0, "eager": 0} | steps
        with torch.no_grad():
            model(**inputs)
        assert (pkv_hf.report(model).calls.pages, pkv_hf.report(model).calls.transformers) == (6, 1)
        assert not pkv_hf.report(model).left  # it had no cache of ours
        assert "calls     6 on pages, 1 by transformers" in str(pkv_hf.report(model))


def test_a_cache_that_the_decoder_never_gets_is_a_reason():
    model, inputs = tiny("llama"), left_padded(20)
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=False)
    loses = model.model.register_forward_pre_hook(
        lambda _, args, given: (args, {**given, CACHE: None}), with_kwargs=True
    )
    pkv_hf.patch(model)
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    report = pkv_hf.report(model)
    assert (report.calls.pages, report.calls.transformers) == (0, 1)
    assert report.left == ("generate() made a PagedCache, and LlamaModel was called without it",)
    loses.remove()
    pkv_hf.patch(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), expected)
    assert_on_pages(model)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({}, "there are neither input_ids nor inputs_embeds"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, "the call is of 1 x 0 tokens"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 0, 1]])}, "holes"),
    ],
    ids=["nothing", "no token", "holes"],
)
def test_a_call_with_a_cache_that_is_not_served_has_its_reason(call, reason):
    model = pkv_hf.patch(tiny("llama"))
    with torch.no_grad(), contextlib.suppress(Exception):  # transformers' own error, in the first two
        model.model(**call, **{CACHE: PagedCache(model.config)})
    (left,) = pkv_hf.report(model).left
    assert reason in left
    assert not pkv_hf.report(model).calls.pages
