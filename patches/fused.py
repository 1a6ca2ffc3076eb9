"""A decode step of a described layer, in as few launches as its modules allow.

A layer of plain half-precision weights with norms before its branches is seven launches: norm and q, k, v; norms of
heads, RoPE and append; attention and its merge; output projection and residual; norm, gate, up and activation; down
projection and residual. A norm after a branch, the sum with it and the next norm, across layers too, are one launch
more. Where a product of several rows is cut in parts, that launch adds them up too. Adapters add a
launch to each group of projections that share an input. Modules that are something else (quantised weights, blocks of
experts) are called as they are, between fused norms.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from pkv_hf.compat import CACHE
from pkv_hf.errors import LayerNotServed
from pkv_hf.patches.description import MLP, AsIs, Attention, Branch, Layer
from pkv_hf.patches.experts.beside import Beside
from pkv_hf.patches.probe import returned
from pkv_hf.patches.projections.base import Normed, Projection
from pkv_hf.patches.projections.registry import Kinds
from pkv_hf.patches.stream import Stream, acted, projections, take_norm
from pkv_hf.routes.base import Norms, Scores
from pkv_hf.runtime.fusion import Multiplied
from pkv_hf.runtime.interface import HARMLESS, seen_by
from pkv_hf.runtime.step import Step, handle_of, launching_on


class FusedLayer:
    """A layer's forward by its description, for the steps of a `PagedCache` whose route appends with RoPE."""

    def __init__(self, layer: Layer, following: Branch | None) -> None:
        self.layer = layer
        """Bound to its modules."""
        self.following = following
        """What the next layer begins with, None where that is not fused."""
        self._kinds = Kinds()
        self._known = layer.given | HARMLESS | {CACHE, "attention_mask"}

    def read(self) -> None:
        """Reads the layer's projections, which its first step may be captured with."""
        for branch in self.layer.branches:
            body = branch.body
            ends = [body.output] if isinstance(body, Attention) else [body.down] if isinstance(body, MLP) else []
            for modules in (projections(body), tuple(ends)):
                if modules:
                    self._kinds.read(modules)

    def count(self, found: Multiplied, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        """Adds to `found` how the layer's linear layers multiply rows, those of mixers from their first step on."""
        mixers = [branch.body.mixer for branch in self.layer.branches if isinstance(branch.body, AsIs)]
        for kinds in (self._kinds, *(mixer.kinds for mixer in mixers if mixer is not None)):
            kinds.count(found, rows, dtype, device)

    def __call__(self, step: Step | None, hidden: torch.Tensor, given: dict[str, Any]) -> Any:
        """What the layer returns for hidden states `[B, q_len, width]` of the step's tokens; `given` are its other
        arguments. A layer without attention needs no step. Raises LayerNotServed for arguments that its description
        does not know.
        """
        more = [name for name, value in given.items() if value is not None and name not in self._known]
        if more:
            raise LayerNotServed(f"layers are given {', '.join(more)}, which their description does not know")
        stream, branches = Stream(hidden, self._kinds), self.layer.branches
        for i, branch in enumerate(branches):
            if not branch.of_input:
                stream.source = stream.hidden
            following, gain = self.following, self.layer.gain
            if i + 1 < len(branches):
                following, gain = None if branches[i + 1].of_input else branches[i + 1], None
            (x, kind), body = stream.normed(branch), branch.body
            if isinstance(body, Attention):
                assert step is not None
                assert kind is not None
                attended = _attention if body.reads is None else _reading
                out = attended(body, kind, x, step, stream.shape, given)
                stream.add(body.output, out, branch, following, gain)
            elif isinstance(body, MLP):
                assert kind is not None
                stream.add(body.down, _mlp(body, kind, x, stream.shape, given), branch, following, gain)
            else:
                stream.add(None, _mixed(body, x.x.view(stream.shape), given), branch, following, gain)
        return returned(stream.result(self.following), self.layer.returns)


def multiplied(
    layers: Iterable[FusedLayer | Beside], rows: int, dtype: torch.dtype, device: torch.device
) -> Multiplied:
    found = Multiplied()
    for layer in layers:
        layer.count(found, rows, dtype, device)
    return found


def product(kinds: Kinds, module: Any, x: torch.Tensor) -> torch.Tensor:
    """What a linear layer makes of x `[..., inputs]`."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return kinds((module,), rows).linear(Normed(rows)).view(*x.shape[:-1], -1)


def _attention(
    attention: Attention, kind: Projection, x: Normed, step: Step, shape: torch.Size, given: dict[str, Any]
) -> torch.Tensor:
    """What the output projection takes, `[B * q_len, H_q * D]`."""
    step.bounds.on(x.x.device)  # written before the projections: attention reads them before it waits for those
    q_width, kv_width = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    states = kind.each(x)
    q, k, *other = states if len(states) > 1 else states[0].split([q_width, kv_width, kv_width], dim=1)
    v = other[0] if other else k
    if attention.v_norm is not None:
        v = take_norm(attention.v_norm, v.reshape(-1, attention.head_dim))
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
    cos, sin = _angles(attention, step, given)
    layer_idx = attention.module.layer_idx
    scores = _scores(attention, step, layer_idx, given.get("attention_mask"))
    out = step.rope_attend(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), cos, sin, layer_idx, scores, attention.rotary, norms
    )
    if attention.keeps is not None:
        name, at = attention.keeps
        given[name][at] = step.handed_on(k.transpose(1, 2), v.transpose(1, 2), layer_idx)
    if gate is not None:
        out = out * torch.sigmoid(gate)
    return out.reshape(len(x.x), -1)


def _reading(
    attention: Attention, kind: Projection, x: Normed, step: Step, shape: torch.Size, given: dict[str, Any]
) -> torch.Tensor:
    """`_attention` of a layer that appends nothing: over the pages of the layer whose keys and values it reads."""
    from pkv_hf.kernels.queries import rope

    assert attention.reads is not None
    name, at = attention.reads
    k, v = given[name][at]
    of_step, layer_idx = handle_of(k) or (None, 0)
    if of_step is not step:
        raise LayerNotServed(f"a {type(attention.module).__name__} reads other keys and values than the step's")
    q = kind.linear(x)
    q, gate = q.view(*shape[:2], attention.heads, -1), None
    if attention.gated:
        q, gate = q.split(attention.head_dim, dim=-1)
    norm = attention.norms and (attention.norms[0].module.weight, attention.norms[0].eps, attention.norms[0].offset)
    rotary, angles = attention.rotary, _angles(attention, step, given)
    with launching_on(q.device):
        q = rope(
            q.transpose(1, 2), *angles, norm, rotary=rotary.dim, interleaved=rotary.interleaved,
            paired_angles=rotary.paired,
        )  # fmt: skip
    scores = _scores(attention, step, layer_idx, given.get("attention_mask"))
    out = step.attend(q, k, v, layer_idx, scores)
    return (out if gate is None else out * torch.sigmoid(gate)).reshape(len(x.x), -1)


def _angles(attention: Attention, step: Step, given: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """cos and sin as kernels take them: those that come once for both halves are doubled for all layers of a step."""
    if attention.rotary.dim == 0:
        return None, None
    angles = given["position_embeddings"]
    if not attention.rotary.once:
        return angles
    if step.doubled is None or step.doubled[0] is not angles:
        step.doubled = angles, tuple(torch.cat([each, each], dim=-1) for each in angles)
    return step.doubled[1]


def _scores(attention: Attention, step: Step, layer_idx: int, mask: Any) -> Scores:
    """What attention over a layer's pages is asked for. Raises LayerNotServed for a mask of others than it holds."""
    seen, held = seen_by(mask), step.cache.layers[layer_idx].table.window
    if seen is None or seen[0] != held:
        raise LayerNotServed(f"layer {layer_idx} has a mask of other tokens than the {held or 'all'} that it holds")
    return attention.scores._replace(chunked=seen[1], sinks=attention.sinks)


def _mlp(mlp: MLP, kind: Projection, x: Normed, shape: torch.Size, given: dict[str, Any]) -> torch.Tensor:
    """What the down projection takes, `[B * q_len, intermediate]`."""
    from pkv_hf.kernels.elementwise import act_mul

    if mlp.by:
        gate = kind.linear(x)
        return act_mul(gate, given[mlp.by].expand(*shape[:-1], -1).reshape(gate.shape), mlp.activation)
    return acted(mlp, kind, x)


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
