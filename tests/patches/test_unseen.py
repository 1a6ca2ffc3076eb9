"""What a few tokens of a usual size do not show: layers that do something else behind a position, of large or small
numbers, or with numbers that a new model has not moved yet, are not described as if they did not."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama as llama

import pkv_hf
from pkv_hf.patches.description import AsIs
from pkv_hf.replaced import STATE
from tiny import COMMON, randomized, tiny

SCALING = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5}


def described(model) -> list[str]:
    """Of the first layer: the types of what its branches do, or why it is not described."""
    fusing = getattr(pkv_hf.patch(model), STATE).fusing
    first = fusing._all(model.model, None, None)[0]
    return [first] if isinstance(first, str) else [type(branch.body).__name__ for branch in first.branches]


def scales_behind_a_position():
    config = transformers.Ministral3Config(
        **COMMON, head_dim=16, rope_parameters={**SCALING, "original_max_position_embeddings": 64}
    )
    return randomized(transformers.Ministral3ForCausalLM, config)


def scales_by_what_the_cache_holds():
    scaled = {"attn_temperature_tuning": True, "floor_scale": 64, "attn_scale": 0.5, "no_rope_layers": [0, 0, 0]}
    plain = {"head_dim": 16, "intermediate_size_mlp": 96, "moe_layers": [], "layer_types": ["full_attention"] * 3}
    return randomized(transformers.Llama4ForCausalLM, transformers.Llama4TextConfig(**COMMON, **scaled, **plain))


class ClampsLarge(llama.LlamaMLP):
    def forward(self, x):
        gate = self.act_fn(self.gate_proj(x)).clamp(max=20.0)
        return self.down_proj(gate * self.up_proj(x).clamp(-20.0, 20.0))


class EpsilonOutside(llama.LlamaRMSNorm):
    def forward(self, hidden_states):
        size = hidden_states.square().mean(-1, keepdim=True).sqrt()
        return self.weight * (hidden_states / (size + self.variance_epsilon))


class Scaled(llama.LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs) * self.scalar.square()


class Indexed(llama.LlamaMLP):
    def forward(self, x, index=0):
        return super().forward(x) * (1 + index)


class GivesItsIndex(llama.LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        self.mlp.__class__ = Indexed
        return hidden_states + self.mlp(hidden_states, index=self.self_attn.layer_idx)


def with_class(name: str, of_class: type):
    model = tiny("llama", num_hidden_layers=1)
    model.model.layers[0].get_submodule(name).__class__ = of_class
    return model


def scaled_by_a_buffer():
    model = with_class("", Scaled)
    model.model.layers[0].register_buffer("scalar", torch.ones(1))
    return model


UNSEEN = {
    "position": (scales_behind_a_position, ["AsIs", "MLP"]),
    "length of the cache": (scales_by_what_the_cache_holds, ["AsIs", "MLP"]),
    "clamp": (lambda: with_class("mlp", ClampsLarge), ["Attention", "AsIs"]),
    "epsilon": (
        lambda: with_class("input_layernorm", EpsilonOutside),
        ["what its modules give is not added to the residual stream alone"],
    ),
    "index": (lambda: with_class("", GivesItsIndex), ["a Indexed is given what its layer computes"]),
    "buffer": (scaled_by_a_buffer, ["what its modules give is not added to the residual stream alone"]),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_a_short_look_does_not_show(name):
    make, expected = UNSEEN[name]
    assert described(make()) == expected


def test_a_clamp_in_place_is_seen_where_it_changes_nothing(monkeypatch):
    rotate = llama.apply_rotary_pos_emb

    def clamped(q, k, *args):
        return rotate(q.clamp_(-1e3, 1e3), k, *args)

    monkeypatch.setattr(llama, "apply_rotary_pos_emb", clamped)
    assert described(tiny("llama", num_hidden_layers=1)) == ["AsIs", "MLP"]


class ReadsSettings(llama.LlamaMLP):
    def forward(self, x):
        out = super().forward(x)
        return out if getattr(self.config, "factor", 1.0) == 1.0 else out * self.config.factor


def test_settings_that_layers_read_in_their_forwards():
    model = with_class("mlp", ReadsSettings)
    assert described(model) == ["Attention", "MLP"]
    model.config.factor = 2.0
    fusing = getattr(model, STATE).fusing
    (layer,) = fusing._all(model.model, None, None)
    assert isinstance(layer.branches[1].body, AsIs)
