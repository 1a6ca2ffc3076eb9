"""Fused layers in half precision against float64, beside transformers' own layers, in Triton's interpreter."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("triton")

from served import SERVED, build

import pkv_hf
from pkv_hf.compat import CACHE
from pkv_hf.kernels import elementwise, linear
from pkv_hf.kernels.checks.attention import rms
from pkv_hf.kernels.products import epilogue
from pkv_hf.kernels.products.blocks import Block
from pkv_hf.patches.description import MLP, Branch, Norm
from pkv_hf.patches.projections.registry import Kinds
from pkv_hf.patches.stream import HANDED_ON, Stream
from tiny import FAMILIES, decode_logits, left_padded, tiny


@torch.no_grad()
def judge(model, inputs, eager=0, not_fused=""):
    """Logits of fused decode steps against float64, beside those of transformers in the same precision.

    So many steps run before it is known what the decoder returns.
    """
    exact = decode_logits(copy.deepcopy(model).double(), inputs)
    theirs = decode_logits(model, inputs)
    with pkv_hf.patched(model, route="split"):
        ours = decode_logits(model, inputs)
        report = pkv_hf.report(model)
        assert (report.steps.static, report.not_fused) == (len(ours) - eager, not_fused)
    assert rms(ours - exact) <= 2 * rms(theirs - exact)


KINDS = {
    "llama": (torch.bfloat16, (20,)),
    "qwen2-windows": (torch.float16, (20, 9, 3)),
    "qwen3": (torch.bfloat16, (20, 9, 3)),
    "gemma2": (torch.bfloat16, (20, 9)),
    "gemma3": (torch.bfloat16, (20,)),
    "glm4": (torch.float16, (20, 9)),
    "olmo2": (torch.bfloat16, (20, 9)),
    "olmo": (torch.float16, (20,)),
    "cohere": (torch.bfloat16, (20, 9)),
    "starcoder2": (torch.float16, (20, 9)),
}
OTHERS = {
    **SERVED,
    "olmo": ("OlmoConfig", "OlmoForCausalLM", {}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {"logit_scale": 0.3}),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", {"use_bias": True}),
}


@pytest.mark.parametrize("name", KINDS)
def test_half_precision_is_as_exact_as_transformers(name):
    (dtype, lengths), settings = KINDS[name], {"num_hidden_layers": 1, "rms_norm_eps": 0.1}  # an epsilon that shows
    if name in FAMILIES:
        model = tiny(name, **settings)
    else:
        config, of_class, others = OTHERS[name]
        kinds = {"layer_types": ["sliding_attention"]} if "layer_types" in others else {}
        model = build(config, of_class, {**others, **settings, **kinds})
    judge(model.to(dtype), left_padded(*lengths))


@pytest.mark.parametrize(
    ("kinds", "lengths"), [(["full_attention"], (20, 9)), (["sliding_attention", "full_attention"], (30,))]
)
def test_layers_of_gemma4_and_as_many_that_read_their_keys(kinds, lengths):
    """With an input of its own for every layer, values that are the keys or normed alone, and a number at the end."""
    settings = {
        "num_hidden_layers": 2 * len(kinds), "num_kv_shared_layers": len(kinds), "layer_types": kinds * 2,
        "sliding_window": 24, "head_dim": 16, "global_head_dim": 32, "attention_k_eq_v": True,
        "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128,
        "enable_moe_block": False, "rms_norm_eps": 0.1,
    }  # fmt: skip
    model = build("Gemma4TextConfig", "Gemma4ForCausalLM", settings)
    for layer in model.model.layers:
        layer.layer_scalar.fill_(0.6)
    judge(model.to(torch.bfloat16), left_padded(*lengths), eager=1)  # its prompt's hidden states are cut


@pytest.mark.parametrize("kind", ["sliding", "full"])
def test_attention_with_sinks_and_angles_that_come_once(kind):
    config, of_class, others = SERVED["gpt-oss"]
    settings = {"num_hidden_layers": 1, "layer_types": [f"{kind}_attention"], "attn_implementation": "eager"}
    model = build(config, of_class, {**others, **settings})
    model.set_experts_implementation("eager")  # that of float64
    judge(model.to(torch.bfloat16), left_padded(30, 9), not_fused="1 layers: their GptOssMLP is called as it is")


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(20,), (20, 9)], ids=str)
def test_a_sum_and_the_norms_around_it_are_one_launch(lengths, monkeypatch):
    """Across layers too: the next one begins with a norm that is taken."""
    config, of_class, others = SERVED["gemma3"]
    model = build(config, of_class, {**others, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2})
    model, launches = model.to(torch.float16), []
    with pkv_hf.patched(model, route="split"):
        decode_logits(model, left_padded(*lengths))  # and checks layers
        for name in ("add_norms", "_normalised"):
            taken = getattr(elementwise, name)
            monkeypatch.setattr(
                elementwise,
                name,
                lambda *args, name=name, taken=taken, **by: launches.append(name) or taken(*args, **by),
            )
        steps = len(decode_logits(model, left_padded(*lengths)))
    assert launches.count("add_norms") == 4 * steps > 0
    assert launches.count("_normalised") == len(lengths) * steps  # the last one, and more rows' first


def change_layer(model):
    attention = model.model.layers[0].self_attn
    attention.q_proj.bias = torch.nn.Parameter(torch.randn(len(attention.q_proj.weight)))
    attention.o_proj.weight.data = attention.o_proj.weight.data.T.contiguous().T
    attention.scaling *= 1.5


@pytest.mark.parametrize(
    ("settings", "change", "lengths"),
    [
        ({"attention_bias": True, "mlp_bias": True}, None, (20,)),
        ({"hidden_act": "gelu"}, None, (20, 9)),
        ({}, change_layer, (20, 9)),
    ],
    ids=["biases", "gelu", "odd modules"],
)
def test_layers_that_the_kernels_take_in_part(settings, change, lengths):
    model = tiny("llama", num_hidden_layers=1, **settings)
    if change:
        change(model)
    judge(model.to(torch.bfloat16), left_padded(*lengths))


def test_many_rows_go_through_our_products_and_the_sum_of_parts_takes_the_next_norm_along(monkeypatch):
    rows, launches, choose_block = [], [], linear.choose_block

    def in_parts(*sizes):
        rows.append(sizes[0])
        return Block(64, 32, 2, parts=2) if sizes[0] == 20 else choose_block(*sizes)

    monkeypatch.setattr(linear, "choose_block", in_parts)
    for module, name in ((elementwise, "_norm"), (elementwise, "_add_norms"), (epilogue, "_add_parts")):
        launcher = getattr(module, name)

        def counted(kind, grid, *others, name=name, launcher=launcher, **options):
            launches.append((name, grid[name == "_add_parts"]))
            launcher(kind, grid, *others, **options)

        monkeypatch.setattr(module, name, counted)
    model = tiny("llama", num_hidden_layers=1, attention_bias=True, mlp_bias=True)
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(bias)
    judge(model.to(torch.bfloat16), left_padded(*(3,) * 20))
    steps = rows.count(20) // 4  # q, k and v; the output; gate and up; down
    assert rows.count(20) == 4 * steps > 0
    assert launches.count(("_norm", 20)) == 2 * steps  # the first and the last
    assert launches.count(("_add_norms", 20)) == steps
    assert launches.count(("_add_parts", 20)) == 3 * steps


@torch.no_grad()
def test_a_sum_takes_no_norm_of_another_device_along():
    """A layer may be on another GPU than the one before, or on the disk until it runs."""
    x, norm = torch.randn(3, 64), tiny("llama", num_hidden_layers=1).model.norm
    elsewhere = Branch(None, Norm(copy.deepcopy(norm).to("meta"), "rms", 1e-6), None, 1.0, False)
    stream = Stream(x, Kinds())
    stream.add(None, x, Branch(None, None, Norm(norm, "rms", 1e-6), 1.0, False), elsewhere)
    torch.testing.assert_close(stream.hidden, x + norm(x))
    assert not hasattr(stream.result(elsewhere), HANDED_ON)


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
    heads = [step.head for step in output[CACHE].static_steps.values()]  # the first step shows what the model does
    assert [head and head.module for head in heads] == [None, model.lm_head]
    assert rms(ours - exact) <= 2 * rms(theirs - exact)


@torch.no_grad()
def test_what_was_written_into_is_normed_anew():
    """A decoder may write into hidden states between its layers, whose next norm is taken already."""
    model = tiny("llama", num_hidden_layers=1).model
    mlp = MLP(model.layers[0].mlp.gate_proj, model.layers[0].mlp.up_proj, model.layers[0].mlp.down_proj, "silu")
    branch = Branch(mlp, Norm(model.norm, "rms", 1e-6), None, 1.0, False)
    stream = Stream(torch.randn(1, 1, 64), Kinds())
    stream.normed(branch)
    result = stream.result(branch)
    assert hasattr(result, HANDED_ON)
    result[..., :9] += 3
    torch.testing.assert_close(Stream(result, Kinds()).normed(branch)[0].x, model.norm(result)[0])
