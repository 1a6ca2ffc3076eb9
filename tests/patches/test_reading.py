"""What is read of the layers of tiny models, by one run of each: no kernel runs here."""

from __future__ import annotations

from dataclasses import replace

import pytest

import pkv_hf
from pkv_hf.bench.model_types.building import build
from pkv_hf.bench.model_types.cases import all_cases
from pkv_hf.compat import decoder_of
from pkv_hf.patches.description import MLP, AsIs, Branch, Layer, Norm, bind
from pkv_hf.patches.probe import decoder_layers
from pkv_hf.replaced import STATE

CASES = {case.name: case for case in reversed(all_cases())}


def layers_of(name: str, **fields: object) -> list[Layer | str]:
    """With the modules of the layers, or why there is no description."""
    case = CASES[name]
    model = pkv_hf.patch(build(replace(case, fields={**case.fields, **fields})))
    described, layers = (
        getattr(model, STATE).fusing._all(decoder_of(model), None, None),
        decoder_layers(decoder_of(model)),
    )
    return [each if isinstance(each, str) else bind(each, layer) for each, layer in zip(described, layers)]


def named(norm: Norm | None) -> str:
    return "" if norm is None else f"{norm.kind}{'+1' * bool(norm.offset)}"


def body(branch: Branch) -> str:
    of = branch.body
    if isinstance(of, MLP):
        return f"{'' if of.gate is None else 'packed ' if of.up is None else 'gated '}{of.activation}"
    if isinstance(of, AsIs):
        return type(of.module).__name__
    assert (of.heads, of.kv_heads, of.head_dim) == (4, 2, 16)
    rotary = of.rotary
    turned = "" if rotary.dim == 0 else f" turned{' in pairs' * rotary.interleaved}{' of angles' * rotary.paired}"
    return (
        f"{'packed ' if len(of.inputs) == 1 else ''}{'gated ' * of.gated}attention * {of.scores.scale:.3g}"
        + (f" capped at {of.scores.softcap:g}" if of.scores.softcap else "")
        + turned
        + (f" in {rotary.dim}" if rotary.dim else "")
        + (
            f", {'heads' if len(of.norms[0].module.weight) == of.head_dim else 'q and k'} by {named(of.norms[0])}"
            if of.norms
            else ""
        )
    )


def outline(layer: Layer | str) -> str:
    """A line for each branch: norm > body > norm * scale, with + where it is of the stream, | of the layer's input."""
    if isinstance(layer, str):
        return layer
    return "\n".join(
        f"{'|' if branch.of_input else '+'} "
        + " > ".join(filter(None, [named(branch.before), body(branch), named(branch.after)]))
        + (f" * {branch.scale:g}" if branch.scale != 1 else "")
        for branch in layer.branches
    )


EVERY_SECOND = {"no_rope_layers": [1, 0, 1, 0]}
KINDS: dict[str, tuple[dict, list[str]]] = {
    "llama": ({}, ["+ rms > attention * 0.25 turned\n+ rms > gated silu"]),
    "gemma2": (
        {"attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 24},
        ["+ rms+1 > attention * 0.204 capped at 3 turned > rms+1\n+ rms+1 > gated gelu_tanh > rms+1"],
    ),
    "gemma3_text": (
        {},
        ["+ rms+1 > attention * 0.0625 turned, heads by rms+1 > rms+1\n+ rms+1 > gated gelu_tanh > rms+1"],
    ),
    "glm4": ({}, ["+ rms > attention * 0.25 turned in pairs in 8 > rms\n+ rms > packed silu > rms"]),
    "phi3": ({}, ["+ rms > packed attention * 0.25 turned\n+ rms > packed silu"]),
    "olmo2": ({}, ["+ attention * 0.25 turned, q and k by rms > rms\n+ gated silu > rms"]),
    "qwen3": ({}, ["+ rms > attention * 0.25 turned, heads by rms\n+ rms > gated silu"]),
    "smollm3": (
        EVERY_SECOND,
        [f"+ rms > attention * 0.25{turned}\n+ rms > gated silu" for turned in (" turned", "", " turned", "")],
    ),
    "granite": (
        {"residual_multiplier": 0.3, "attention_multiplier": 0.4},
        ["+ rms > attention * 0.4 turned * 0.3\n+ rms > gated silu * 0.3"],
    ),
    "cohere": ({}, ["+ layer > attention * 0.25 turned in pairs of angles\n| layer > gated silu"]),
    "starcoder2": ({}, ["+ layer > attention * 0.25 turned\n+ layer > gelu_tanh"]),
    "nemotron": ({}, ["+ layer+1 > attention * 0.25 turned in 8\n+ layer+1 > relu2"]),
    "phi": ({}, ["+ layer > attention * 0.25 turned in 8\n| layer > gelu_tanh"]),
    "qwen3_5_text": (
        {},
        [
            *["+ rms+1 > Qwen3_5GatedDeltaNet\n+ rms+1 > gated silu"] * 3,
            "+ rms+1 > gated attention * 0.25 turned in 4, heads by rms+1\n+ rms+1 > gated silu",
        ],
    ),
    "mixtral": ({}, ["+ rms > attention * 0.25 turned\n+ rms > MixtralSparseMoeBlock"]),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_layers_compute_is_read(name):
    fields, expected = KINDS[name]
    found = [outline(layer) for layer in layers_of(name, **fields)]
    assert found == (expected if len(expected) > 1 else expected * len(found))


WHOLE = """
    arcee cohere2 cohere_compass_text ctrl cwm emu3 ernie4_5 exaone exaone4 gemma glm gpt2 gpt_bigcode helium
    biogpt granite_swa hyperclovax internlm3 iquestcoder jais2 ministral ministral3 mistral olmo olmo3 opt
    phi4_multimodal qwen2 seed_oss stablelm vaultgemma
"""
TABLE: dict[str, tuple[int, int, int]] = {
    **dict.fromkeys(WHOLE.split(), (4, 4, 4)),
    **dict.fromkeys(["gpt2 (scaled by the layer's index)", "qwen2 (sliding layers)"], (4, 4, 4)),
    **dict.fromkeys([f"gemma4_text{of}" for of in ("", " (K as V (31B))")], (4, 4, 4)),
    "gemma4_text (shared K and V (E2B, E4B))": (6, 6, 6),
    **dict.fromkeys(["granitemoehybrid (attention alone (4.0 Micro))"], (4, 4, 4)),
    **dict.fromkeys(["apertus", "bitnet", "codegen", "diffllama", "gpt_neox", "gptj"], (0, 4, 4)),
    **dict.fromkeys(["hunyuan_v1_dense", "persimmon", "llama4_text", "gpt_oss", "nanochat"], (0, 4, 4)),
    "falcon": (0, 0, 4),
    "lfm2": (1, 4, 4),
}
"""Layers of other types: all of whose modules are understood, that are described, that there are."""


def test_how_many_layers_of_other_types_are_described():
    found = {}
    for name in TABLE:
        layers = layers_of(name)
        described = [layer for layer in layers if isinstance(layer, Layer)]
        whole = [layer for layer in described if not any(isinstance(each.body, AsIs) for each in layer.branches)]
        found[name] = len(whole), len(described), len(layers)
    other = {name: (counts, TABLE[name]) for name, counts in found.items() if counts != TABLE[name]}
    assert not other, "\n".join(f"{name:40} {counts}" for name, counts in found.items())
