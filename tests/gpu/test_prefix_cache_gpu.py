"""Prompts that begin alike, on a GPU: kept pages under graphs, on streams of their own, in threads."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import pkv_hf
from tiny import one, padded, prefix_use, tiny, tokens

pytestmark = pytest.mark.gpu


@pytest.fixture
def models():
    twin = tiny("llama").cuda()
    return pkv_hf.patch(copy.deepcopy(twin), prefix_cache="4MiB"), twin


def on_gpu(prompt):
    return {name: tensor.cuda() for name, tensor in prompt.items()}


PROMPTS = [
    *[one(tokens(100, 1), tokens(9, seed)) for seed in range(4)],
    padded(tokens(100, 1) + tokens(20, 8), tokens(90, 1) + tokens(40, 9), tokens(3, 5)),
    padded(tokens(64, 2) + tokens(20, 8), tokens(64, 2) + tokens(7, 9)),
]


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 2}, {"prefill_chunk_size": 40}], ids=["greedy", "beams", "chunks"]
)
def test_tokens_are_as_without(models, settings):
    model, twin = models
    for prompt in PROMPTS * 2:
        asked = {**on_gpu(prompt), "max_new_tokens": 20, "do_sample": False, **settings}
        assert torch.equal(model.generate(**asked), twin.generate(**asked))
    assert prefix_use(model).hits > len(PROMPTS)
    assert pkv_hf.report(model).steps.captured
    assert not pkv_hf.report(model).left


def test_threads_on_streams_of_their_own(models):
    model, twin = models
    expected = [twin.generate(**on_gpu(p), max_new_tokens=8, do_sample=False) for p in PROMPTS]
    pkv_hf.patch(model, prefix_cache=300_000)  # of few pages: threads let go of each other's
    errors = []

    def run(first):
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(30):
                n = (first + i) % len(PROMPTS)
                given = model.generate(**on_gpu(PROMPTS[n]), max_new_tokens=8, do_sample=False)
                if not torch.equal(given.cpu(), expected[n].cpu()):
                    errors.append(n)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert prefix_use(model).hits


def test_memory_comes_back(models):
    model, _ = models
    asked = {"max_new_tokens": 4, "do_sample": False}
    model.generate(**on_gpu(PROMPTS[0]), **asked)
    pkv_hf.clear_prefix_cache(model)
    before = torch.cuda.memory_allocated()
    model.generate(**on_gpu(PROMPTS[0]), **asked)
    assert torch.cuda.memory_allocated() - before >= prefix_use(model).nbytes > 0
    pkv_hf.clear_prefix_cache(model)
    assert torch.cuda.memory_allocated() == before
