"""What a patched model does with a call: serve it on pages, or leave it to transformers and say why."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from pkv_hf import compat
from pkv_hf.cache.packing import Packing
from pkv_hf.cache.paged import PagedCache
from pkv_hf.errors import LayerNotServed, NotServed, RouteError
from pkv_hf.policy.choose import Decision, choose
from pkv_hf.routes.base import MAX_DECODE_QUERIES, Bounds, Route, StepShape
from pkv_hf.routes.registry import ROUTES
from pkv_hf.runtime.graphs import CaptureError
from pkv_hf.runtime.state import NAME, STATE, LayerShape, PatchState, original_forward, original_implementation
from pkv_hf.runtime.static import DecodeStep
from pkv_hf.runtime.step import Step
from pkv_hf.runtime.watch import Watch, hooked

PLAIN_ARGUMENTS = frozenset({"input_ids", "inputs_embeds", "attention_mask", "position_ids", compat.CACHE}) | {
    "use_cache",
    "return_dict",
    "cache_position",
}
"""Arguments of a decoder that a step accounts for; whatever else is given is for transformers' layers to see."""

last_made: ContextVar[ref[PagedCache] | None] = ContextVar("pkv_hf_last_made", default=None)
"""The cache that generate() of a patched model made last in this thread."""


def decoder_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of a decoder's `forward`: with a `PagedCache`, its layers append to pages and read them there."""
    state: PatchState = getattr(self, STATE)
    state.follow(self.config)
    kwargs = compat.call_arguments(self, args, kwargs)
    try:
        output = serve(self, state, plan(self, state, kwargs), kwargs)
        state.counts.add("pages")
        return output
    except NotServed as error:
        reason = error.with_traceback(None)  # which would hold the tensors of the forward that was given up
    except (RouteError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not state.generic:
            raise
        # Layers that are not known may compute with the mask, which is empty here, and fail.
        reason = LayerNotServed(f"{type(self).__name__} fails on pages with {type(error).__name__}: {error}")
    if str(reason):
        state.say(str(reason))
    output = original_forward(self)(**kwargs)
    if not torch.compiler.is_compiling():  # a number that changes would have the model compiled at every call
        state.counts.add("transformers")
    if isinstance(reason, LayerNotServed) and not _extra_arguments(kwargs):
        state.refused = str(reason)
    return output


def serve(decoder: Any, state: PatchState, step: Step, call: dict[str, Any]) -> Any:
    """A call of the decoder on pages. Raises NotServed, with the cache as it was, where a layer cannot be served."""
    cache, bounds = step.cache, step.bounds
    alone = _last_hidden_alone(decoder, call)
    static = None
    if step.decodes and call.get("input_ids") is not None and alone and state.output_type is not None:
        static = static_step(decoder, state, cache, step.route, bounds.q_len)
    if static is not None:
        positions = call.get("position_ids")
        if positions is None:
            positions = torch.arange(bounds.begin, bounds.end, device=static.device)[None]
        hidden = run_static(state, static, cache, call["input_ids"], positions, bounds.starts)
        return state.output_type(last_hidden_state=hidden.clone(), **{compat.CACHE: cache})  # type: ignore[misc]
    packs = not state.generic and not bounds.begin and bounds.starts.any() and alone and not hooked(decoder)
    if packs and not compat.unfamiliar(decoder, state.prefix):
        return packed_prefill(decoder, step, dict(call))
    with step:
        output = original_forward(decoder)(**call)
    if step.decodes:
        state.counts.add("eager")
    if state.generic and alone:
        plain = isinstance(output, ModelOutput) and set(output) <= {"last_hidden_state", compat.CACHE}
        state.output_type = type(output) if plain else None
    return output


def packed_prefill(decoder: Any, step: Step, call: dict[str, Any]) -> BaseModelOutputWithPast:
    """The first forward of left-padded rows, over their real tokens alone."""
    packing = Packing(step.bounds.starts, step.bounds.q_len)
    tokens = next(call[name] for name in ("input_ids", "inputs_embeds") if call.get(name) is not None)
    positions = call.get("position_ids")
    if positions is None:
        positions = torch.arange(packing.length, device=tokens.device)[None]
    positions = positions.expand(len(packing.starts), -1)
    for name, tensor in (("input_ids", call.get("input_ids")), ("inputs_embeds", call.get("inputs_embeds"))):
        call[name] = None if tensor is None else packing.pack(tensor)
    call.update(position_ids=packing.pack(positions), attention_mask=None)
    with Step(step.cache, step.bounds, step.route, packing):
        output = original_forward(decoder)(**call)
    output.last_hidden_state = packing.unpack(output.last_hidden_state)
    return output


def _extra_arguments(call: dict[str, Any]) -> list[str]:
    """The arguments of a call that say more than which tokens there are and where they go."""
    given = [name for name, value in call.items() if value is not None and name not in PLAIN_ARGUMENTS]
    return [name for name in given if not name.startswith("output_") or call[name]]


def _last_hidden_alone(decoder: Any, call: dict[str, Any]) -> bool:
    """Whether a call asks for the last hidden states and nothing else."""
    config, positions = decoder.config, call.get("position_ids")
    return (
        not _extra_arguments(call)
        and not call.get("output_hidden_states", getattr(config, "output_hidden_states", False))
        and call.get("return_dict", getattr(config, "return_dict", True)) is not False
        and call.get("use_cache") is not False
        and (positions is None or positions.ndim == 2)
    )


def static_step(
    decoder: Any, state: PatchState, cache: PagedCache, route: Route, q_len: int, head: nn.Module | None = None
) -> DecodeStep | None:
    """The cache's step over static buffers for decode steps of a shape; None where transformers' layers have to run."""
    if not route.fuses_rope or not (state.fused_forward or captures(state, cache.device)):
        return None
    if state.watch is None or not state.watch.unchanged():
        state.watch = Watch([state.model])
        unknown = compat.not_captured(decoder) if state.generic else compat.unfamiliar(decoder, state.prefix)
        state.not_static = state.watch.reason or compat.dynamic_rope(decoder) or unknown
        for step in state.decode_steps:
            step.drop()
    if state.not_static:
        state.say(f"the decoder's layers, attention stays on pages: {state.not_static}")
        return None
    key = (state.watch, cache.rows, q_len, route.name, head is not None)
    if key not in cache.decode_steps:
        for stale in [key for key in cache.decode_steps if key[0] is not state.watch]:
            del cache.decode_steps[stale]
        cache.decode_steps[key] = DecodeStep(decoder, state.fused_forward or transformers_forward, head, route, q_len)
        state.decode_steps.add(cache.decode_steps[key])
    return cache.decode_steps[key]


def captures(state: PatchState, device: torch.device) -> bool:
    return state.cuda_graphs and device.type == "cuda"


def run_static(
    state: PatchState,
    step: DecodeStep,
    cache: PagedCache,
    tokens: torch.Tensor,
    positions: torch.Tensor | None,
    starts: np.ndarray,
) -> torch.Tensor:
    """Runs a static step on tokens `[B, q_len]`, by its graph from the second run of its shape on.

    `positions` are `[1 or B, q_len]`; None goes on from this step's last run, right after which it must come.
    The first run compiles and loads what a capture may not. The result is overwritten by the next run.
    """
    shape = (step.device, step.dtype, cache.rows, step.q_len, step.route.name, step.head is None, cache.page_size)
    memories = state.graph_memories if captures(state, step.device) and shape in state.compiled else None
    try:
        output = step.run(cache, tokens, positions, starts, memories)
    except CaptureError as error:
        state.cuda_graphs = False
        state.say(f"CUDA graphs, decode steps run without: {error}")
        output = step.run(cache, tokens, positions, starts, None)
    state.compiled.add(shape)
    state.counts.add("captured" if step.captured else "static")
    return output


def transformers_forward(
    decoder: Any, tokens: torch.Tensor, positions: torch.Tensor, step: Step, head: nn.Module | None
) -> torch.Tensor:
    """A decode step through transformers' own layers."""
    output = original_forward(decoder)(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=None,
        use_cache=True,
        **{compat.CACHE: step.cache},
    )
    return output.last_hidden_state if head is None else head(output.last_hidden_state)


def plan(decoder: Any, state: PatchState, call: dict[str, Any]) -> Step:
    """The step that serves a call of the decoder.

    Raises NotServed with the reason where pages cannot serve it, RouteError where the route that the caller of `patch`
    named cannot.
    """
    cache = call.get(compat.CACHE)
    if decoder.training:
        raise NotServed("the model is in training mode")
    if cache is None:
        made = last_made.get()
        waiting = made() if made else None
        if waiting is not None and not waiting.rows:
            raise NotServed(f"generate() made a PagedCache, and {type(decoder).__name__} was called without it")
        raise NotServed
    if state.refused:
        raise NotServed(state.refused)
    if not isinstance(cache, PagedCache):
        raise NotServed(f"the cache is a {type(cache).__name__}, not a PagedCache")
    if cache.windows != state.windows[: len(cache.layers)]:
        raise NotServed("the PagedCache has other windows than the model's layers, or more layers")
    if len({layer.length for layer in cache.layers}) > 1:
        raise NotServed("the PagedCache holds more tokens of some layers than of others")
    if torch.compiler.is_compiling():
        raise NotServed("the model is being compiled")
    config = decoder.config
    if config._attn_implementation != NAME or original_implementation(config) != state.implementation:
        raise NotServed("the attention implementation was set after patch(): patch again")
    if call.get("output_attentions", getattr(config, "output_attentions", False)):
        raise NotServed("output_attentions=True needs the attention weights")
    tokens = call["input_ids"] if call.get("input_ids") is not None else call.get("inputs_embeds")
    if tokens is None:
        raise NotServed("there are neither input_ids nor inputs_embeds")
    weight = next(decoder.parameters())
    if torch.is_grad_enabled() and (weight.requires_grad or tokens.requires_grad):
        raise NotServed("gradients are being computed: use torch.no_grad() or torch.inference_mode()")
    rows, q_len = tokens.shape[:2]
    if not rows * q_len:
        raise NotServed(f"the call is of {rows} x {q_len} tokens")
    starts = row_starts(call.get("attention_mask"), cache, rows, q_len, state)
    route = choose_route(state, cache, starts, q_len, tokens.device, weight.dtype)
    return Step(cache, Bounds(starts, cache.get_seq_length(), q_len), route)


def row_starts(mask: Any, cache: PagedCache, rows: int, q_len: int, state: PatchState) -> np.ndarray:
    """The first real position of every row (int64 `[rows]`), by the attention mask and by what the cache holds.

    Raises NotServed for masks that are more than left padding.
    """
    past = cache.get_seq_length()
    pads = cache.pads if cache.rows else np.zeros(rows, dtype=np.int64)
    if len(pads) != rows:
        raise NotServed(f"the batch is {rows}, but the PagedCache holds {len(pads)} rows")
    if mask is None:
        if pads.any():
            state.say("no attention_mask, but the cache holds left padding: it was not stored and stays masked")
        return pads
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        raise NotServed("attention_mask is not a [batch, length] tensor")
    if mask.shape != (rows, past + q_len):
        raise NotServed(f"attention_mask is {list(mask.shape)}, not {[rows, past + q_len]}")
    real = mask != 0
    ascends = (real[:, 1:] >= real[:, :-1]).all(dim=1)
    counts, ascends = torch.stack([real.sum(dim=1), ascends.long()]).cpu().numpy()  # one transfer for both
    if not ascends.all():
        raise NotServed("attention_mask has holes or right padding")
    if not counts.all():
        raise NotServed("attention_mask has a row without a real token")
    starts = past + q_len - counts
    if past and (starts < pads).any():
        state.say("attention_mask unmasks padding of an earlier call: it was not stored and stays masked")
    return np.maximum(starts, pads)


def choose_route(
    state: PatchState, cache: PagedCache, starts: np.ndarray, q_len: int, device: torch.device, dtype: torch.dtype
) -> Route:
    """The route of a cache's next step, noted there and for `report`; torch's before any layer has been seen."""
    state.decision = decide(state, cache, starts, q_len, device, dtype)
    route = ROUTES["sdpa"] if state.decision is None else state.decision.route
    cache.last_route = route.name
    return route


def decide(
    state: PatchState, cache: PagedCache, starts: np.ndarray, q_len: int, device: torch.device, dtype: torch.dtype
) -> Decision | None:
    """The policy's decision on a step of rows that begin at `starts` (int64 `[rows]`); None before a layer was seen.

    Of a prompt a route only appends; its attention is torch's, as that of any block longer than a decode step's.
    """
    if not state.shapes:
        return None
    layer = next(iter(state.shapes))
    begin, windows = cache.get_seq_length(), list(cache.tables)
    lengths = begin + q_len - starts
    if not begin or q_len > MAX_DECODE_QUERIES:
        q_len = 1
    if 0 not in windows:
        lengths = np.minimum(lengths, min(windows) + q_len - 1)
    shape = StepShape(
        device=device,
        dtype=dtype,
        kv_dtype=next((other for other in cache.dtypes if other != dtype), cache.kv_dtype or dtype),
        q_len=q_len,
        group=layer.group,
        kv_heads=cache.kv_heads or layer.kv_heads,
        head_dim=layer.head_dim,
        page_size=cache.page_size,
        layers=len(state.windows),
        rows=len(starts),
        tokens=int(lengths.sum()),
        longest=int(lengths.max()),
        padded=bool(starts.any()),
        windowed=any(windows),
        autocast=torch.is_autocast_enabled(device.type),
        captured=captures(state, device),
        named=state.route != "auto",
        torch_alone=torch_alone(state.shapes),
    )
    return choose(state.route, shape, cache.last_route, before=state.decision)


def torch_alone(shapes: set[LayerShape]) -> str:
    """Why layers of these shapes are left to torch on any device, empty where kernels may serve them."""
    if len(shapes) > 1:
        return "layers differ in their heads, head_dim or scale"
    return "attention scores are capped" if any(shape.softcap for shape in shapes) else ""
