"""Models on more than one device: layers on two GPUs, offloaded from one, and tensor parallel over two."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import pkv_hf
from pkv_hf import PagedCache
from pkv_hf.compat import CACHE
from places import HELPERS
from tiny import left_padded, tiny

pytestmark = pytest.mark.gpu

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def generate(model, inputs, new_tokens=40, device="cuda:0"):
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True)
    return output.sequences.cpu(), output[CACHE]


def devices(cache) -> list[torch.device]:
    return [cache.layers[i].table.pool.storage[i][0].device for i in range(len(cache.layers))]


def split_map(model, *places) -> dict[str, object]:
    """Layers in equal runs on the places, what comes before them on the first and after them on the last."""
    count = model.config.num_hidden_layers
    ends = {"model.embed_tokens": places[0], "model.rotary_emb": places[0], "model.norm": places[-1]}
    layers = {f"model.layers.{i}": places[i * len(places) // count] for i in range(count)}
    return {**ends, **layers, "lm_head": places[0] if model.config.tie_word_embeddings else places[-1]}


@needs_two
@pytest.mark.parametrize("settings", [{}, {"route": "split"}, {"route": "workqueue"}, {"kv_dtype": "int8"}], ids=str)
def test_layers_on_two_gpus_keep_their_pages_there(settings, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    one = tiny("llama").cuda()
    two = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=split_map(one, 0, 1))
    for lengths in ((50,), (60, 53, 27, 1)):
        inputs = left_padded(*lengths)
        with pkv_hf.patched(one, **settings):
            expected = generate(one, inputs)[0]
        if "kv_dtype" not in settings:
            assert torch.equal(expected, generate(one, inputs)[0])
        with pkv_hf.patched(two, **settings):
            tokens, cache = generate(two, inputs)
        assert torch.equal(tokens, expected)
        assert [device.index for device in devices(cache)] == [0, 0, 1]


@needs_two
@pytest.mark.parametrize("settings", [{}, {"cuda_graphs": False}, {"run_ahead": False}, {"fuse": False}], ids=str)
@pytest.mark.parametrize("route", ["split", "workqueue"])
def test_a_model_on_a_gpu_that_is_not_the_current_one(route, settings):
    assert torch.cuda.current_device() == 0
    inputs = left_padded(60, 53, 27, 1)
    expected = generate(tiny("llama").cuda(), inputs, 200)[0]
    model = pkv_hf.patch(tiny("llama").to("cuda:1"), route=route, **settings)
    for _ in range(3):  # compiled, captured, replayed
        tokens, cache = generate(model, inputs, 200, "cuda:1")
        assert torch.equal(tokens, expected)
    assert {device.index for device in devices(cache)} == {1}
    assert torch.cuda.current_device() == 0


@needs_two
def test_smollm2_on_two_gpus(smollm2, pydoc_ids, tmp_path):
    inputs = {"input_ids": pydoc_ids[:, :2000]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    smollm2.save_pretrained(tmp_path)
    two = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=split_map(smollm2, 0, 1))
    expected = generate(smollm2.cuda(), inputs)[0]
    smollm2.cpu()
    assert torch.equal(generate(two, inputs)[0], expected)
    with pkv_hf.patched(two):
        tokens, cache = generate(two, inputs)
        assert pkv_hf.report(two).route in ("split", "workqueue")
    assert torch.equal(tokens, expected)
    assert [device.index for device in devices(cache)] == [0] * 15 + [1] * 15


@pytest.mark.parametrize("route", ["auto", "split", "workqueue"])
@pytest.mark.parametrize("elsewhere", [("cpu",), ("disk",), ("cpu", "disk")], ids=str)
def test_layers_offloaded_from_one_gpu(elsewhere, route, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    device_map = split_map(tiny("llama"), 0, *elsewhere)
    device_map["model.norm"] = device_map["lm_head"] = 0
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    inputs = left_padded(60, 53, 27, 1)
    expected = generate(tiny("llama").cuda(), inputs)[0]
    with pkv_hf.patched(model, route=route):
        tokens, cache = generate(model, inputs)
    assert torch.equal(tokens, expected)
    assert isinstance(cache, PagedCache)
    assert {device.type for device in devices(cache)} == {"cuda"}  # where accelerate brings the weights


@needs_two
def test_two_processes_share_a_model_and_share_the_prompts(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    command = [sys.executable, *launch, str(HELPERS / "distributed.py"), str(tmp_path), "cuda"]
    python_path = os.pathsep.join(part for part in (str(HELPERS), os.environ.get("PYTHONPATH")) if part)
    environment = {**os.environ, "PYTHONPATH": python_path, "NCCL_NVLS_ENABLE": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "both right" in done.stdout
