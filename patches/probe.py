"""What a decoder gives its layers: its own forward on a few tokens, with layers that only note their arguments."""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn

from pkv_hf.compat import CACHE, dynamic_rope
from pkv_hf.replaced import original
from pkv_hf.runtime.step import current_step, outside_of_steps

TOKENS = 4
"""More than one, so that what mixes tokens shows."""


MOST_RETURNED = 3
"""Elements of the tuples that layers return, where they return such."""


class Given(NamedTuple):
    """A layer's call."""

    hidden: torch.Tensor
    kwargs: dict[str, Any]


class Probe(NamedTuple):
    """The calls of layers that return their hidden states as they are, in a tuple of so many elements; 0 for none."""

    calls: dict[nn.Module, Given]
    returns: int


probing: ContextVar[Probe | None] = ContextVar("pkv_hf_probing", default=None)


def returned(hidden: torch.Tensor, count: int) -> Any:
    """Hidden states as a layer returns them: first in a tuple of `count` elements, nothing else in it; 0 for none."""
    return (hidden, *(None,) * (count - 1)) if count else hidden


def decoder_layers(decoder: Any) -> list[nn.Module]:
    """The layers of a decoder, which are one list of modules; empty where there is no such list."""
    count = decoder.config.num_hidden_layers
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) >= count]
    return list(lists[0][:count]) if len(lists) == 1 else []


def given_to_layers(decoder: Any, **others: Any) -> dict[nn.Module, Given] | str:
    """The calls of all layers for `TOKENS` tokens without a cache, or why they are not known.

    They are the last that the decoder has positions for: what scales with the position may begin far behind the first.
    `others` are given to the decoder in the place of these positions, and of no mask.
    """
    whys = []
    for returns in range(MOST_RETURNED + 1):
        calls = _given(decoder, returns, others)
        if not isinstance(calls, str):
            return calls
        whys.append(calls)
    return whys[0]


def positions_are_places(decoder: Any) -> bool:
    """Whether a decoder that is given no positions takes every token's place in its row: some count from the first real
    one (OPT)."""
    device = next(decoder.parameters()).device
    mask, places = torch.ones(1, TOKENS, dtype=torch.long, device=device), torch.arange(TOKENS, device=device)[None]
    mask[:, :2] = 0
    seen = []
    for positions in (None, places):
        calls = given_to_layers(decoder, attention_mask=mask, position_ids=positions)
        if isinstance(calls, str):
            return False
        seen.append(_floating(tuple((call.hidden, call.kwargs) for call in calls.values())))
    return len(seen[0]) == len(seen[1]) and all(map(torch.equal, *seen))


def _floating(value: Any) -> list[torch.Tensor]:
    """The floating tensors in a layer's arguments."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return [tensor for each in inner for tensor in _floating(each)]


def _given(decoder: Any, returns: int, others: dict[str, Any]) -> dict[nn.Module, Given] | str:
    device = next(decoder.parameters()).device
    ids = torch.arange(1, TOKENS + 1, device=device)[None]
    positions = torch.arange(TOKENS, device=device)[None] + _far(decoder)
    calls: dict[nn.Module, Given] = {}
    token = probing.set(Probe(calls, returns))
    try:
        with outside_of_steps(), torch.no_grad():
            call = {"position_ids": positions, "attention_mask": None, **others, CACHE: None}
            output = original(decoder, "forward")(input_ids=ids, use_cache=False, **call)
            states = [output[0], *(call.hidden for call in calls.values())]
    except Exception as error:  # of a decoder that layers have to compute for
        return f"{type(decoder).__name__} does not run on tokens alone: {type(error).__name__}: {error}"
    finally:
        probing.reset(token)
    if not calls or any(layer not in calls for layer in decoder_layers(decoder)):
        return "its layers are not called one by one"
    if any(hidden.shape[-3:-1] != ids.shape for hidden in states):
        return "its layers are given a part of what others return"  # of a tensor that was taken for a tuple
    return calls


def _far(decoder: Any) -> int:
    """A late position, from which on all tokens have one; an early one where RoPE itself follows the length."""
    longest: Any = getattr(decoder.config, "max_position_embeddings", None)
    late = type(longest) is int and longest > 2 * TOKENS and not dynamic_rope(decoder)
    return longest - TOKENS if late else TOKENS


def layer_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of a decoder layer's `forward`: by its description in the steps that fuse it."""
    if torch.compiler.is_compiling():
        return original(self, "forward")(*args, **kwargs)
    if (probe := probing.get()) is not None:
        hidden, given = _by_name(self, args, kwargs)
        probe.calls[self] = Given(hidden, given)
        return returned(hidden, probe.returns)
    step: Any = current_step()
    fused = None if step is None else step.fusion.layers.get(self)
    if fused is None:
        return original(self, "forward")(*args, **kwargs)
    return fused(step, *_by_name(self, args, kwargs))


def _by_name(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The hidden states that a layer is called with, its first argument, and the others by their names."""
    if len(args) != 1:
        bound = inspect.signature(type(layer).forward).bind_partial(layer, *args, **kwargs)
        args, kwargs = (), {**bound.arguments, **bound.arguments.get("kwargs", {})}
        for name in ("self", "kwargs"):
            kwargs.pop(name, None)
        args = (kwargs.pop(next(iter(kwargs))),)
    return args[0], kwargs
