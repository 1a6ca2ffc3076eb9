"""Models whose weights are quantised: attention on pages, their linear layers as they are; and what weights take."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import pkv_hf
from pkv_hf import PagedCache
from pkv_hf.bench.inputs.weights import quantised
from pkv_hf.compat import CACHE
from pkv_hf.memory.weights import step_weight_bytes, weight_bytes
from tiny import COMMON, assert_on_pages, left_padded, tiny

PROMPT = left_padded(20, 9)
LINEARS = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
"""Weights in the linear layers of `plain()`, and by rows those layers' outputs:"""
OUTPUTS = 3 * (2 * 64 + 2 * 32 + 2 * 128 + 64)
REST = 2 * 128 * 64 + 7 * 64
"""Embeddings, head and norms."""


def plain(dtype=torch.float32):
    return tiny("llama", intermediate_size=128).to(dtype)  # bitsandbytes: rows of whole blocks of 64


def reloaded(model, settings):
    config, state = copy.deepcopy(model.config), model.state_dict()
    return type(model).from_pretrained(
        None, config=config, state_dict=state, dtype=model.dtype, device_map="cpu", quantization_config=settings
    ).eval()  # fmt: skip


def eight_bits(model):
    return reloaded(model, BitsAndBytesConfig(load_in_8bit=True))


def torchao_int8(model):
    from torchao.quantization import Int8WeightOnlyConfig

    return reloaded(model, TorchAoConfig(Int8WeightOnlyConfig()))


QUANTISED = {
    "bitsandbytes NF4": (lambda model: quantised(model, "nf4", "cpu"), "Linear4bit", 0.5 + 4 / 64, 0),
    "bitsandbytes NF4, nested": (
        lambda model: quantised(model, "nf4-nested", "cpu"),
        "Linear4bit",
        0.5 + 1 / 64 + 4 / 64 / 256,
        0,
    ),
    "bitsandbytes int8": (eight_bits, "Linear8bitLt", 1, 0),
    "torchao int8": (torchao_int8, "Linear", 1, 4),
}
"""How they are made, the class of their linear layers, and bytes of a weight and of a row of weights in those."""


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_layers_are_served_as_they_are(name):
    pytest.importorskip("triton")
    pytest.importorskip(name.split()[0])
    quantise, linear, bytes_each, bytes_a_row = QUANTISED[name]
    model = quantise(plain())
    layer = model.model.layers[0]
    kept = [layer.self_attn.q_proj, layer.mlp.down_proj]
    assert [type(module).__name__ for module in kept] == [linear, linear]
    assert type(model.lm_head) is nn.Linear
    scales = round(LINEARS * bytes_each) + OUTPUTS * bytes_a_row
    assert weight_bytes(model) == pytest.approx(scales + 4 * REST, rel=0.01)  # nested scales are whole blocks
    assert weight_bytes(model) - step_weight_bytes(model) == 4 * 128 * 64
    planned = pkv_hf.plan(model, prompt_tokens=20, gpu_memory="1GiB").weights
    assert planned == weight_bytes(model)
    expected = model.generate(**PROMPT, max_new_tokens=4, do_sample=False)
    for route in ("auto", "split"):
        with pkv_hf.patched(model, route=route):
            output = model.generate(**PROMPT, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
            assert torch.equal(output.sequences, expected)
            assert isinstance(output[CACHE], PagedCache)
            assert bool(output[CACHE].static_steps) == (route == "split")  # through the fused layers
            assert_on_pages(model)
        assert [layer.self_attn.q_proj, layer.mlp.down_proj] == kept


def test_the_planner_knows_the_bytes_of_4_bits_before_they_are_loaded():
    pytest.importorskip("bitsandbytes")
    model = plain(torch.bfloat16)
    planned = pkv_hf.plan(model.config, prompt_tokens=20, gpu_memory="1GiB", dtype=torch.bfloat16, weight_bits=4)
    assert planned.weights == weight_bytes(quantised(model, "nf4", "cpu")) == LINEARS * 9 // 16 + 2 * REST


def write_gguf(path) -> None:
    """A random Llama with linear layers of 8 bits, by the library that the format's makers publish."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(COMMON["max_position_embeddings"])
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(128)
    shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64),
              "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}  # fmt: skip
    linears = {f"blk.{i}.{name}.weight": shape for i in range(2) for name, shape in shapes.items()}
    for name, shape in {"token_embd.weight": (128, 64), "output.weight": (128, 64), **linears}.items():
        weight = random.normal(0, 0.2, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    for name in ("output_norm", *(f"blk.{i}.{norm}_norm" for i in range(2) for norm in ("attn", "ffn"))):
        writer.add_tensor(f"{name}.weight", random.normal(1, 0.3, 64).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_model_loaded_from_gguf_is_served(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).eval()
    expected = model.generate(**PROMPT, max_new_tokens=8, do_sample=False)
    assert len(set(expected[0, 20:].tolist())) > 1
    with pkv_hf.patched(model):
        output = model.generate(**PROMPT, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert isinstance(output[CACHE], PagedCache)


def test_report_says_whether_projections_or_attention_bound_the_step():
    model = pkv_hf.patch(tiny("llama-tied"))
    before = pkv_hf.report(model)
    assert (before.weight_bytes, before.kv_bytes, before.bound_by) == (4 * model.num_parameters(), None, None)
    assert "bound" not in str(before)
    token = 2 * 3 * 2 * 16 * 4
    for lengths, by in (((40, 30), "projections"), ((480, 470), "attention")):
        model.generate(**left_padded(*lengths), max_new_tokens=3, do_sample=False)
        report = pkv_hf.report(model)
        assert report.kv_bytes == token * (sum(lengths) + 2 * 2)  # the last token made is never read
        assert (report.kv_bytes > report.weight_bytes) == (by == "attention")
        assert report.bound_by == by
        assert f"{report.kv_bytes / 2**20:,.1f} MiB of K and V: {by} bound it" in str(report)
