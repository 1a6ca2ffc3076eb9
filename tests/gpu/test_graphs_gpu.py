"""CUDA graphs, the run-ahead loop and the fused layers on a GPU: transformers' tokens in every combination."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch

pytest.importorskip("triton")

import pkv_hf
from pkv_hf.cache.sizes import KV_DTYPES
from pkv_hf.compat import CACHE
from pkv_hf.kernels.checks.attention import rms
from tiny import FAMILIES, assert_on_pages, decode_logits, on_gpu, tiny

pytestmark = pytest.mark.gpu

COMBINATIONS = [
    {"cuda_graphs": graphs, "run_ahead": ahead, "fuse": fuse}
    for graphs in (True, False)
    for ahead in (True, False)
    for fuse in (True, False)
]


def generate(model, inputs, **settings):
    return model.generate(**inputs, **{"max_new_tokens": 40, "do_sample": False, **settings})


@pytest.mark.parametrize("lengths", [(50,), (60, 53, 27, 1)])
@pytest.mark.parametrize("family", ["llama", "qwen2-windows", "qwen3"])
def test_every_combination_gives_the_same_tokens(family, lengths):
    model, inputs = tiny(family).cuda(), on_gpu(*lengths)
    expected = generate(model, inputs)
    for settings in COMBINATIONS:
        with pkv_hf.patched(model, **settings):
            for _ in range(2):  # the first call compiles and runs a step without its graph
                assert torch.equal(generate(model, inputs), expected), settings
            assert_on_pages(model)


@pytest.mark.parametrize("fuse", [True, False])
def test_steps_are_captured_with_what_fine_tuning_leaves_on_the_embeddings(fuse):
    model, inputs = tiny("llama").cuda(), on_gpu(20, 9)
    model.enable_input_require_grads()
    expected = generate(model, inputs)
    with pkv_hf.patched(model, fuse=fuse):
        generate(model, inputs)  # whose first step shows what the layers are, and is not captured
        cache = generate(model, inputs, return_dict_in_generate=True)[CACHE]
        assert all(step.captured for step in cache.static_steps.values())
        assert torch.equal(generate(model, inputs), expected)


@pytest.mark.parametrize("settings", COMBINATIONS[:3], ids=str)
def test_sampling_from_a_seed(settings):
    model, inputs = tiny("llama").cuda(), on_gpu(20, 9)
    results = []
    for patch in (False, True):
        if patch:
            pkv_hf.patch(model, **settings)
        torch.manual_seed(1)
        tokens = generate(model, inputs, do_sample=True, top_p=0.9)
        ends = [int(tokens[0, 25]), int(tokens[1, 30])]
        torch.manual_seed(1)
        results.append(
            (generate(model, inputs, do_sample=True, top_p=0.9, eos_token_id=ends), torch.rand(2, device="cuda"))
        )
    for expected, ours in zip(*results):
        assert torch.equal(ours, expected)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(20,), (20, 9, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_through_graphs_is_as_exact_as_transformers(family, lengths):
    inputs = on_gpu(*lengths)
    model = tiny(family).cuda().to(torch.bfloat16)
    exact = decode_logits(copy.deepcopy(model).double(), inputs, 6)
    theirs = decode_logits(model, inputs, 6)
    with pkv_hf.patched(model):
        ours = decode_logits(model, inputs, 6)
    assert rms(ours - exact) <= 2 * rms(theirs - exact)


@torch.no_grad()
def test_bfloat16_on_real_weights(smollm2, pydoc_ids):
    inputs = {"input_ids": pydoc_ids[:, :2000].cuda()}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    model = copy.deepcopy(smollm2).to("cuda", torch.bfloat16)
    exact = decode_logits(copy.deepcopy(model).double(), inputs, 8)
    theirs = decode_logits(model, inputs, 8)
    with pkv_hf.patched(model):
        ours = decode_logits(model, inputs, 8)
    assert rms(ours - exact) <= 2 * rms(theirs - exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("route", ["split", "workqueue"])
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_pages_of_8_bits_are_captured(kv_dtype, route, fuse, dtype):
    """The graph's tokens are those of the same steps run one by one."""
    model, inputs = tiny("llama").cuda().to(dtype), on_gpu(300, 160, 9, 1)
    with pkv_hf.patched(model, kv_dtype=kv_dtype, route=route, fuse=fuse, cuda_graphs=False):
        expected = generate(model, inputs)
    with pkv_hf.patched(model, kv_dtype=kv_dtype, route=route, fuse=fuse):
        for _ in range(2):
            output = generate(model, inputs, return_dict_in_generate=True)
            assert torch.equal(output.sequences, expected)
        assert all(step.captured for step in output[CACHE].static_steps.values())
        assert output[CACHE].dtypes == {KV_DTYPES[kv_dtype]}


