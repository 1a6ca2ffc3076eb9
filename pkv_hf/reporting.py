"""`report`: what a patched model serves, how its last step ran, and what was left to transformers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from pkv_hf.arguments import whole
from pkv_hf.cache.sizes import KV_DTYPES, check_page_size
from pkv_hf.compat import unwrap
from pkv_hf.memory.weights import step_weight_bytes
from pkv_hf.policy.choose import Decision, choose
from pkv_hf.replaced import STATE
from pkv_hf.routes.base import StepShape
from pkv_hf.runtime.choice import uncaptured
from pkv_hf.runtime.counts import Calls, Steps
from pkv_hf.runtime.fusion import Fusion, Multiplied
from pkv_hf.runtime.prefix_cache.kept import PrefixCacheUse
from pkv_hf.runtime.state import PatchState
from pkv_hf.tables import mebibytes


@dataclass(frozen=True)
class Report:
    """The state of a patched model. `print()`, a REPL and a notebook show it as text."""

    family: str
    """The model_type."""
    layers: int
    """Its attention modules."""
    fused: int
    """The layers that the last step on static buffers ran by our kernels."""
    page_size: int
    kv_dtype: str
    """What the pages hold."""
    asked: str
    """The route that `patch` was given."""
    route: str | None
    """The route of the last step, None before the first."""
    weight_bytes: int
    """What a decode step reads of weights, all experts counted."""
    kv_bytes: int | None
    """What the last step read of K and V, None before the first; a sliding layer counts as one of full attention where
    the model has both. Linear-attention states, and layers that read another's K and V, do not count."""
    rejected: dict[str, str]
    """Why the last step's other candidates were refused, by route."""
    graphs: int
    """CUDA graphs that live caches hold."""
    graph_bytes: int
    """Memory that they share, kept for graphs to come."""
    calls: Calls
    """The decoder's forwards, by what served them."""
    steps: Steps
    """Decode steps on pages, by how they ran."""
    last_step: str | None
    """How the last of them ran, "captured", "static" or "eager"; None before the first."""
    multiplied: dict[str, int]
    """How many linear layers of the last step's fused layers our kernels multiplied by, by how weights are stored, such
    as "bfloat16" or "NF4 with adapters". Empty where no layer was fused; output embeddings do not count."""
    not_multiplied: dict[str, int]
    """How many of them ran their own forward, by why."""
    experts: int
    """How many of the last step's modules of stacked experts our kernels ran."""
    routers: int
    """How many of their routers' choices our kernels made; others ran their own code."""
    not_experts: dict[str, int]
    """How many of them ran their own forward, by why."""
    not_fused: str
    """Why it ran layers of transformers' own, empty where our kernels ran all; before it, what forbids that."""
    not_captured: str
    """Why it replayed no CUDA graph, empty where it did; before it, what forbids that."""
    not_run_ahead: str
    """Why `generate()` queues no step before the last one's tokens are read, by what is known of the model; empty for
    nothing. Where routes are not of Triton, on a CPU say, none is queued either."""
    prefix_cache: PrefixCacheUse | None
    """What pages of past prompts were good for; None where `patch` keeps none."""
    left: tuple[str, ...]
    """Why calls were left to transformers' own path, each reason once."""

    @property
    def bound_by(self) -> str | None:
        """What most of the last step's bytes were for, "projections" or "attention"; None before the first."""
        if self.kv_bytes is None:
            return None
        return "projections" if self.weight_bytes >= self.kv_bytes else "attention"

    @property
    def runs(self) -> str:
        """How the last step ran, in words."""
        if self.last_step is None:
            return "none yet"
        layers = f"our kernels run {self.fused} layers" if self.fused else "transformers' own layers run"
        return f"{self.last_step}, {layers}"

    def _weights(self) -> list[str]:
        """A line on the linear layers of fused layers; none where there are none."""
        ours = [f"{count} linear layers: {stored}" for stored, count in self.multiplied.items()]
        own = [f"{count} by their own forward: {why}" for why, count in self.not_multiplied.items()]
        return [f"weights   {'; '.join([*ours, *own])}"] * bool(ours or own)

    def _experts(self) -> list[str]:
        """A line on mixtures; none where there are none."""
        ours = [f"of {self.experts} mixtures by our kernels, with {self.routers} routers"] * bool(self.experts)
        own = [f"of {count} by their own forward: {why}" for why, count in self.not_experts.items()]
        return [f"experts   {'; '.join([*ours, *own])}"] * bool(ours or own)

    def _prefixes(self) -> list[str]:
        """Lines on pages of past prompts; none where none are kept."""
        use = self.prefix_cache
        if use is None:
            return []
        held = f"{mebibytes(use.nbytes)} of {mebibytes(use.budget)} held"
        saved = f"{use.hits} of {use.prompts} prompts began in kept pages, {use.tokens_saved} tokens saved"
        return [f"prefixes  {saved}, {held}", *(f"not in the prefix cache: {reason}" for reason in use.not_cached)]

    def _not_better(self) -> list[str]:
        if self.not_fused == self.not_captured:
            return [f"not fused or captured: {self.not_fused}"] * bool(self.not_fused)
        kinds = {"fused": self.not_fused, "captured": self.not_captured}
        return [f"not {kind}: {why}" for kind, why in kinds.items() if why]

    def __repr__(self) -> str:
        lines = [
            f"family    {self.family}, {self.layers} attention layers patched",
            f"cache     PagedCache, pages of {self.page_size} tokens in {self.kv_dtype}",
            f"route     {self.asked}, last step: {self.route or 'none yet'}",
            f"bytes     a step reads {mebibytes(self.weight_bytes)} of weights"
            + (
                ""
                if self.kv_bytes is None
                else f", the last one {mebibytes(self.kv_bytes)} of K and V: {self.bound_by} bound it"
            ),
            f"graphs    {self.graphs} captured, {mebibytes(self.graph_bytes)}"
            if self.graph_bytes
            else "graphs    none",
            f"calls     {self.calls.pages} on pages, {self.calls.transformers} by transformers"
            + (f", {self.calls.masked} prompts under the model's own masks" if self.calls.masked else ""),
            f"steps     {self.steps.captured} captured, {self.steps.static} static, {self.steps.eager} eager",
            f"last step {self.runs}",
            *self._weights(),
            *self._experts(),
            *self._not_better(),
            *self._prefixes(),
            *(f"not run ahead: {why}" for why in [self.not_run_ahead] if why),
            *(f"rejected  {route}: {reason}" for route, reason in self.rejected.items()),
            *(f"left to transformers: {reason}" for reason in self.left),
        ]
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """What a patched model does; `print()` shows it as text. Raises ValueError for a model that is not patched."""
    state = _state_of(model)
    with state.lock:
        graphs = sum(step.captured for step in state.static_steps)
    steps = state.decision.shapes if state.decision else ()
    last = state.counts.last_step
    fusion = _fusion(state) if last and last.how != "eager" else None
    of_weights = Multiplied() if fusion is None else _multiplied(state, fusion)
    experts, routers, not_experts = (0, 0, {}) if fusion is None else _experts(state, fusion)
    return Report(
        family=state.family,
        layers=len(state.known.attentions),
        fused=len(fusion.layers) if fusion else 0,
        page_size=state.page_size,
        kv_dtype=str(KV_DTYPES[state.kv_dtype] if state.kv_dtype else state.known.model.dtype).removeprefix("torch."),
        asked=state.route,
        route=state.decision.route.name if state.decision else None,
        weight_bytes=step_weight_bytes(state.known.model),
        kv_bytes=sum(step.tokens * step.kv_heads * step.token_bytes * step.layers for step in steps) or None,
        rejected=state.decision.rejected if state.decision else {},
        graphs=graphs,
        graph_bytes=state.graph_memories.nbytes,
        calls=state.counts.calls,
        steps=state.counts.steps,
        last_step=last.how if last else None,
        multiplied=dict(of_weights.ours),
        not_multiplied=dict(of_weights.own),
        experts=experts,
        routers=routers,
        not_experts=not_experts,
        not_fused=_not_fused(state),
        not_captured=last.why if last else uncaptured(state, state.known.model.device) or state.known.look().not_static,
        not_run_ahead=_not_run_ahead(state),
        prefix_cache=None if state.prefix_cache is None else state.prefix_cache.use,
        left=tuple(state.said.values()),
    )


