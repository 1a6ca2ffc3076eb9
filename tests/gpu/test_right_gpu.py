"""What only a GPU shows of being right: the loop that runs ahead of it, captured steps that come back, beams."""

from __future__ import annotations

import os
import statistics
import time

import pytest
import torch
from transformers import LogitsProcessor

pytest.importorskip("triton")

import pkv_hf
from pkv_hf.compat import CACHE
from tiny import assert_on_pages, left_padded, on_gpu, tiny

pytestmark = pytest.mark.gpu


def generate(model, inputs, **settings):
    return model.generate(**inputs, **{"max_new_tokens": 40, "do_sample": False, **settings})


@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="times want the GPU alone")
def test_a_step_takes_as_long_after_hidden_states_were_asked_for(record_property):
    models = [pkv_hf.patch(tiny("llama", num_hidden_layers=16).cuda()) for _ in range(2)]
    inputs = on_gpu(60, 53)
    with torch.no_grad():
        models[1](**inputs, output_hidden_states=True)
    times: list[list[float]] = [[], []]
    for _ in range(9):  # in turns: the host drifts
        for model, taken in zip(models, times):
            for new_tokens in (8, 136):
                torch.cuda.synchronize()
                began = time.perf_counter()
                generate(model, inputs, max_new_tokens=new_tokens)
                torch.cuda.synchronize()
                taken.append(time.perf_counter() - began)
    steps = [statistics.median(long - short for short, long in zip(each[::2], each[1::2])) / 128 for each in times]
    record_property("step_ms", {"never asked": 1e3 * steps[0], "asked before": 1e3 * steps[1]})
    assert pkv_hf.report(models[0]).steps == pkv_hf.report(models[1]).steps
    assert steps[1] < 1.05 * steps[0], steps
    assert not pkv_hf.report(models[1]).left


@pytest.mark.parametrize("new_tokens", [5, 40])
@pytest.mark.parametrize("num_beams", [2, 4])
@torch.no_grad()
def test_the_cache_of_a_beam_search_is_transformers_own(num_beams, new_tokens, record_property):
    inputs, outputs = on_gpu(60, 60), []
    settings = {"num_beams": num_beams, "max_new_tokens": new_tokens, "return_dict_in_generate": True}
    for model in (tiny("llama").cuda(), pkv_hf.patch(tiny("llama").cuda())):
        outputs.append(generate(model, inputs, **settings))
    assert_on_pages(model)
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    worst = 0.0
    for theirs, ours in zip(outputs[0][CACHE].layers, outputs[1][CACHE].layers):
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert a.shape == b.shape
            worst = max(worst, float((a - b).abs().max()))
    record_property("largest_difference", worst)
    assert worst < 1e-3


class Ends(LogitsProcessor):
    """Allows ten tokens five times, then the end of sequence alone, then nothing."""

    def __init__(self, end: int) -> None:
        self.end, self.calls = end, []

    def __call__(self, ids, scores):
        self.calls.append(ids.shape[1])
        kept = torch.full_like(scores, -torch.inf)
        if len(self.calls) < 6:
            kept[:, 10:20] = scores[:, 10:20]
        elif len(self.calls) == 6:
            kept[:, self.end] = 0.0
        return kept  # after the end all are -inf, and sampling from that is a device-side assert


@pytest.mark.parametrize("do_sample", [True, False])
def test_a_processor_that_allows_nothing_after_the_end(do_sample):
    inputs, found = on_gpu(60, 53), []
    for model in (tiny("llama").cuda(), pkv_hf.patch(tiny("llama").cuda())):
        for _ in range(2):  # the second call's steps are captured
            torch.manual_seed(0)
            ends = Ends(3)
            tokens = generate(model, inputs, do_sample=do_sample, eos_token_id=3, logits_processor=[ends])
            torch.cuda.synchronize()
            found.append((tokens.tolist(), ends.calls, torch.rand(1, device="cuda").item()))
    assert_on_pages(model)
    assert found[0] == found[1] == found[2] == found[3]


def left_padded_on_cpu(*lengths):
    with torch.device("cpu"):
        return left_padded(*lengths)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {}], ids=str)
def test_cuda_as_the_default_device(settings):
    outputs = []
    torch.set_default_device("cuda")
    try:
        for patched in (False, True):
            model = tiny("llama").cuda()
            inputs = {name: tensor.cuda() for name, tensor in left_padded_on_cpu(60, 53).items()}
            if patched:
                pkv_hf.patch(model)
            torch.manual_seed(0)
            outputs.append(generate(model, inputs, **settings))
    finally:
        torch.set_default_device(None)
    assert torch.equal(*outputs)
    assert_on_pages(model)


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "top_k": 9}], ids=str)
def test_the_loop_never_waits_for_the_gpu_but_for_its_own_copies(settings, monkeypatch):
    """After a first call: nothing synchronises but the events that the loop and the first token wait for."""
    from pkv_hf.runtime.ahead.forward import Forward

    model, inputs = pkv_hf.patch(tiny("llama").cuda()), on_gpu(60, 60)
    for _ in range(2):
        generate(model, inputs, **settings)
    forward, run = [], Forward.__call__

    def watched(self, *args):
        forward.append(torch.cuda.get_sync_debug_mode())
        if len(forward) == 3:  # the step before is captured by now
            torch.cuda.set_sync_debug_mode("error")
        return run(self, *args)

    monkeypatch.setattr(Forward, "__call__", watched)
    try:
        generate(model, inputs, max_new_tokens=30, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(forward) == 29
    assert forward[-1] == 2
