"""What an admitted call runs by: a route for its attention, and static buffers or transformers' layers around it."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from pkv_hf.cache.paged import PagedCache
from pkv_hf.policy.choose import Decision, choose
from pkv_hf.routes.base import MAX_DECODE_QUERIES, Route, StepShape
from pkv_hf.routes.registry import ROUTES
from pkv_hf.runtime.state import PatchState
from pkv_hf.runtime.static import Forward, StaticStep


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
    layer = next(iter(state.known.shapes.values()))
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
        layers=state.known.paged_layers,
        rows=len(starts),
        tokens=int(lengths.sum()),
        longest=int(lengths.max()),
        padded=bool(starts.any()),
        windowed=any(windows),
        autocast=torch.is_autocast_enabled(device.type),
        captured=captures(state, device),
        named=state.route != "auto",
        torch_alone=state.known.torch_alone,
    )
    return choose(state.route, shape, cache.last_route, before=state.decision)


def captures(state: PatchState, device: torch.device) -> bool:
    """Whether decode steps on a device are captured in CUDA graphs."""
    return state.cuda_graphs and device.type == "cuda" and not state.known.not_captured


def static_step(
    state: PatchState, cache: PagedCache, route: Route, q_len: int, layers: Forward, head: nn.Module | None = None
) -> StaticStep | None:
    """The cache's step of a shape over static buffers, None where transformers' layers have to run.

    `layers` is what runs in it where the family has no fused forward.
    """
    if not route.fuses_rope or not (state.fused_forward or captures(state, cache.device)):
        return None
    if state.known.may_keep_states or any(layer.record_past for layer in cache.linear_layers):
        return None  # a graph writes states where they were: not in modules, and not those that grow with every step
    look = state.known.look()
    with state.lock:
        if state.looked is not look.token:
            state.looked = look.token
            for step in state.static_steps:
                step.drop()
    if look.not_static:
        state.say(f"the decoder's layers, attention stays on pages: {look.not_static}")
        return None
    held, key = cache.static_steps, (look.token, cache.rows, q_len, route.name, head is not None)
    if key not in held:
        for stale in [other for other in held if other[0] is not look.token]:
            del held[stale]
        held[key] = StaticStep(state.known.decoder, state.fused_forward or layers, head, route, q_len)
        with state.lock:
            state.static_steps.add(held[key])
    return held[key]