def _not_fused(state: PatchState) -> str:
    """Why the last step ran transformers' own layers, or the first one will; empty where our kernels run them."""
    last = state.counts.last_step
    if not state.settings["fuse"]:
        return "patch() was called with fuse=False"
    if last is None:
        return state.known.look().not_static
    fusion = _fusion(state)
    if last.how == "eager" and not (fusion and not fusion.layers):
        return last.why
    return "; ".join(f"{count} layers: {why}" for why, count in fusion.reasons.items()) if fusion else ""


def _fusion(state: PatchState) -> Fusion | None:
    """Which layers steps of the last step's route fuse, None where none was to."""
    route = state.decision.route.name if state.decision else ""
    return state.known.look().fusions.get(route)


def _multiplied(state: PatchState, fusion: Fusion) -> Multiplied:
    """How the last step's linear layers multiplied: by its rows, so that no step has to note it."""
    assert state.decision is not None
    step = state.decision.shapes[0]
    return fusion.multiplied(step.rows * step.q_len, step.dtype, step.device)


def _experts(state: PatchState, fusion: Fusion) -> tuple[int, int, dict[str, int]]:
    """How many mixtures ran by our kernels in the last step, by its rows, with how many routers; and why others did
    not."""
    assert state.decision is not None
    step, mixtures = state.decision.shapes[0], fusion.mixtures
    count, own, rows = 0, Counter(mixtures.own), step.rows * step.q_len
    for module in mixtures.forms:
        why = mixtures.why_not(rows * mixtures.spread.get(module, 1), step.device)
        own.update([why] * bool(why))
        count += not why
    routers = 0 if mixtures.why_not(rows, step.device) else len(mixtures.routers)
    return count, routers, dict(own)


