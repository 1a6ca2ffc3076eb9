"""Weights that are elsewhere: offloaded by accelerate's hooks, and in several processes."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from transformers import AutoModelForCausalLM

import pkv_hf
from pkv_hf import PagedCache, compat
from pkv_hf.compat import CACHE
from pkv_hf.runtime.step import launching_on
from places import HELPERS
from tiny import left_padded, tiny

PROMPTS = left_padded(20, 9)


def generate(model):
    return model.generate(**PROMPTS, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)


def assert_served(model, route):
    expected = tiny("llama").generate(**PROMPTS, max_new_tokens=4, do_sample=False)
    with pkv_hf.patched(model, route=route):
        output = generate(model)
        assert torch.equal(output.sequences, expected)
        assert isinstance(output[CACHE], PagedCache)
        if route == "split":
            assert "forward of its own" in " ".join(pkv_hf.report(model).left)
    assert torch.equal(generate(model).sequences, expected)


BLOCKS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "model.rotary_emb",
          "lm_head")  # fmt: skip


@pytest.mark.parametrize("route", ["auto", "split"])
@pytest.mark.parametrize("on_disk", [{"model.layers.1", "model.layers.2"}, {"model.embed_tokens", "lm_head"}])
def test_a_device_map_with_layers_on_disk(route, on_disk, tmp_path):
    if route == "split":
        pytest.importorskip("triton")
    tiny("llama").save_pretrained(tmp_path / "model")
    device_map = {block: "disk" if block in on_disk else "cpu" for block in BLOCKS}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu", "meta"}
    assert_served(model, route)


@pytest.mark.parametrize(("offload", "patch_first"), [("cpu", True), ("disk", False)])
def test_hooks_that_bring_every_weight_in(offload, patch_first, tmp_path):
    pytest.importorskip("triton")
    model = tiny("llama")
    if patch_first:
        pkv_hf.patch(model, route="split")
    cpu = torch.device("cpu")
    if offload == "cpu":
        cpu_offload(model, cpu)
    else:
        disk_offload(model, tmp_path, cpu)
    assert model.device.type == "meta"
    assert_served(model, "split")


def test_two_processes_share_a_model_and_share_the_prompts(tmp_path):
    pytest.importorskip("triton")
    tiny("llama").save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    command = [sys.executable, *launch, str(HELPERS / "distributed.py"), str(tmp_path), "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(HELPERS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "both right" in done.stdout


def test_processes_that_have_a_whole_model_each_run_ahead(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert not compat.is_sharded(model)
    model._tp_size = 2
    assert compat.is_sharded(model)
    assert not compat.is_sharded(nn.Linear(1, 1))


def test_kernels_are_launched_with_the_device_of_their_tensors_current(monkeypatch):
    """All that a step runs by a route is inside the device of its layer; a static step is inside its own too."""
    pytest.importorskip("triton")
    from pkv_hf.routes import triton as routes
    from pkv_hf.runtime import step
    from pkv_hf.runtime.captured import static as decode

    current, launched = [], []

    @contextlib.contextmanager
    def launching_on(device):
        current.append(device)
        yield
        current.pop()

    for module in (step, decode):
        monkeypatch.setattr(module, "launching_on", launching_on)
    for name in ("append", "rope_attend", "decode"):
        run = getattr(routes.Split, name)

        def noted(self, layer, *args, _run=run, _name=name, **kwargs):
            launched.append((_name, list(current)))
            return _run(self, layer, *args, **kwargs)

        monkeypatch.setattr(routes.Split, name, noted)
    cpu = torch.device("cpu")
    for settings, depth in (({}, 2), ({"fuse": False}, 1)):
        model = pkv_hf.patch(tiny("llama"), route="split", **settings)
        generate(model)  # in which layers are checked
        launched.clear()
        generate(model)
        steps = [depths for name, depths in launched if name != "append"]
        assert len(steps) == 3 * 3
        assert steps == [[cpu] * depth] * 9
        assert all(depths for _, depths in launched)


@pytest.mark.parametrize(("index", "entered"), [(0, []), (1, [1])])
def test_a_device_that_is_current_is_not_entered_again(index, entered, monkeypatch):
    found = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: found.append(device.index) or contextlib.nullcontext())
    with launching_on(torch.device("cuda", index)):
        assert found == entered
