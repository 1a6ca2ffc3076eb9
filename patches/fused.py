"""A decode step of a described layer, in as few launches as its modules allow.

A layer of plain half-precision weights with norms before its branches is seven launches: norm and q, k, v; norms of
heads, RoPE and append; attention and its merge; output projection and residual; norm, gate, up and activation; down
projection and residual. A norm after a branch, the sum with it and the next norm, across layers too, are one launch
more. Where a product of several rows is cut in parts, that launch adds them up too. Adapters add a
launch to each group of projections that share an input. Modules that are something else (quantised weights, experts)
are called as they are, between fused norms.
"""

from __future__ import annotations

from typing import Any

import torch

from pkv_hf.compat import CACHE
from pkv_hf.errors import LayerNotServed
from pkv_hf.patches.description import MLP, AsIs, Attention, Branch, Layer
from pkv_hf.patches.probe import returned
from pkv_hf.patches.projections.base import Normed, Projection
from pkv_hf.patches.projections.registry import Kinds
from pkv_hf.patches.stream import Stream, projections
from pkv_hf.routes.base import Norms
from pkv_hf.runtime.interface import seen_by
from pkv_hf.runtime.step import Step


class FusedLayer:
    """A layer's forward by its description, for the steps of a `PagedCache` whose route appends with RoPE."""

    def __init__(self, layer: Layer, following: Branch | None) -> None:
        self.layer = layer
        """Bound to its modules."""
        self.following = following
        """What the next layer begins with, None where that is not fused."""
        self._kinds = Kinds()

    def read(self) -> None:
        """Reads the layer's projections, which its first step may be captured with."""
        for branch in self.layer.branches:
            body = branch.body
            ends = [body.output] if isinstance(body, Attention) else [body.down] if isinstance(body, MLP) else []
            for modules in (projections(body), tuple(ends)):
                if modules:
                    self._kinds.read(modules)

    def __call__(self, step: Step | None, hidden: torch.Tensor, given: dict[str, Any]) -> Any:
        """What the layer returns for hidden states `[B, q_len, width]` of the step's tokens; `given` are its other
        arguments. A layer without attention needs no step.
        """
        stream, branches = Stream(hidden, self._kinds), self.layer.branches
        for i, branch in enumerate(branches):
            if not branch.of_input:
                stream.source = stream.hidden
            following = self.following
            if i + 1 < len(branches):
                following = None if branches[i + 1].of_input else branches[i + 1]
            (x, kind), body = stream.normed(branch), branch.body
            if isinstance(body, Attention):
                assert step is not None
                assert kind is not None
                stream.add(body.output, _attention(body, kind, x, step, stream.shape, given), branch, following)
            elif isinstance(body, MLP):
                assert kind is not None
                stream.add(body.down, _mlp(body, kind, x), branch, following)
            else:
                stream.add(None, _mixed(body, x.x.view(stream.shape), given), branch, following)
        return returned(stream.result(self.following), self.layer.returns)


def product(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What a linear layer makes of x `[..., inputs]`."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return Kinds()((module,), rows).linear(Normed(rows)).view(*x.shape[:-1], -1)


def _attention(
    attention: Attention, kind: Projection, x: Normed, step: Step, shape: torch.Size, given: dict[str, Any]
) -> torch.Tensor:
    """What the output projection takes, `[B * q_len, H_q * D]`."""
    step.bounds.on(x.x.device)  # written before the projections: attention reads them before it waits for those
    q_width, kv_width = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    states = kind.each(x)
    q, k, v = states if len(states) == 3 else states[0].split([q_width, kv_width, kv_width], dim=1)
    norms: Norms | None = None
    if attention.norms is not None:
        q_norm, k_norm = attention.norms
        norms = Norms(q_norm.module.weight, k_norm.module.weight, q_norm.eps, q_norm.offset)
    q, k, v = (
        state.view(*shape[:2], count, -1)
        for state, count in ((q, attention.heads), (k, attention.kv_heads), (v, attention.kv_heads))
    )
    gate = None
    if attention.gated:
        q, gate = q.split(attention.head_dim, dim=-1)
    cos, sin = given["position_embeddings"] if attention.rotary.dim != 0 else (None, None)
    layer_idx = attention.module.layer_idx
    scores = attention.scores._replace(chunked=_chunked(step, layer_idx, given.get("attention_mask")))
    out = step.rope_attend(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), cos, sin, layer_idx, scores, attention.rotary, norms
    )
    if gate is not None:
        out = out * torch.sigmoid(gate)
    return out.reshape(len(x.x), -1)


def _chunked(step: Step, layer_idx: int, mask: Any) -> bool:
    """Whether a layer's mask counts the tokens of chunks. Raises LayerNotServed for one of others than it holds."""
    seen, held = seen_by(mask), step.cache.layers[layer_idx].table.window
    if seen is None or seen[0] != held:
        raise LayerNotServed(f"layer {layer_idx} has a mask of other tokens than the {held or 'all'} that it holds")
    return seen[1]


def _mlp(mlp: MLP, kind: Projection, x: Normed) -> torch.Tensor:
    """What the down projection takes, `[B * q_len, intermediate]`."""
    return kind.linear(x, activation=mlp.activation) if mlp.gate is None else kind.gated(x, mlp.activation)


def _mixed(body: AsIs, hidden: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    """What a module that is not described gives, by its mixer where that takes the step."""
    cache = given.get(CACHE)
    if body.mixer is None or cache is None or hidden.shape[1] != 1:
        return _as_is(body, hidden, given)
    states = cache.layers[body.module.layer_idx]
    if states.record_past or not states.tensors:
        return _as_is(body, hidden, given)
    return body.mixer.step(hidden, states).reshape(-1, hidden.shape[-1])


def _as_is(body: AsIs, hidden: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    arguments = {here: given[there] for here, there in body.handed_on if there in given}
    arguments.update(body.constants)
    if body.hidden:
        arguments[body.hidden] = hidden
    output = body.module(**arguments) if body.hidden else body.module(hidden, **arguments)
    output = output[0] if isinstance(output, tuple) else output
    return output.view(-1, output.shape[-1])