@pytest.mark.parametrize("quantised", ["torchao", "bitsandbytes"])
def test_steps_over_quantised_weights_are_captured(quantised):
    model, inputs = tiny("llama").cuda().to(torch.bfloat16), on_gpu(20, 9)
    if quantised == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
    else:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        for layer in model.model.layers:
            weight = layer.mlp.down_proj.weight.detach().cpu()
            layer.mlp.down_proj = bitsandbytes.nn.Linear4bit(96, 64, bias=False, compute_dtype=torch.bfloat16)
            layer.mlp.down_proj.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
            layer.mlp.down_proj.cuda()
    with pkv_hf.patched(model, cuda_graphs=False):
        expected = generate(model, inputs)
    with pkv_hf.patched(model):
        for _ in range(2):
            output = generate(model, inputs, return_dict_in_generate=True)
            assert torch.equal(output.sequences, expected)
        assert all(step.captured for step in output[CACHE].static_steps.values())
        assert_on_pages(model)


@pytest.mark.parametrize("route", ["split", "workqueue"])
def test_growing_lengths_compile_nothing(route):
    from triton import knobs

    model, compiled = pkv_hf.patch(tiny("mistral").cuda(), route=route), []
    for lengths in ((20,), (20, 9), (20,)):  # the first prompt of a model is appended by torch
        generate(model, on_gpu(*lengths))
    before, knobs.runtime.jit_post_compile_hook = (
        knobs.runtime.jit_post_compile_hook,
        lambda **call: compiled.append(call),
    )
    try:
        for lengths in ((16,), (33,), (140,), (17, 16), (64, 100)):
            generate(model, on_gpu(*lengths), max_new_tokens=200)
    finally:
        knobs.runtime.jit_post_compile_hook = before
    assert not compiled


def test_one_capture_serves_a_generation():
    model = pkv_hf.patch(tiny("llama").cuda())
    for _ in range(2):
        result = generate(model, on_gpu(20, 9), max_new_tokens=100, return_dict_in_generate=True)
    report = pkv_hf.report(model)
    assert report.graphs == 1
    assert report.graph_bytes > 0
    (step,) = result[CACHE].static_steps.values()
    assert step.captures == 1
    del result, step
    gc.collect()
    assert pkv_hf.report(model).graphs == 0


def test_calls_to_come_capture_into_the_memory_of_calls_gone_by():
    model, reserved = pkv_hf.patch(tiny("llama").cuda()), []
    for call in range(30):
        generate(model, on_gpu(20 + call % 3, 9), max_new_tokens=100)
        reserved.append(torch.cuda.memory_reserved())
    assert max(reserved[10:]) == reserved[9]
    kept = pkv_hf.report(model).graph_bytes
    generate(model, on_gpu(20, 9), max_new_tokens=100)
    assert pkv_hf.report(model).graph_bytes == kept > 0


def test_patching_again_and_again_holds_no_more():
    model, inputs = tiny("qwen2").cuda(), on_gpu(20, 9)  # its projections have biases, which cuBLASLt adds
    held = []
    for _ in range(6):
        with pkv_hf.patched(model):
            generate(model, inputs)
        gc.collect()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[1] == held[2] == held[-1], held


def test_threads_and_streams_have_graphs_of_their_own():
    model = tiny("llama").cuda()
    prompts = [on_gpu(20, 9, seed=seed) for seed in range(4)]
    expected = [generate(model, prompt, max_new_tokens=100) for prompt in prompts]
    pkv_hf.patch(model)
    generate(model, prompts[0])
    found: dict[int, torch.Tensor] = {}

    def run(index):
        stream = torch.cuda.Stream() if index % 2 else torch.cuda.default_stream()
        with torch.cuda.stream(stream):
            for _ in range(5):
                found[index] = generate(model, prompts[index], max_new_tokens=100)
            stream.synchronize()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, tokens in enumerate(expected):
        assert torch.equal(found[index], tokens)


def test_a_chat_goes_on_on_another_stream():
    model, inputs = tiny("llama").cuda(), on_gpu(20)
    expected = generate(model, inputs, max_new_tokens=60)
    with pkv_hf.patched(model):
        for _ in range(2):
            first = generate(model, inputs, max_new_tokens=30, return_dict_in_generate=True)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            rest = model.generate(first.sequences, **{CACHE: first[CACHE]}, max_new_tokens=30, do_sample=False)
        stream.synchronize()
    assert torch.equal(rest, expected)


def test_a_cache_that_grows_is_captured_anew():
    model, inputs = tiny("llama").cuda(), on_gpu(20, 9)
    expected = generate(model, inputs, max_new_tokens=200)
    with pkv_hf.patched(model):
        for _ in range(2):
            cache = pkv_hf.PagedCache(model.config)
            assert torch.equal(generate(model, inputs, max_new_tokens=200, **{CACHE: cache}), expected)
        (step,) = cache.static_steps.values()
        assert 1 < step.captures < 30


