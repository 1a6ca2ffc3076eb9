"""What runs beside a patched model or around it: threads, forks, other models of its weights, torch's modes."""

from __future__ import annotations

import threading

import pytest
import torch

import pkv_hf
from pkv_hf.cache.paged import PagedCache
from pkv_hf.compat import CACHE
from pkv_hf.kernels.checks.attention import rms
from tiny import assert_on_pages, decode_logits, left_padded, tiny

ROUTES = ("sdpa", "split")  # transformers' loop, and the run-ahead loop over static steps


def in_threads(count, run):
    errors = []

    def guarded(index):
        try:
            run(index)
        except BaseException as error:  # a thread's own traceback would not fail the test
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("route", ROUTES)
def test_threads_share_a_patched_model(route):
    model = tiny("llama")
    prompts = [left_padded(*lengths, seed=seed) for seed, lengths in enumerate([(20,), (9, 14), (33,), (5, 40, 2)])]
    expected = [model.generate(**prompt, max_new_tokens=7, do_sample=False) for prompt in prompts]
    pkv_hf.patch(model, route=route)

    def run(index):
        for _ in range(3):
            assert torch.equal(model.generate(**prompts[index], max_new_tokens=7, do_sample=False), expected[index])

    in_threads(len(prompts), run)


def test_a_patched_and_an_unpatched_model_share_weights_across_threads():
    model = tiny("llama")
    other = type(model)(model.config).eval()
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        setattr(other.get_submodule(owner), last, parameter)
    prompt = left_padded(20, 9)
    expected = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    pkv_hf.patch(model)

    def run(index):
        for _ in range(3):
            assert torch.equal((model, other)[index].generate(**prompt, max_new_tokens=12, do_sample=False), expected)

    in_threads(2, run)
    assert other.base_model.__dict__.get("forward") is None


def test_threads_of_two_patched_models_and_of_one_that_is_patched_meanwhile():
    models = [tiny("llama", seed=1), tiny("mistral", seed=2), tiny("llama", seed=3)]
    prompt = left_padded(20, 9)
    expected = [model.generate(**prompt, max_new_tokens=12, do_sample=False) for model in models]
    pkv_hf.patch(models[0])
    pkv_hf.patch(models[1], page_size=32)

    def run(index):
        for _ in range(4):
            if index == 2:
                pkv_hf.patch(models[2])
            assert torch.equal(models[index].generate(**prompt, max_new_tokens=12, do_sample=False), expected[index])
            if index == 2:
                pkv_hf.unpatch(models[2])

    in_threads(3, run)


class Continued(torch.utils.data.Dataset):
    """Prompts continued by a model in whatever process asks for them."""

    def __init__(self, model, prompts):
        self.model, self.prompts = model, prompts

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, index):
        return self.model.generate(**self.prompts[index], max_new_tokens=8, do_sample=False)[0]


@pytest.mark.parametrize("route", ROUTES)
def test_a_forked_worker_of_a_data_loader_generates(route):
    model, prompts = tiny("llama"), [left_padded(length, seed=length) for length in (9, 20, 33)]
    expected = [tokens.tolist() for tokens in map(Continued(model, prompts).__getitem__, range(3))]
    pkv_hf.patch(model, route=route)
    model.generate(**prompts[0], max_new_tokens=8, do_sample=False)
    loader = torch.utils.data.DataLoader(
        Continued(model, prompts), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=120
    )
    assert [tokens.tolist() for tokens in loader] == expected
    assert model.generate(**prompts[0], max_new_tokens=8, do_sample=False)[0].tolist() == expected[0]


@pytest.mark.parametrize("route", ROUTES)
def test_generation_inside_inference_mode(route):
    model, inputs = tiny("llama"), left_padded(20, 9)
    with torch.inference_mode():
        expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        with pkv_hf.patched(model, route=route):
            assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False), expected)


@torch.no_grad()
def test_generation_under_autocast():
    """Of bfloat16 products near ties may fall differently: logits are judged, not tokens."""
    model, inputs = tiny("llama"), left_padded(20, 9)
    exact = decode_logits(tiny("llama").double(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = decode_logits(model, inputs)
        with pkv_hf.patched(model):
            ours = decode_logits(model, inputs)
            output = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
            assert type(output[CACHE]) is PagedCache
            assert_on_pages(model)
    assert rms(ours - exact) <= 2 * rms(theirs - exact)
