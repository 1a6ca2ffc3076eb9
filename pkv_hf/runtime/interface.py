"""Our two functions in transformers' registries: what layers ask of attention, and what of that pages serve.

The mask function answers a step with an empty mask, which says which window it stands for. A layer that brings such a
mask and the very keys and values that its cache update returned has gone through transformers' interface; what else it
brings has to be understood too. Any other layer ends the step (`LayerNotServed`), and the call runs without pages.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pkv_hf import compat, configurations
from pkv_hf.configurations import serving
from pkv_hf.errors import LayerNotServed, NotServed
from pkv_hf.replaced import STATE
from pkv_hf.routes.base import Scores
from pkv_hf.runtime.evidence import LayerShape
from pkv_hf.runtime.state import PatchState
from pkv_hf.runtime.step import ShownMask, Step, current_step, handle_of

HARMLESS = frozenset(
    {
        "position_ids",
        "cache_position",
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "logits_to_keep",
        "tokenizer",  # for stop_strings: transformers 5 passes it on to the layers
    }
)
"""Keyword arguments that reach attention functions and do not change what attention is."""


class Asked(NamedTuple):
    """What a layer asked of attention, outside of any step."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    arguments: dict[str, Any]


class Listener:
    """Stands where a step does (`configurations.serving`) while a layer runs by itself: notes what it asks."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.asked: list[Asked] = []


def mask(*args: Any, config: Any, **kwargs: Any) -> torch.Tensor | None:
    """Our mask function, of a decoder that is served on pages: empty for causal masks, transformers' own for others.

    Where hooks look on, causal masks are transformers' own too, and the step remembers them.
    """
    step = current_step()
    causal = step is not None and compat.plainly_causal(kwargs)
    seen = compat.mask_window(kwargs), compat.mask_chunked(kwargs)
    if step is not None and causal and not step.shows_masks:
        return torch.empty((1 + seen[1], 1 + seen[0], 0, 0), dtype=torch.bool, device="cpu")
    made = compat.mask_function(configurations.configured_implementation(config))(*args, config=config, **kwargs)
    if step is not None and causal:
        step.masks.append(ShownMask(made, *seen))
    return made


def seen_by(attention_mask: torch.Tensor | None) -> tuple[int, bool] | None:
    """The window that an empty mask stands for (0: full attention), and whether it counts the tokens of chunks.

    None for a mask that `mask` did not make empty.
    """
    if attention_mask is None or attention_mask.ndim != 4 or attention_mask.shape[2:] != (0, 0):
        return None
    return attention_mask.shape[1] - 1, attention_mask.shape[0] == 2


def _seen_by(step: Step, attention_mask: torch.Tensor | None) -> dict[int, bool]:
    """The windows that a mask of a step can stand for, and whether they count the tokens of chunks."""
    seen = seen_by(attention_mask)
    if seen is not None:
        return dict([seen])
    return {shown.window: shown.chunked for shown in step.masks if shown.is_given(attention_mask)}


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Our attention function: pages for what a step appended, transformers' own for any other keys.

    query is `[B, H_q, q_len, D]`, key and value `[B, H_kv, S, D]`; returns `[B, q_len, H_q, D]` and the weights if any.
    Arguments have the places that transformers' sdpa and flash attention give them.

    Raises LayerNotServed, for `decoder_forward`, where a step's layer asks for what pages do not give.
    """
    arguments = {**kwargs, "dropout": dropout, "scaling": scaling}
    if softcap is not None:  # an argument that not all of transformers' functions name
        arguments["softcap"] = softcap
    handle = handle_of(key)
    if handle is None and seen_by(attention_mask) is None:
        if isinstance(listener := serving.get(), Listener):
            listener.asked.append(Asked(query, key, value, arguments))
        return _transformers_own(module)(module, query, key, value, attention_mask, **arguments)
    name = type(module).__name__
    if handle is None or handle_of(value) is not handle:
        raise LayerNotServed(f"{name} attends to other keys and values than its cache update returned")
    step, layer_idx = handle
    windows, held = _seen_by(step, attention_mask), step.cache.layers[layer_idx].table.window
    if not windows and (step.causal or step.bounds.decodes):
        raise LayerNotServed(f"{name} has a mask that is more than causal")
    by_transformers = not windows or not (step.explicit or step.bounds.q_len == 1 or _is_causal(module, arguments))
    if by_transformers and (step.bounds.decodes or seen_by(attention_mask) is not None):
        raise NotServed(f"{name} is not causal, in a step of several queries")
    if windows and held not in windows:
        raise LayerNotServed(
            f"{name} attends to a window of {min(windows) or 'all'} tokens, the cache holds {held or 'all'}"
        )
    if not _fits(query, key, value, step.attended(layer_idx)):
        raise LayerNotServed(
            f"{name} has queries {list(query.shape)} for keys {list(key.shape)} and values {list(value.shape)}"
        )
    _check_asked(module, held, query.shape[1], arguments)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    scores = Scores(scale, softcap or 0.0, kwargs.get("s_aux"), windows.get(held, False))
    heads = query.shape[1] // key.shape[1], key.shape[1], query.shape[3], value.shape[3]
    _learn(module, step, layer_idx, LayerShape(*heads, scores.softcap, scores.sinks is not None, scores.chunked))
    if by_transformers:
        key, value = step.dense(key, value, layer_idx)
        return _transformers_own(module)(module, query, key, value, attention_mask, **arguments)
    return step.attend(query, key, value, layer_idx, scores).contiguous(), None