def test_speculation_crops_and_goes_on():
    model, inputs = tiny("llama").cuda(), on_gpu(16)
    inputs["input_ids"][0, 8:] = inputs["input_ids"][0, :8]
    expected = generate(model, inputs, prompt_lookup_num_tokens=4)
    with pkv_hf.patched(model):
        for _ in range(2):
            assert torch.equal(generate(model, inputs, prompt_lookup_num_tokens=4), expected)


def test_beams_reorder_under_graphs():
    model, inputs = tiny("llama").cuda(), on_gpu(20, 9)
    expected = generate(model, inputs, num_beams=3)
    with pkv_hf.patched(model):
        for _ in range(2):
            assert torch.equal(generate(model, inputs, num_beams=3), expected)


@pytest.mark.parametrize("change", ["data", "in place", "module"])
def test_changed_weights_are_seen_in_the_middle_of_a_chat(change):
    turns = []
    for patch in (False, True):
        model, inputs = tiny("llama").cuda(), on_gpu(20)
        if patch:
            pkv_hf.patch(model)
            generate(model, inputs)
        first = generate(model, inputs, return_dict_in_generate=True)
        down = model.model.layers[1].mlp.down_proj
        changed = down.weight.detach().flip(0) * 2
        if change == "data":
            down.weight.data = changed
        elif change == "in place":
            down.weight.data.copy_(changed)
        else:
            model.model.layers[1].mlp.down_proj = torch.nn.Linear(96, 64, bias=False, device="cuda")
            model.model.layers[1].mlp.down_proj.weight.data.copy_(changed)
        ids = torch.cat([first.sequences, first.sequences[:, :3]], dim=1)
        turns.append(model.generate(ids, **{CACHE: first[CACHE]}, max_new_tokens=30, do_sample=False))
    assert torch.equal(*turns)


def test_adapters_are_switched_under_graphs():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(target_modules=["q_proj", "gate_proj", "down_proj"], init_lora_weights=False)
    model, inputs = peft.get_peft_model(tiny("llama").cuda(), settings).eval(), on_gpu(20, 9)
    expected = generate(model, inputs)
    with model.disable_adapter():
        bare = generate(model, inputs)
    with pkv_hf.patched(model):
        for _ in range(2):
            assert torch.equal(generate(model, inputs), expected)
            with model.disable_adapter():
                assert torch.equal(generate(model, inputs), bare)


@pytest.mark.parametrize("lengths", [(20,), (20, 9)], ids=str)
def test_products_with_adapters_are_captured(lengths):
    """What a graph reads of adapters is there as long as the graph: a table of addresses on the device."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(tiny("llama").to("cuda", torch.bfloat16), settings).eval()
    inputs, logits = on_gpu(*lengths), []
    for graphs in (False, True):
        with pkv_hf.patched(model, route="split", cuda_graphs=graphs):
            for _ in range(2):
                output = generate(model, inputs, output_logits=True, return_dict_in_generate=True)
            assert pkv_hf.report(model).not_fused == ""
            assert all(step.captured == graphs for step in output[CACHE].static_steps.values())
        logits.append(torch.stack(output.logits))
    assert torch.equal(*logits)


def test_adapters_are_switched_in_the_middle_of_a_chat():
    peft = pytest.importorskip("peft")
    turns = []
    for patch in (False, True):
        torch.manual_seed(0)
        settings = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model, inputs = peft.get_peft_model(tiny("llama").cuda(), settings).eval(), on_gpu(20)
        if patch:
            pkv_hf.patch(model)
            generate(model, inputs)
        first = generate(model, inputs, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, first.sequences[:, :3]], dim=1)
        with model.disable_adapter():
            second = model.generate(
                ids, **{CACHE: first[CACHE]}, max_new_tokens=30, do_sample=False,
                return_dict_in_generate=True,
            )  # fmt: skip
        ids = torch.cat([second.sequences, second.sequences[:, :3]], dim=1)
        turns.append(model.generate(ids, **{CACHE: second[CACHE]}, max_new_tokens=30, do_sample=False))
    assert torch.equal(*turns)


def test_inference_mode_and_back():
    model, inputs = tiny("llama").cuda(), on_gpu(20)
    ids = inputs["input_ids"]
    expected = generate(model, inputs, max_new_tokens=60)
    with pkv_hf.patched(model):
        with torch.inference_mode():
            for _ in range(2):
                first = generate(model, inputs, max_new_tokens=30, return_dict_in_generate=True)
        ids = first.sequences.clone()
        rest = model.generate(ids, **{CACHE: first[CACHE]}, max_new_tokens=30, do_sample=False)
    assert torch.equal(rest, expected)
