"""A decode step through the layers that the families share, in as few launches as their modules allow.

A layer of plain half-precision weights is seven launches: norm and q, k, v; q/k norm, RoPE and append; attention and
its merge; output projection and residual; norm, gate, up and SwiGLU; down projection and residual. Modules that are
something else (adapters, quantised weights) are called as they are, between fused norms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation

from pkv_hf.routes.base import Norms, Scores
from pkv_hf.runtime.step import Step


def decode_forward(
    decoder: Any, tokens: torch.Tensor, positions: torch.Tensor, step: Step, head: nn.Module | None
) -> torch.Tensor:
    """Hidden states `[B, q_len, hidden]` of tokens at positions, both int64 `[B, q_len]`; with `head` its logits."""
    hidden = decoder.embed_tokens(tokens)
    cos, sin = decoder.rotary_emb(hidden, position_ids=positions)
    shape = hidden.shape
    stream = Stream(hidden.view(-1, shape[-1]))
    for layer in decoder.layers[: decoder.config.num_hidden_layers]:  # fewer while a draft exits early
        _attention(layer, stream, cos, sin, step, shape[:2])
        _mlp(layer.post_attention_layernorm, layer.mlp, stream)
    if head is not None and kernel_takes([head], stream.hidden):
        return _linear(*stream.normed(decoder.norm), [head]).view(*shape[:2], -1)
    normed = stream.norm(decoder.norm).view(shape)
    return normed if head is None else head(normed)


SILU = (nn.SiLU, SiLUActivation)
"""The activations that our kernels compute."""


class Stream:
    """The residual stream `[B * q_len, hidden]`, and what is still to be added to it."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden
        self.pending: torch.Tensor | None = None

    def settle(self) -> torch.Tensor:
        if self.pending is not None:
            self.hidden, self.pending = self.hidden + self.pending, None
        return self.hidden

    def normed(self, norm: Any) -> tuple[torch.Tensor, Any]:
        """x and a norm that is still to be taken of it: one row's norm goes with the product, more are normed first."""
        return (self.settle(), norm) if len(self.hidden) == 1 else (self.norm(norm), None)

    def norm(self, norm: Any) -> torch.Tensor:
        from pkv_hf.kernels.elementwise import rms_norm

        normed, self.hidden = rms_norm(self.hidden, norm.weight, norm.variance_epsilon, self.pending)
        self.pending = None
        return normed

    def add(self, linear: nn.Module, x: torch.Tensor) -> None:
        """Adds a projection of x; a norm has been taken since the last, so that nothing is pending."""
        if kernel_takes([linear], x):
            self.hidden = _linear(x, None, [linear], residual=self.hidden)
        else:
            self.pending = linear(x)


def kernel_takes(modules: list[Any], x: torch.Tensor) -> bool:
    """Whether modules are plain linear layers, with or without biases alike, whose products with x are better ours.

    A quantised or sharded weight can be a subclass of tensor in a plain layer, and give its dtype as the plain one's.
    """
    from pkv_hf.kernels.linear import DTYPES, MAX_ROWS, outruns_cublas

    return (
        x.dtype in DTYPES
        and len(x) <= MAX_ROWS
        and all(type(module) is nn.Linear and type(module.weight) is nn.Parameter for module in modules)
        and all(module.weight.dtype == x.dtype and module.weight.is_contiguous() for module in modules)
        and len({module.bias is None for module in modules}) == 1
        and outruns_cublas(x, sum(len(module.weight) for module in modules))
    )


def _linear(x: torch.Tensor, norm: Any, modules: list[Any], residual: torch.Tensor | None = None) -> torch.Tensor:
    from pkv_hf.kernels.linear import linear

    weights, biases = [module.weight for module in modules], [module.bias for module in modules]
    return linear(x, weights, biases, residual=residual, **_settings(norm))


def _settings(norm: Any) -> dict[str, Any]:
    return {} if norm is None else {"norm": norm.weight, "eps": norm.variance_epsilon}


def _attention(layer: Any, stream: Stream, cos: torch.Tensor, sin: torch.Tensor, step: Step, shape: torch.Size) -> None:
    attention = layer.self_attn
    modules = [attention.q_proj, attention.k_proj, attention.v_proj]
    if kernel_takes(modules, stream.hidden):
        together = _linear(*stream.normed(layer.input_layernorm), modules)
        states = together.split([len(module.weight) for module in modules], dim=1)
    else:
        normed = stream.norm(layer.input_layernorm)
        states = tuple(module(normed) for module in modules)
    q, k, v = (state.view(*shape, -1, attention.head_dim).transpose(1, 2) for state in states)
    norms = None
    if hasattr(attention, "q_norm"):
        q_norm, k_norm = attention.q_norm, attention.k_norm
        if q_norm.variance_epsilon == k_norm.variance_epsilon:  # the kernel takes one
            norms = Norms(q_norm.weight, k_norm.weight, q_norm.variance_epsilon)
        else:
            q, k = q_norm(q), k_norm(k)
    out = step.rope_attend(q, k, v, cos, sin, attention.layer_idx, Scores(attention.scaling), norms=norms)
    stream.add(attention.o_proj, out.view(len(stream.hidden), -1))


def _mlp(norm: Any, mlp: Any, stream: Stream) -> None:
    from pkv_hf.kernels.elementwise import act_mul
    from pkv_hf.kernels.linear import gated

    gate, up = mlp.gate_proj, mlp.up_proj
    if type(mlp.act_fn) not in SILU:
        normed = stream.norm(norm)
        stream.pending = mlp(normed)
        return
    if kernel_takes([gate, up], stream.hidden) and gate.bias is None and gate.weight.shape == up.weight.shape:
        x, norm = stream.normed(norm)
        x = gated(x, gate.weight, up.weight, **_settings(norm))
    else:
        normed = stream.norm(norm)
        x = act_mul(gate(normed), up(normed), "silu")
    stream.add(mlp.down_proj, x)