def _not_run_ahead(state: PatchState) -> str:
    if not state.settings["run_ahead"]:
        return "patch() was called with run_ahead=False"
    look = state.known.look()
    return look.loop or look.not_ahead


def explain(model_or_step: nn.Module | StepShape) -> Decision:
    """Every route with its predicted time, or why it is not taken; `print()` shows the table.

    For a patched model that is its last step, for a `StepShape` what "auto" would take.

    Raises ValueError for a model that is not patched or has not run a step, and for a step that cannot be.
    """
    if isinstance(model_or_step, StepShape):
        _check(model_or_step)
        return choose("auto", model_or_step)
    last = _state_of(model_or_step).decision
    if last is None:
        raise ValueError(f"{type(model_or_step).__name__} has run no step yet: call generate() first")
    return last


def _check(step: StepShape) -> None:
    """Raises ValueError for a step that no model takes."""
    for name, kind in (("device", torch.device), ("dtype", torch.dtype), ("kv_dtype", torch.dtype)):
        if not isinstance(getattr(step, name), kind):
            raise ValueError(f"{name}={getattr(step, name)!r} is no torch.{kind.__name__}: pass one")
    index = step.device.index or 0
    if step.device.type == "cuda" and index >= torch.cuda.device_count():
        raise ValueError(f"device={step.device} is not on this machine, which has {torch.cuda.device_count()} GPUs")
    if not step.dtype.is_floating_point or step.kv_dtype not in KV_DTYPES:
        raise ValueError(f"dtype={step.dtype}, kv_dtype={step.kv_dtype}: pass a floating one, and one that pages hold")
    check_page_size(step.page_size)
    for name in ("q_len", "group", "kv_heads", "head_dim", "layers", "rows", "longest"):
        whole(name, getattr(step, name), 1, "pass the step's")
    if not step.longest <= whole("tokens", step.tokens, 1, "pass the step's") <= step.rows * step.longest:
        raise ValueError(f"tokens={step.tokens} of {step.rows} rows, the longest of {step.longest}: pass their sum")


def _state_of(model: nn.Module) -> PatchState:
    state: PatchState | None = getattr(unwrap(model), STATE, None)
    if state is None:
        raise ValueError(f"{type(model).__name__} is not patched: call pkv_hf.patch(model) first")
    return state
