"""One forward of a patched decoder: through the gate, by what was chosen for it, or by transformers' own path."""

from __future__ import annotations

import contextlib
import inspect
import traceback
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from pkv_hf import compat, origins
from pkv_hf.cache.packing import Packing
from pkv_hf.cache.paged import PagedCache
from pkv_hf.errors import LayerNotServed, NotServed, RouteError
from pkv_hf.replaced import STATE, original
from pkv_hf.routes.base import Bounds, Route
from pkv_hf.runtime.admission import Admitted, admit, extra_arguments, tokens_of
from pkv_hf.runtime.ahead.found import Found
from pkv_hf.runtime.ahead.greedy import Greedy
from pkv_hf.runtime.ahead.logits import stub
from pkv_hf.runtime.captured.graphs import CaptureError
from pkv_hf.runtime.captured.static import NOTHING, StaticStep
from pkv_hf.runtime.captured.watch import hooks_of
from pkv_hf.runtime.choice import choose_route, static_step, uncaptured
from pkv_hf.runtime.interface import attention, mask
from pkv_hf.runtime.prefix_cache.prompts import Unlike, lost, seen
from pkv_hf.runtime.state import PatchState
from pkv_hf.runtime.step import Step, outside_of_steps, taken_back

NOT_PLACES = "its decoder counts positions of padded rows by itself"

compat.register(compat.NAME, attention, mask)  # where a patched model that is unpickled finds its forward


def decoder_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of a decoder's `forward`: with a `PagedCache`, its layers append to pages and read them there."""
    if torch.compiler.is_compiling():
        return original(self, "forward")(*args, **kwargs)
    state: PatchState = getattr(self, STATE)
    call = compat.call_arguments(self, args, kwargs)
    standing = stub.get()
    if standing is not None and standing.decoder is self:
        return standing.answer(call)
    if state.prefix_cache is not None and self.training and torch.is_grad_enabled():
        state.prefix_cache.clear()  # the weights are about to change, maybe unseen
    admitted = None
    try:
        admitted = admit(self, state, call)
        seen(state, admitted, call)
        output = _on_pages(self, state, admitted, call)
        state.counts.add("pages")
        state.known.served.add(admitted.begin > 0)
        state.known.learn_states(admitted.cache)
        return output
    except NotServed as error:
        reason = error.with_traceback(None)  # which would hold the tensors of the forward that was given up
    except (RouteError, torch.OutOfMemoryError, Unlike):
        raise
    except Exception as error:
        if admitted is None or not _may_be_ours(state, admitted, error):
            raise
        # Layers that are not known may compute with the mask, which is empty here, and fail.
        reason = LayerNotServed(f"{type(self).__name__} fails on pages with {type(error).__name__}: {error}")
    lost(call)
    return _by_transformers(self, state, call, reason)


def _may_be_ours(state: PatchState, admitted: Admitted, error: Exception) -> bool:
    """Whether an error can be for what layers get on pages: before such a call was ever served, and not of a hook."""
    if (admitted.begin > 0) in state.known.served:
        return False
    codes = {origins.code_of(each) for hook in hooks_of(state.known.decoder) for each in origins.chain(hook)}
    return not any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


def _by_transformers(decoder: Any, state: PatchState, call: dict[str, Any], reason: NotServed) -> Any:
    """A call by transformers' own path; all to come, too, where a plain call showed that layers cannot be served."""
    if str(reason):
        state.say(str(reason))
    with outside_of_steps():
        output = original(decoder, "forward")(**call)
    state.counts.add("transformers")
    if isinstance(reason, LayerNotServed) and not extra_arguments(call):
        state.known.look().refused = str(reason)
    return output


def _on_pages(decoder: Any, state: PatchState, admitted: Admitted, call: dict[str, Any]) -> Any:
    """An admitted call, by its route. Raises NotServed, with the cache as it was, where a layer cannot be served."""
    causal = admitted.expanded is None or admitted.expanded.causal
    if admitted.expanded is not None and causal:
        call = {**call, "attention_mask": admitted.expanded.real}  # of which the decoder makes its own
    cache, starts, q_len = admitted.cache, admitted.starts, admitted.q_len
    route = choose_route(state, cache, starts, q_len, admitted.device, admitted.dtype)
    bounds = Bounds(starts, admitted.begin, q_len)
    places = not starts.any() or _places(state, decoder, call)
    static = "" if not bounds.decodes else static_of(state, admitted, route) if places else NOT_PLACES
    if isinstance(static, StaticStep):
        return _by_static_step(state, static, admitted, call)
    known = state.known.look()
    packable = admitted.hidden_alone and causal and places and not admitted.along
    if packable and not admitted.begin and starts.any() and _packs(state, decoder):
        output = _packed_prompt(decoder, cache, bounds, route, call)
        state.known.learn_output(output)
        return output
    settings: dict[str, Any] = {
        "shows_masks": known.hooked or not known.causal,
        "expanded": admitted.expanded,
    }
    own_states = taken_back(decoder) if state.known.may_keep_states else contextlib.nullcontext()
    with own_states, Step(cache, bounds, route, decoder.config, **settings) as step:
        output = original(decoder, "forward")(**call)
    if bounds.decodes:
        state.counts.add_step("eager", static)
    if step.masked:
        state.counts.add("masked")
    if admitted.hidden_alone:
        state.known.learn_output(output)
    return output


