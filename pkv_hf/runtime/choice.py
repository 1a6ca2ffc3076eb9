"""What an admitted call runs by: a route for its attention, and static buffers or transformers' layers around it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pkv_hf.cache.paged import PagedCache
from pkv_hf.policy.choose import Decision, choose
from pkv_hf.routes.base import MAX_DECODE_QUERIES, Route, StepShape
from pkv_hf.routes.registry import ROUTES
from pkv_hf.runtime.ahead.found import Found
from pkv_hf.runtime.ahead.greedy import Greedy, Selection
from pkv_hf.runtime.captured.static import StaticStep
from pkv_hf.runtime.evidence import Look
from pkv_hf.runtime.fusion import Fusion
from pkv_hf.runtime.state import PatchState


def choose_route(
    state: PatchState, cache: PagedCache, starts: np.ndarray, q_len: int, device: torch.device, dtype: torch.dtype
) -> Route:
    """The route of a cache's next step, noted there and for `report`; torch's before any layer has been seen.

    Raises RouteError where the route that the caller of `patch` named cannot serve the step.
    """
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
    if not state.known.shapes:
        return None
    begin, kinds = cache.get_seq_length(), state.known.by_shape
    lengths = begin + q_len - starts
    if not begin or q_len > MAX_DECODE_QUERIES:
        q_len = 1
    common: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "kv_dtype": next((other for other in cache.dtypes if other != dtype), cache.kv_dtype or dtype),
        "q_len": q_len,
        "page_size": cache.page_size,
        "rows": len(starts),
        "padded": bool(starts.any()),
        "autocast": torch.is_autocast_enabled(device.type),
        "captured": not uncaptured(state, device),
        "named": state.route != "auto",
        "fused": state.settings["fuse"],
    }
    shapes: list[StepShape] = []
    for layer, indices in kinds.items():
        windows = {cache.layers[i].window for i in indices if i < len(cache.layers)}
        seen = lengths if 0 in windows or not windows else np.minimum(lengths, min(windows) + q_len - 1)
        heads: dict[str, Any] = layer._asdict()
        if len(kinds) == 1:
            heads["kv_heads"] = cache.kv_heads or layer.kv_heads
        tokens: dict[str, Any] = {"tokens": int(seen.sum()), "longest": int(seen.max()), "windowed": any(windows)}
        shape = StepShape(layers=len(indices), **heads, **tokens, **common)
        shapes.insert(0 if 0 in windows else len(shapes), shape)
    return choose(state.route, shapes[0], cache.last_route, before=state.decision, others=tuple(shapes[1:]))


def uncaptured(state: PatchState, device: torch.device) -> str:
    """Why no decode step on a device is captured; empty where they are."""
    if device.type != "cuda":
        return f"a CUDA graph needs a GPU, the step is on {device.type}"
    return state.known.not_captured if state.cuda_graphs else "patch() was called with cuda_graphs=False"


def fusion_of(state: PatchState, look: Look, route: Route) -> Fusion:
    """Which layers are fused in the steps of a route, found out at the first of them."""
    if route.name not in look.fusions:
        look.fusions[route.name] = (
            state.fusing(state.known.decoder, state.known.kinds, route)
            if state.settings["fuse"]
            else Fusion(reasons={"patch() was called with fuse=False": len(state.known.kinds)})
        )
    return look.fusions[route.name]


def static_step(
    state: PatchState,
    cache: PagedCache,
    route: Route,
    q_len: int,
    ahead: Found | None = None,
    greedy: Greedy | None = None,
) -> StaticStep | str:
    """The cache's step of a shape over static buffers, or why transformers' layers have to run as they are."""
    if not route.fuses_rope:
        return f"the route {route.name} runs between transformers' layers"
    if state.known.may_keep_states:
        return "its modules may keep states, which a graph would write where they were"
    if any(layer.record_past for layer in cache.linear_layers):
        return "states that a crop may take back grow with every step"
    look = state.known.look()
    with state.lock:
        if state.looked is not look.token:
            state.looked = look.token
            for step in state.static_steps:
                step.drop()
    if look.not_static:
        state.say(f"the decoder's layers, attention stays on pages: {look.not_static}")
        return look.not_static
    fusion = fusion_of(state, look, route)
    if not (fusion.layers or fusion.mixtures.forms) and (why := uncaptured(state, cache.device)):
        return why
    head, stand_in = (None, None) if ahead is None else (ahead.logits, ahead.stand_in)
    ending = None if head is None else (stand_in, *Selection.sizes(greedy))
    held, key = cache.static_steps, (look.token, cache.rows, q_len, route.name, ending)
    if key not in held:
        for stale in [other for other in held if other[0] is not look.token]:
            del held[stale]
        step = StaticStep(state.known.decoder, head, route, q_len, fusion, stand_in)
        if head is not None and greedy is not None:
            step.selection = Selection(greedy, cache.rows, head.vocabulary, step.dtype, step.device)
        held[key] = step
        with state.lock:
            state.static_steps.add(held[key])
    return held[key]
