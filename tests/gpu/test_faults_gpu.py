"""What goes wrong, and what runs side by side, on a GPU: memory, streams, models; and that a call repeats itself."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import pytest
import torch

from faults import At, faulty
from places import ROOT

pytest.importorskip("triton")

import pkv_hf
from pkv_hf.cache import pool
from pkv_hf.compat import CACHE
from pkv_hf.kernels.checks.attention import rms
from pkv_hf.runtime.captured import graphs
from tiny import assert_on_pages, decode_logits, on_gpu, tiny

pytestmark = pytest.mark.gpu


def generate(model, inputs, **settings):
    return model.generate(**inputs, **{"max_new_tokens": 40, "do_sample": False, **settings})


@pytest.mark.parametrize("where", ["in the capture", "before it"])
def test_memory_that_runs_out_in_a_capture_is_said_and_that_call_runs_without(where, monkeypatch):
    model, inputs = tiny("llama").cuda(), on_gpu(20, 9)
    expected = generate(model, inputs)
    pkv_hf.patch(model)
    assert torch.equal(generate(model, inputs), expected)
    capture = graphs.GraphMemory.capture

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory (a test)")

    def runs_out(self, run):
        return capture(self, lambda: full(run()))

    with monkeypatch.context() as patch:
        if where == "in the capture":
            patch.setattr(graphs.GraphMemory, "capture", runs_out)
        else:
            patch.setattr(graphs, "_capture_stream", full)
            pkv_hf.patch(model)  # with no memory for graphs held yet
            assert torch.equal(generate(model, inputs), expected)
        assert torch.equal(generate(model, inputs), expected)
    report = pkv_hf.report(model)
    assert any("out of memory" in reason for reason in report.left)
    assert torch.equal(generate(model, inputs), expected)
    assert pkv_hf.report(model).steps.captured == report.steps.captured + 39


def test_a_prompt_that_does_not_fit_leaves_the_memory_as_it_was(monkeypatch):
    model, inputs = tiny("llama").cuda(), on_gpu(20)
    pkv_hf.patch(model)
    expected = generate(model, inputs)
    gc.collect()
    before = torch.cuda.memory_allocated()
    with monkeypatch.context() as patch:
        patch.setattr(pool, "free_bytes", lambda _: 1000)
        with pytest.raises(pkv_hf.PoolAllocationError, match="Lower max_new_tokens"):
            generate(model, inputs)
    gc.collect()
    assert torch.cuda.memory_allocated() <= before
    assert torch.equal(generate(model, inputs), expected)


@pytest.mark.parametrize("where", ["streamer", "processor", "criterion", "layer"])
def test_an_exception_between_replays_leaves_a_cache_that_goes_on(where):
    model, inputs = tiny("llama").cuda(), on_gpu(20)
    expected = generate(model, inputs)
    pkv_hf.patch(model)
    assert torch.equal(generate(model, inputs), expected)
    cache = pkv_hf.PagedCache(model.config)
    with pytest.raises(KeyboardInterrupt):
        generate(model, inputs, **{CACHE: cache}, **faulty(where, At(9, KeyboardInterrupt), model))
    model.model.layers[1].mlp._forward_hooks.clear()
    length = cache.get_seq_length()
    assert length > 20
    assert {layer.length for layer in cache.layers} == {length}
    ids = expected[:, : length + 1]
    rest = model.generate(ids, **{CACHE: cache}, max_new_tokens=60 - ids.shape[1], do_sample=False)
    assert torch.equal(rest, expected)
    assert torch.equal(generate(model, inputs), expected)


@pytest.mark.parametrize("route", ["split", "workqueue"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_same_call_gives_the_same_tokens(route, dtype):
    model, inputs = tiny("llama").cuda().to(dtype), on_gpu(300, 160, 9, 1)
    pkv_hf.patch(model, route=route)
    runs = [generate(model, inputs, max_new_tokens=150) for _ in range(8)]
    assert all(torch.equal(tokens, runs[0]) for tokens in runs)


def test_another_process_gives_the_same_tokens():
    code = (
        "import sys, torch; sys.path.insert(0, 'tests/helpers')\n"
        "from tiny import tiny, left_padded; import pkv_hf\n"
        "model = pkv_hf.patch(tiny('llama').cuda().to(torch.bfloat16), route='workqueue')\n"
        "inputs = {name: tensor.cuda() for name, tensor in left_padded(300, 160, 9, 1).items()}\n"
        "print(model.generate(**inputs, max_new_tokens=150, do_sample=False).tolist())"
    )
    root = ROOT
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len(runs[0]) > 1000


def test_two_models_in_two_threads_on_streams_of_their_own():
    models, inputs = [tiny("llama", seed=1).cuda(), tiny("qwen2-windows", seed=2).cuda()], on_gpu(50, 9)
    expected = [generate(model, inputs) for model in models]
    for model in models:
        pkv_hf.patch(model)
        generate(model, inputs)
    torch.cuda.synchronize()
    found = [[], []]

    def run(index):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(5):
                found[index].append(generate(models[index], inputs))
            stream.synchronize()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for tokens, of_model in zip(expected, found):
        assert len(of_model) == 5
        assert all(torch.equal(tokens, other) for other in of_model)


@torch.no_grad()
def test_generation_under_autocast():
    """Of bfloat16 products near ties may fall differently: logits are judged, not tokens."""
    model, inputs = tiny("llama").cuda(), on_gpu(20, 9)
    exact = decode_logits(tiny("llama").double().cuda(), inputs)
    with torch.autocast("cuda", torch.bfloat16):
        theirs = decode_logits(model, inputs)
        with pkv_hf.patched(model):
            ours = decode_logits(model, inputs)
            output = generate(model, inputs, return_dict_in_generate=True)
            assert type(output[CACHE]) is pkv_hf.PagedCache
            assert_on_pages(model)
    assert rms(ours - exact) <= 2 * rms(theirs - exact)


def test_ids_out_of_range_for_a_prefix_are_named_before_they_reach_the_device():
    model = pkv_hf.patch(tiny("llama").cuda())
    with pytest.raises(ValueError, match="the model has 128 tokens"):
        pkv_hf.prefix(model, [5, 128])
    assert generate(model, on_gpu(9)).shape == (1, 49)
