"""Fused layers in half precision against float64, beside transformers' own layers, in Triton's interpreter."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("triton")

import pkv_hf
from pkv_hf.compat import CACHE
from pkv_hf.kernels.checks.attention import rms
from pkv_hf.patches.description import Norm
from pkv_hf.patches.stream import TAKEN, Stream
from tiny import FAMILIES, decode_logits, left_padded, tiny


@torch.no_grad()
def judge(model, inputs):
    """Logits of fused decode steps against float64, beside those of transformers in the same precision."""
    exact = decode_logits(copy.deepcopy(model).double(), inputs)
    theirs = decode_logits(model, inputs)
    with pkv_hf.patched(model, route="split"):
        ours = decode_logits(model, inputs)
        assert pkv_hf.report(model).steps.static == len(ours)
    assert rms(ours - exact) <= 2 * rms(theirs - exact)


@pytest.mark.parametrize(
    ("family", "dtype", "lengths"),
    [
        *((family, torch.bfloat16, (20, 9, 3)) for family in FAMILIES if family != "llama-tied"),
        *((family, torch.float16, (20, 9, 3)) for family in ("llama-tied", "qwen2-windows")),
        *((family, torch.bfloat16, (20,)) for family in ("llama", "qwen3")),
    ],
    ids=str,
)
def test_half_precision_is_as_exact_as_transformers(family, dtype, lengths):
    layers = 1 if len(lengths) == 1 else 2  # the interpreter is slow at one row
    model = tiny(family, num_hidden_layers=layers, rms_norm_eps=0.1).to(dtype)  # an epsilon that shows
    judge(model, left_padded(*lengths))


def change_layer(model):
    attention = model.model.layers[0].self_attn
    attention.q_proj.bias = torch.nn.Parameter(torch.randn(len(attention.q_proj.weight)))
    attention.o_proj.weight.data = attention.o_proj.weight.data.T.contiguous().T
    attention.scaling *= 1.5


@pytest.mark.parametrize(
    ("settings", "change", "lengths"),
    [
        *(({"attention_bias": True, "mlp_bias": True}, None, lengths) for lengths in ((20,), (20, 9))),
        ({"hidden_act": "gelu"}, None, (20, 9)),
        ({}, change_layer, (20, 9)),
        ({}, None, (3,) * 17),
    ],
    ids=["biases, one row", "biases", "gelu", "odd modules", "more rows"],
)
def test_layers_that_the_kernels_take_in_part(settings, change, lengths):
    model = tiny("llama", num_hidden_layers=1, **settings)
    if change:
        change(model)
    judge(model.to(torch.bfloat16), left_padded(*lengths))


@pytest.mark.parametrize("lengths", [(20,), (20, 9)], ids=str)
def test_adapters_beside_fused_layers_are_as_exact_as_transformers(lengths):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny("llama", num_hidden_layers=1), settings).eval().to(torch.bfloat16)
    judge(model.get_base_model(), left_padded(*lengths))


@pytest.mark.parametrize("lengths", [(20,), (20, 9)], ids=str)
def test_the_head_in_a_step_is_as_exact_as_transformers(lengths):
    """As generate() runs it, over tokens that are given."""

    def logits(model):
        others = [token for token in range(model.config.vocab_size) if token != 5]
        settings = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": others, "output_logits": True}
        output = model.generate(**left_padded(*lengths), return_dict_in_generate=True, **settings)
        return output, torch.stack(output.logits[1:]).double()

    model = tiny("llama-tied", num_hidden_layers=1).to(torch.bfloat16)
    _, exact = logits(copy.deepcopy(model).double())
    _, theirs = logits(model)
    with pkv_hf.patched(model, route="split"):
        output, ours = logits(model)
    assert [step.head.module for step in output[CACHE].static_steps.values()] == [model.lm_head]
    assert rms(ours - exact) <= 2 * rms(theirs - exact)


@torch.no_grad()
def test_what_was_written_into_is_normed_anew():
    """A decoder may write into hidden states between its layers, whose next norm is taken already."""
    module = tiny("llama", num_hidden_layers=1).model.norm
    norm, hidden = Norm(module, "rms", 1e-6), torch.randn(1, 1, 64)
    stream = Stream(hidden)
    stream.normed(norm, folds=False)
    result = stream.result(norm)
    assert hasattr(result, TAKEN)
    result[..., :9] += 3
    torch.testing.assert_close(Stream(result).normed(norm, folds=False).x, module(result)[0])
