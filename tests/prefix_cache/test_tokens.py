"""Prompts that begin as earlier ones did: the same tokens as without a prefix cache, and fewer to compute."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.version import Version

import pkv_hf
from pkv_hf.compat import CACHE
from tiny import COMMON, one, padded, prefix_use, randomized, tiny, tokens, with_prefix_cache

FAMILIES = ("llama", "mistral", "qwen2-windows", "qwen3")


@pytest.mark.contract
@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_that_comes_again(name, same):
    model, twin = with_prefix_cache(name)
    prompt = one(tokens(24, 1))  # within the windows
    same(model, twin, prompt)
    assert (prefix_use(model).prompts, prefix_use(model).hits, prefix_use(model).tokens_saved) == (1, 0, 0)
    same(model, twin, prompt)
    assert (prefix_use(model).prompts, prefix_use(model).hits, prefix_use(model).tokens_saved) == (2, 1, 16)
    assert not pkv_hf.report(model).left


@pytest.mark.parametrize("page_size", [16, 32])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_chat_that_grows(name, page_size, same):
    """Each turn computes what came since the last: also where it has outgrown a window, turn by turn."""
    model, twin = with_prefix_cache(name, page_size=page_size)
    chat = tokens(20, 1)
    for turn in range(6):
        given = same(model, twin, one(chat))
        chat = given[0].tolist() + tokens(13, 10 + turn)
    assert prefix_use(model).hits == (5 if page_size == 16 else 4)
    assert prefix_use(model).not_cached == ()


ANSWERED = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "ends": {"eos_token_id": [5, 17, 40, 77, 90], "pad_token_id": 0},
    "as a dict": {"return_dict_in_generate": True},
    "beams": {"num_beams": 2},
    "all beams": {"num_beams": 2, "num_return_sequences": 2},
}


@pytest.mark.parametrize("run_ahead", [True, False])
@pytest.mark.parametrize("mode", ANSWERED)
def test_answers_are_kept_with_their_prompts(mode, run_ahead, same):
    """So that a turn computes what its user says; not those of beams, whose rows change places."""
    model, twin = with_prefix_cache("llama", run_ahead=run_ahead)
    prompts = padded(tokens(30, 1), tokens(23, 2))
    given = same(model, twin, prompts, max_new_tokens=40, **ANSWERED[mode])
    copies = len(given) // 2
    real = [row[pad:].tolist() for row, pad in zip(given, [0] * copies + [7] * copies)]
    saved = prefix_use(model).tokens_saved
    for row in real:
        same(model, twin, one(row, tokens(3, 3)))
    answered = [(len(row) - 1) // 16 * 16 for row in real]
    again = prefix_use(model).tokens_saved - saved
    assert again < sum(answered) if "beams" in mode else again == sum(answered)


def test_answers_of_a_loop_of_ones_own_are_not_kept(same):
    """Nobody knows what it gives the model after the prompt."""

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        model._prefill(input_ids, generation_config, kwargs)
        cache, ids = kwargs[CACHE], torch.full((1, 40), 9)
        mask = torch.ones(1, input_ids.shape[1] + 40)
        model(ids, attention_mask=mask, **{CACHE: cache}, use_cache=True)
        return torch.cat([input_ids, torch.full((1, 41), 7)], dim=1)

    model, twin = with_prefix_cache("llama")
    given = model.generate(**one(tokens(30, 1)), custom_generate=loop, max_new_tokens=41)
    same(model, twin, one(given[0].tolist(), [4]))
    assert prefix_use(model).tokens_saved == 16


@pytest.mark.parametrize("last", [15, 16, 17, 32, 33])
def test_a_prompt_is_never_left_without_a_token(last, same):
    model, twin = with_prefix_cache("llama")
    for _ in range(2):
        same(model, twin, one(tokens(last, 3)))
    assert prefix_use(model).tokens_saved == {15: 0, 16: 15, 17: 16, 32: 31, 33: 32}[last]


@pytest.mark.parametrize("name", ["llama", "qwen2-windows"])
def test_rows_of_one_batch_that_begin_alike_share_it(name, same):
    """At once, with nothing kept before, and of unequal lengths."""
    model, twin = with_prefix_cache(name)
    shots = tokens(20, 1)
    same(model, twin, padded(shots + tokens(3, 2), shots + tokens(1, 3), shots + tokens(4, 4)))
    assert prefix_use(model).hits == 3
    computed = 16 + 3 * (24 - 16)
    assert prefix_use(model).tokens_saved == 23 + 21 + 24 - computed
    same(model, twin, padded(shots + tokens(5, 5), shots))
    assert prefix_use(model).hits == 5


def test_what_all_rows_begin_with_runs_first_only_where_that_is_less(same):
    model, twin = with_prefix_cache("llama")
    same(model, twin, padded([*tokens(16, 1), 5], tokens(16, 1) + tokens(180, 2)))
    assert (prefix_use(model).hits, prefix_use(model).tokens_saved) == (0, 0)


RAGGED = {
    "all begin alike": lambda b: ([*b, 5], [*b, 6, 7], b + [8] * 9),
    "one has nothing kept": lambda b: ([*b, 5], tokens(33, 9), b + [8] * 9),
    "one is padding where the others begin": lambda b: (b + [5] * 30, b + [6] * 20, [9, 4]),
    "one is a part of the beginning": lambda b: (b + [5] * 3, b[:20], b[:16], [*b, 6]),
    "twice the same": lambda b: ([*b, 5], [*b, 5]),
    "another order": lambda b: ([*tokens(40, 11), 3], b + [6, 7] * 5),
}


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("batch", RAGGED)
def test_ragged_batches(batch, name, same):
    model, twin = with_prefix_cache(name)
    beginning = tokens(37, 1)
    same(model, twin, one(tokens(40, 11)))
    same(model, twin, one(beginning[:20]))
    same(model, twin, one([*beginning, 3, 4]))
    for _ in range(2):
        same(model, twin, padded(*RAGGED[batch](beginning)))


MODES = {
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "chunks": {"prefill_chunk_size": 16},
    "chunks of beams": {"prefill_chunk_size": 5, "num_beams": 2},
    "penalty": {"repetition_penalty": 1.3},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "no cache": {"use_cache": False},
}


@pytest.mark.contract
@pytest.mark.parametrize("mode", MODES)
def test_modes_of_generate(mode, same):
    """Older releases run the chunks of a prompt from its beginning whatever its cache holds, which is said."""
    model, twin = with_prefix_cache("llama")
    shots = tokens(40, 1)
    batches = [one(shots, [n, 5]) for n in range(3)]
    if "lookup" not in mode:
        batches += [padded(shots + tokens(3, 2), shots + tokens(7, 3))] * 2
    for inputs in batches:
        same(model, twin, inputs, **MODES[mode])
    goes_on = "chunks" not in mode or Version(transformers.__version__) >= Version("5.24")
    assert (prefix_use(model).hits > 0) == (goes_on and mode not in ("prompt lookup", "no cache"))
    assert (prefix_use(model).not_cached == ()) == (goes_on and mode != "prompt lookup")


def test_padding_before_kept_tokens_reads_as_zeros():
    model, _ = with_prefix_cache("llama")
    for _ in range(2):
        inputs = padded(tokens(60, 1), tokens(41, 1), tokens(55, 1))
        cache = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)[CACHE]
        for layer in cache.layers:
            assert layer.keys.isfinite().all()
            assert layer.values.isfinite().all()
    assert prefix_use(model).hits


def test_what_was_kept_in_inference_mode_is_gone_on_from_outside_of_it(same):
    model, twin = with_prefix_cache("llama")
    for n in range(4):
        with torch.inference_mode(n % 2 == 0):
            same(model, twin, one(tokens(40, 1), tokens(60, n)))
    assert prefix_use(model).hits == 3


def test_an_assistant_with_a_prefix_cache():
    model, twin = with_prefix_cache("llama")
    draft, plain = with_prefix_cache("llama")
    for n in range(5, 8):
        prompt = one(tokens(40, 1), [n])
        expected = twin.generate(**prompt, assistant_model=plain, max_new_tokens=6, do_sample=False)
        given = model.generate(**prompt, assistant_model=draft, max_new_tokens=6, do_sample=False)
        assert torch.equal(given, expected)
    assert (prefix_use(draft).hits, prefix_use(draft).not_cached) == (2, ())
    assert [reason.split()[0] for reason in prefix_use(model).not_cached] == ["prompts"]


@pytest.mark.parametrize("route", ["split"])
def test_static_steps_go_on_from_kept_pages(route, same):
    pytest.importorskip("triton")
    model, twin = with_prefix_cache("llama", route=route)
    for n in range(3):
        same(model, twin, one(tokens(24, 1), [n]), max_new_tokens=4)
        same(model, twin, padded(tokens(24, 1) + [n] * 12, [*tokens(24, 1), 7]), max_new_tokens=3)
    assert prefix_use(model).hits == 8
    assert pkv_hf.report(model).steps.static


def test_what_comes_back_is_as_without(same):
    model, twin = with_prefix_cache("llama")
    asked = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for n in range(2):
        prompt = one(tokens(40, 1), [n])
        expected, given = twin.generate(**prompt, **asked), model.generate(**prompt, **asked)
        assert torch.equal(given.sequences, expected.sequences)
        torch.testing.assert_close(given.logits, expected.logits, rtol=1e-4, atol=1e-4)
        ours, theirs = given[CACHE], expected[CACHE]
        assert ours.get_seq_length() == theirs.get_seq_length()
        for a, b in zip(ours.layers, theirs.layers):
            torch.testing.assert_close(a.keys, b.keys, rtol=1e-4, atol=1e-4)
        more = torch.cat([given.sequences, prompt["input_ids"][:, :3]], dim=1)
        expected = twin.generate(more, **{CACHE: theirs}, max_new_tokens=3, do_sample=False)
        assert torch.equal(model.generate(more, **{CACHE: ours}, max_new_tokens=3, do_sample=False), expected)
    assert prefix_use(model).hits == 1
    assert prefix_use(model).not_cached == ("the call goes on from a cache of its caller's",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_twice_as_much(dtype):
    exact = tiny("llama").double()
    theirs = copy.deepcopy(exact).to(dtype)
    ours = pkv_hf.patch(copy.deepcopy(theirs), prefix_cache="4MiB")
    asked = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
    errors = []
    for seed in range(12):
        prompt = one(tokens(48, 1), tokens(3, seed))
        right, own, mine = (m.generate(**prompt, **asked).logits[0].double() for m in (exact, theirs, ours))
        errors.append(((own - right).square().mean(), (mine - right).square().mean()))
    own, mine = torch.tensor(errors).mean(dim=0).sqrt()
    assert prefix_use(ours).hits == 11
    assert mine <= 2 * own


def test_threads_share_a_prefix_cache():
    model, twin = with_prefix_cache("llama", budget=200_000)  # of few pages: threads let go of each other's
    prompts = [one(tokens(40, seed % 2), tokens(20, seed)) for seed in range(6)]
    expected = [twin.generate(**prompt, max_new_tokens=4, do_sample=False) for prompt in prompts]
    errors = []

    def run(first):
        for i in range(8):
            n = (first + i) % len(prompts)
            if not torch.equal(model.generate(**prompts[n], max_new_tokens=4, do_sample=False), expected[n]):
                errors.append(n)

    threads = [threading.Thread(target=run, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert prefix_use(model).hits
    assert prefix_use(model).prompts == 24


PIECES = [tokens(count, count) for count in (3, 16, 17, 40, 64)]
PROMPTS = st.lists(st.lists(st.sampled_from(range(len(PIECES))), min_size=1, max_size=4), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def tight():
    return with_prefix_cache("qwen2-windows", budget=150_000)


@given(prompts=PROMPTS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_prompts_in_any_order(tight, same, prompts):
    """Of one model, whose few pages are let go of and taken again; rows of prompts are pieces that come again."""
    model, twin = tight
    same(model, twin, padded(*([token for i in pieces for token in PIECES[i]] for pieces in prompts)), max_new_tokens=2)
    assert prefix_use(model).nbytes <= 150_000


def test_experts_and_layers_of_unequal_heads(same):
    """What is not understood of a layer is computed token by token all the same."""
    config = transformers.Qwen3MoeConfig(
        **{**COMMON, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    )
    twin = randomized(transformers.Qwen3MoeForCausalLM, config)
    model = pkv_hf.patch(copy.deepcopy(twin), prefix_cache="4MiB")
    for n in range(3):
        same(model, twin, one(tokens(40, 1), [n]))
        same(model, twin, padded(tokens(40, 1) + [n] * 3, tokens(36, 1)))
    assert prefix_use(model).hits == 8