def _transformers_own(module: Any) -> Any:
    """The attention function that a module's user has chosen."""
    return compat.attention_function(configurations.configured_implementation(module.config), module)


def _fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shared: bool) -> bool:
    """Whether queries are of the same tokens as the keys, in whole groups of heads.

    Those of a layer that shares the keys of another may be of the last tokens alone: no layer keeps anything of them.
    """
    rows, heads, q_len, head_dim = query.shape
    tokens = key.shape[2] if shared and q_len < key.shape[2] else q_len
    alike = key.shape == (rows, key.shape[1], tokens, head_dim) and value.shape[:3] == key.shape[:3]
    return alike and heads % key.shape[1] == 0


def _is_causal(module: Any, asked: dict[str, Any]) -> bool:
    """Whether a layer attends causally where no mask says so."""
    return bool(getattr(module, "is_causal", True) if asked.get("is_causal") is None else asked["is_causal"])


def _check_asked(module: Any, window: int, heads: int, asked: dict[str, Any]) -> None:
    """Raises LayerNotServed for an argument that may change the result in a way that pages do not know."""
    for name, value in asked.items():
        if name == "s_aux" and value is not None and _are_sinks(module, heads, value) and not asked.get("softcap"):
            continue
        if value is not None and name not in HARMLESS and not _understood(module, window, name, value):
            shown = value if isinstance(value, (bool, int, float, str)) else f"a {type(value).__name__}"
            raise LayerNotServed(f"{type(module).__name__} asks attention for {name}={shown}")


def _are_sinks(module: Any, heads: int, value: Any) -> bool:
    """Whether a value is one score for each query head that transformers would add to its softmax."""
    if not isinstance(value, torch.Tensor) or value.shape != (heads,):
        return False
    return compat.adds_sinks(configurations.configured_implementation(module.config), module, value)


def _understood(module: Any, window: int, name: str, value: Any) -> bool:
    """Whether pages give what a layer over `window` tokens asks of attention by an argument."""
    if name == "scaling":
        return isinstance(value, (int, float))
    if name == "softcap":  # where transformers does not cap scores, what it does instead is left to it
        implementation = configurations.configured_implementation(module.config)
        return isinstance(value, (int, float)) and value > 0 and compat.caps_scores(implementation, module)
    if name == "sliding_window":
        return not value or value == window
    if name == "dropout":
        return not value
    return name == "is_causal" and bool(value)


def _learn(module: Any, step: Step, layer_idx: int, shape: LayerShape) -> None:
    """Notes the shape of a generic model's layer, on which the routes of later steps depend."""
    state: PatchState = getattr(module, STATE)
    if state.known.learn(layer_idx, shape) and step.bounds.decodes and step.route.fuses_rope:  # chosen without it
        raise NotServed(f"{type(module).__name__} asks attention for something else than before")