def _places(state: PatchState, decoder: Any, call: dict[str, Any]) -> bool:
    """Whether the tokens of a call are at their places in their rows, or where it says."""
    if call.get("position_ids") is not None:
        return True
    look = state.known.look()
    if look.places is None:
        look.places = state.fusing.positions_are_places(decoder)
    return look.places


def _packs(state: PatchState, decoder: Any) -> bool:
    """Whether padding may be left out of a prompt: nothing but causal attention mixes its tokens, nobody looks on."""
    look = state.known.look()
    if (
        look.foreign
        or look.hooked
        or not look.causal
        or "position_ids" not in inspect.signature(type(decoder).forward).parameters
    ):
        return False
    if look.mixes is None:
        look.mixes = state.fusing.mixes(decoder)
    return not look.mixes


def static_of(
    state: PatchState, admitted: Admitted, route: Route, ahead: Found | None = None, greedy: Greedy | None = None
) -> StaticStep | str:
    """The step on static buffers that serves a decode step, or why transformers' layers have to run as they are.

    With what was found of steps that run `ahead` it takes tokens and computes logits, with `greedy` it has a selection
    that takes the next tokens by them.
    """
    if admitted.asks_more:
        return admitted.asks_more
    if admitted.cache.linear_layers and (admitted.starts > admitted.begin).any():
        return "linear attention takes padding out by a mask, which a static step has not"
    if state.known.output_type is None:
        return "its decoder returns more than hidden states"
    return static_step(state, admitted.cache, route, admitted.q_len, ahead, greedy)


def _packed_prompt(
    decoder: Any, cache: PagedCache, bounds: Bounds, route: Route, call: dict[str, Any]
) -> BaseModelOutputWithPast:
    """The first forward of left-padded rows, over their real tokens alone."""
    packing = Packing(bounds.starts, bounds.q_len)
    given = {name: call[name] for name in ("input_ids", "inputs_embeds") if call.get(name) is not None}
    positions = call.get("position_ids")
    if positions is None:
        positions = torch.arange(packing.length, device=next(iter(given.values())).device)[None]
    packed: dict[str, Any] = {name: packing.pack(tensor) for name, tensor in given.items()}
    packed.update(position_ids=_packed_positions(packing, positions), attention_mask=None)
    with Step(cache, bounds, route, decoder.config, packing):
        output = original(decoder, "forward")(**{**call, **packed})
    output.last_hidden_state = packing.unpack(output.last_hidden_state)
    return output


def _packed_positions(packing: Packing, positions: torch.Tensor) -> torch.Tensor:
    """Positions `[..., 1 or rows, length]` as `[..., 1, tokens]`."""
    shape = positions.shape[:-2]
    planes = positions.expand(*shape, len(packing.starts), -1).reshape(-1, len(packing.starts), packing.length)
    return torch.stack([packing.pack(plane) for plane in planes]).view(*shape, 1, -1)


def _by_static_step(state: PatchState, static: StaticStep, admitted: Admitted, call: dict[str, Any]) -> Any:
    """A decode step over static buffers, answered as the decoder answers."""
    assert state.known.output_type is not None
    positions = call.get("position_ids")
    if positions is None:
        end = admitted.begin + admitted.q_len
        positions = torch.arange(admitted.begin, end, device=static.device)[None]
    inputs = tokens_of(call)
    assert inputs is not None
    hidden = run_static(state, static, admitted.cache, inputs, positions, admitted.starts, admitted.along)
    fields: dict[str, Any] = {"last_hidden_state": hidden.clone(), compat.CACHE: admitted.cache}
    return state.known.output_type(**fields)


def run_static(
    state: PatchState,
    step: StaticStep,
    cache: PagedCache,
    inputs: torch.Tensor | None,
    positions: torch.Tensor | None,
    starts: np.ndarray,
    along: dict[str, torch.Tensor] = NOTHING,
) -> torch.Tensor:
    """Runs a static step on tokens `[B, q_len]` or their embeddings, by its graph from the second run of its shape on.

    None are the tokens that it took in its last run; `along` is what else the decoder is given of them.

    `positions` are `[..., 1 or B, q_len]`; None goes on from this step's last run, right after which it must come.
    The first run compiles and loads what a capture may not. The result is overwritten by the next run.
    """
    shape = (
        step.device, step.dtype, cache.rows, step.q_len, step.route.name, step.head is None, cache.page_size,
        inputs is not None and inputs.is_floating_point(),
        None if step.selection is None else step.selection.kind, *along,
    )  # fmt: skip
    why = uncaptured(state, step.device)
    if not why and shape not in state.compiled:
        why = "the first step of its shape compiles kernels"
    elif not why and step.lacks_memory:
        why = "memory ran out when it was to be captured"
    try:
        output = step.run(cache, inputs, positions, starts, None if why else state.graph_memories, along)
    except CaptureError as error:
        why = str(error)
        if error.for_memory:
            step.lacks_memory = True
        else:
            state.known.look().not_captured = why
        state.say(f"CUDA graphs, decode steps run without: {error}")
        output = step.run(cache, inputs, positions, starts, None, along)
    state.compiled.add(shape)
    state.counts.add_step("static" if why else "captured", why)
    return output
