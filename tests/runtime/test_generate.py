"""Greedy tokens of patched models are transformers' own, fp32, in every mode that is served on pages."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import DynamicCache, TextIteratorStreamer

import pkv_hf
from pkv_hf import PagedCache
from pkv_hf.compat import CACHE
from tiny import FAMILIES, assert_on_pages, left_padded, tiny

pytestmark = pytest.mark.contract

PROMPTS = {"one row": (50,), "left-padded": (60, 53, 27, 1)}


def generate(model, inputs, new_tokens=40, **settings):
    return model.generate(
        **inputs, max_new_tokens=new_tokens, return_dict_in_generate=True, **{"do_sample": False, **settings}
    )


def assert_served(model, output) -> None:
    """The tokens came from pages, not from a fallback."""
    assert isinstance(output[CACHE], PagedCache)
    assert_on_pages(model)


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_identical(family, prompt, page_size):
    model, inputs = tiny(family), left_padded(*PROMPTS[prompt])
    expected = generate(model, inputs, 200)
    assert len(set(expected.sequences[0, -100:].tolist())) > 10  # tokens wander, so that a wrong one shows
    with pkv_hf.patched(model, page_size=page_size):
        output = generate(model, inputs, 200)
        assert_served(model, output)
    assert torch.equal(output.sequences, expected.sequences)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unpatched_model_takes_a_paged_cache(family):
    model, inputs = tiny(family), left_padded(60, 27, 1)
    expected = generate(model, inputs)
    output = generate(model, inputs, **{CACHE: PagedCache(model.config)})
    assert torch.equal(output.sequences, expected.sequences)


@pytest.mark.parametrize("route", ["split", "workqueue"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_triton_routes_give_the_same_tokens(family, route):
    pytest.importorskip("triton")
    model, inputs = tiny(family), left_padded(30, 9)
    expected = generate(model, inputs, 8)
    with pkv_hf.patched(model, route=route):
        output = generate(model, inputs, 8)
        assert pkv_hf.report(model).route == route
        assert_served(model, output)
    assert torch.equal(output.sequences, expected.sequences)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.3},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"repetition_penalty": 1.3},
        {"prompt_lookup_num_tokens": 4},
        {"prefill_chunk_size": 16},
        {"eos_token_id": [5, 17, 40], "min_new_tokens": 4},
        {"use_cache": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2-windows"])
def test_settings_of_generate(family, settings):
    model = tiny(family)
    inputs = left_padded(50) if "prompt_lookup_num_tokens" in settings else left_padded(50, 31)
    torch.manual_seed(1)
    expected = generate(model, inputs, 24, **settings)
    with pkv_hf.patched(model):
        torch.manual_seed(1)
        output = generate(model, inputs, 24, **settings)
    assert torch.equal(output.sequences, expected.sequences)


def test_scores_logits_and_hidden_states_come_too():
    model, inputs = tiny("llama"), left_padded(20, 11)
    settings = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    expected = generate(model, inputs, 10, **settings)
    with pkv_hf.patched(model):
        output = generate(model, inputs, 10, **settings)
        assert_served(model, output)
    for name in ("scores", "logits"):
        for ours, theirs in zip(output[name], expected[name]):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(output.hidden_states, expected.hidden_states):
        assert len(ours) == len(theirs)
        torch.testing.assert_close(ours[-1][:, -1], theirs[-1][:, -1], atol=1e-4, rtol=1e-4)


def test_inputs_embeds():
    model, inputs = tiny("qwen3"), left_padded(20, 11)
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]),
        "attention_mask": inputs["attention_mask"],
    }
    expected = generate(model, embedded)
    with pkv_hf.patched(model):
        output = generate(model, embedded)
        assert_served(model, output)
    assert torch.equal(output.sequences, expected.sequences)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("lengths", [(20,), (20, 11)])
def test_a_second_turn_reuses_the_cache(family, lengths):
    """The second turn has no padding of its own, so that its mask is still left padding alone."""
    model, inputs = tiny(family), left_padded(*lengths)
    turn = torch.randint(2, 128, (len(lengths), 7))

    def conversation(cache):
        first = generate(model, inputs, 15, **{CACHE: cache})
        ids = torch.cat([first.sequences, turn], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), 22, dtype=torch.long)], dim=1)
        return generate(model, {"input_ids": ids, "attention_mask": mask}, 15, **{CACHE: cache})

    expected = conversation(DynamicCache(config=model.config))
    with pkv_hf.patched(model):
        output = conversation(PagedCache(model.config))
        assert_served(model, output)
        in_pages = output[CACHE].memory().pages_in_use
    assert torch.equal(output.sequences, expected.sequences)
    assert in_pages <= sum(-(-length // 16) + 4 for length in lengths)


def test_forks_of_a_prompt_continue_apart():
    model = pkv_hf.patch(tiny("llama"))
    prompt = left_padded(40)["input_ids"]
    base = PagedCache(model.config)
    with torch.no_grad():
        model(prompt, **{CACHE: base})
    turns = [torch.randint(2, 128, (1, 5)) for _ in range(3)]
    forks = [base.fork() for _ in turns]
    outputs = [
        generate(model, {"input_ids": torch.cat([prompt, turn], 1)}, 10, **{CACHE: fork})
        for turn, fork in zip(turns, forks)
    ]
    assert base.memory().pages_shared == 2  # 40 tokens in pages of 16: every fork copied the third to write into it
    pkv_hf.unpatch(model)
    for turn, output in zip(turns, outputs):
        assert torch.equal(output.sequences, generate(model, {"input_ids": torch.cat([prompt, turn], 1)}, 10).sequences)


def test_streaming_from_another_thread():
    class Tokenizer:
        def decode(self, ids, **_):
            return "".join(f"{i} " for i in ids)

    model, inputs = pkv_hf.patch(tiny("llama")), left_padded(20)
    expected = generate(pkv_hf.unpatch(model), inputs, 12).sequences[0].tolist()
    pkv_hf.patch(model)
    streamer = TextIteratorStreamer(Tokenizer(), timeout=60)
    thread = threading.Thread(target=generate, args=(model, inputs, 12), kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert [int(word) for word in text.split()] == expected


def test_an_exception_in_a_streamer_leaves_the_model_and_the_cache_right():
    model, inputs = tiny("llama"), left_padded(20)
    expected = generate(model, inputs, 12)
    pkv_hf.patch(model)

    class Failing:
        puts = 0

        def put(self, value):
            self.puts += 1
            if self.puts == 5:
                raise KeyboardInterrupt

        def end(self):
            pass

    cache = PagedCache(model.config)
    with pytest.raises(KeyboardInterrupt):
        generate(model, inputs, 12, streamer=Failing(), **{CACHE: cache})
    assert cache.step is None
    assert torch.equal(generate(model, inputs, 12).sequences, expected.sequences)
    cache.reset()
    assert torch.equal(generate(model, inputs, 12, **{CACHE: cache}).sequences, expected.sequences)


def test_a_forward_that_fails_halfway_leaves_the_cache_as_it_was():
    model, inputs = pkv_hf.patch(tiny("llama")), left_padded(20, 11)
    cache = PagedCache(model.config)
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
    before = [layer.keys.clone() for layer in cache.layers], cache.memory().pages_in_use

    def fail(*_):
        raise RuntimeError("halfway")

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 40, dtype=torch.long)], dim=1)
    with torch.no_grad(), pytest.raises(RuntimeError, match="halfway"):
        model(torch.ones(2, 40, dtype=torch.long), attention_mask=mask, **{CACHE: cache})
    handle.remove()
    assert cache.step is None
    assert {layer.length for layer in cache.layers} == {20}
    assert cache.memory().pages_in_use == before[1]
    for layer, keys in zip(cache.layers, before[0]):
        assert torch.equal(layer.keys, keys)


@pytest.mark.parametrize("lengths", [(33,), (60, 53, 27, 1)])
@pytest.mark.parametrize("page_size", [16, 64])
def test_generate_reserves_just_the_pages_of_its_tokens(lengths, page_size):
    model, inputs = pkv_hf.patch(tiny("llama"), page_size=page_size), left_padded(*lengths)
    memory = generate(model, inputs, 21)[CACHE].memory()
    end = max(lengths) + 21 - 1  # the last token is not fed back
    pages = sum(-(-end // page_size) - (max(lengths) - length) // page_size for length in lengths)
    assert (memory.pages_in_use, memory.pages_free) == (pages, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_twice_as_much_as_sdpa(dtype):
    exact, model, inputs = tiny("llama").double(), tiny("llama").to(dtype), left_padded(60, 27)
    with torch.no_grad():
        expected = exact(**inputs).logits[:, -1]
        theirs = model(**inputs).logits[:, -1]
        ours = pkv_hf.patch(model)(**inputs, **{CACHE: PagedCache(model.config)}).logits[:, -1]
    error, bound = (float((logits - expected).square().mean().sqrt()) for logits in (ours, theirs))
    assert error <= 2 * bound
