"""A tiny configuration of any class of transformers, that still has each kind of layer which the default one has.

Sizes go by the names of fields (`sizes`); what has to fit something else is put right here, or given (`given`).
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pkv_hf.bench.model_types.given import GIVEN
from pkv_hf.bench.model_types.sizes import LAYERS, SIZES, VOCABULARY

FEWEST_LAYERS, MOST_LAYERS = 4, 8
MOST_KINDS = 5
"""Of a list with a value for each layer: more are no kinds of layers."""

FIRST_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": None}
"""Other special tokens are the vocabulary's last, which prompts leave out. No token ends a row."""

PATCHES_A_SIDE = 4
OTHER_MODALITIES = ("vision", "audio")


def shrink(of_class: type[PreTrainedConfig], given: Mapping[str, Any], decodes: bool = True) -> PreTrainedConfig:
    """A tiny configuration, with the fields that are `given`; a part's are given as its fields, or as a model type.

    Encoders of other modalities are no decoder's: two layers of them do.
    """
    default = {name: value for name, value in vars(of_class()).items() if not name.startswith("_")}
    given = {**GIVEN.get(of_class.model_type, {}), **given}
    parts = {name: value for name, value in default.items() if isinstance(value, PreTrainedConfig)}
    small: dict[str, Any] = {name: SIZES[name] for name, value in default.items() if name in SIZES and _counts(value)}
    _shrink_layers(small, default, decodes)
    _shrink_heads(small, default, decodes)
    small.update(_images(default), **_tokens(default))
    if (
        default.get("is_decoder") is False
        and not default.get("is_encoder_decoder")
        and "attention_types" not in default
    ):
        small["is_decoder"] = True
    if decodes:
        small.update(_rope(of_class, default, {**small, **given}))
    small.update((name, value) for name, value in given.items() if name not in parts)
    names = getattr(of_class, "attribute_map", {})
    small = {names[name] if names.get(name) in default else name: value for name, value in small.items()}
    for name, part in parts.items():
        of_decoder = decodes and not any(word in name for word in OTHER_MODALITIES)
        small[name] = _shrink_part(type(part), given.get(name, {}), of_decoder)
    return of_class(**small)


def _shrink_part(of_class: type[PreTrainedConfig], given: Mapping[str, Any] | str, decodes: bool) -> PreTrainedConfig:
    if isinstance(given, str):
        return shrink(CONFIG_MAPPING[given], {}, decodes)
    return shrink(of_class, given, decodes)


def _counts(value: Any) -> bool:
    """Whether a field's value is a size, or the same size for each layer."""
    if isinstance(value, (list, tuple)):
        return len(set(map(repr, value))) == 1 and isinstance(value[0], int)
    return isinstance(value, int) and not isinstance(value, bool)


def _shrink_layers(small: dict[str, Any], default: Mapping[str, Any], decodes: bool) -> None:
    """Sets how many layers there are, and what lists say of each."""
    numbers = [name for name in LAYERS if isinstance(default.get(name), int)]
    count = default[numbers[0]] if numbers else 0
    lists = {
        name: list(value)
        for name, value in default.items()
        if isinstance(value, (list, tuple))
        and len(value) == count > 2
        and not all(isinstance(each, dict) for each in value)
    }
    kept = _kept_layers(lists.values(), count) if decodes else [0, 1]
    small.update(dict.fromkeys(numbers, len(kept)))
    small.update({name: [values[i] for i in kept] for name, values in lists.items()})


def _kept_layers(lists: Iterable[list[Any]], count: int) -> list[int]:
    """The first layer of each kind that some list tells apart, and the first layers besides, in their order."""
    kept: set[int] = set()
    for values in lists:
        firsts: dict[str, int] = {}
        for i, value in enumerate(values):
            firsts.setdefault(repr(value), i)
        if len(firsts) <= MOST_KINDS:
            kept.update(firsts.values())
    kept = set(sorted(kept)[:MOST_LAYERS])
    others = [i for i in range(count) if i not in kept]
    kept.update(others[: max(FEWEST_LAYERS - len(kept), 0)])
    return sorted(kept)


def _shrink_heads(small: dict[str, Any], default: Mapping[str, Any], decodes: bool) -> None:
    if decodes and default.get("num_key_value_heads", 0) is None:
        small["num_key_value_heads"] = SIZES["num_key_value_heads"]
    if default.get("head_dim", 0) is None:
        small["head_dim"] = SIZES["head_dim"]
    if "kv_lora_rank" in default:  # latent attention: head_dim is that of the rotated part, every head has its own keys
        fitting = {"head_dim": SIZES["qk_rope_head_dim"], "num_key_value_heads": SIZES["num_attention_heads"]}
        small.update((name, value) for name, value in fitting.items() if name in small)


def _images(default: Mapping[str, Any]) -> dict[str, Any]:
    patch = default.get("patch_size", 14)
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    side = PATCHES_A_SIDE * (patch if isinstance(patch, int) else 14)
    small: dict[str, Any] = {
        name: [side, side] if isinstance(default[name], (list, tuple)) else side
        for name in ("image_size", "img_size")
        if name in default
    }
    layers = ("deepstack_visual_indexes", "fullatt_block_indexes", "global_attn_indexes")
    small.update((name, [1]) for name in layers if name in default)
    return small


def _tokens(default: Mapping[str, Any]) -> dict[str, int | None]:
    special = [
        name
        for name, value in default.items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, (int, list))
    ]
    small = {name: FIRST_TOKENS.get(name, VOCABULARY - 1 - i) for i, name in enumerate(special)}
    return {**small, "eos_token_id": None} if "eos_token_id" in default else small


def _rope(of_class: type[PreTrainedConfig], default: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of RoPE over several axes of positions, whose sections have to fill a head; empty for others."""
    if "rope_parameters" not in default:
        return {}
    rope = default["rope_parameters"] or {}
    if not isinstance(rope, dict):
        return {}
    rope = copy.deepcopy(rope)
    parts = [part for part in (rope, *rope.values()) if isinstance(part, dict)]
    if not any(part.get("mrope_section") for part in parts):
        sections = _modeled_sections(of_class)
        if not sections or (rope and not rope.keys() & {"rope_type", "rope_theta"}):
            return {}
        rope = {"rope_type": "default", "rope_theta": 10_000.0, **rope, "mrope_section": sections}
        parts = [rope]
    for part in parts:
        if part.get("mrope_section"):
            share = part.get("partial_rotary_factor", default.get("partial_rotary_factor")) or 1.0
            part["mrope_section"] = _filling(part["mrope_section"], int(small.get("head_dim", 16) * share) // 2)
    return {"rope_parameters": rope}


def _filling(sections: list[int], frequencies: int) -> list[int]:
    """Sections in the same proportions, of so many frequencies together."""
    scaled = [section * frequencies // sum(sections) for section in sections]
    return [scaled[0] + frequencies - sum(scaled), *scaled[1:]]


def _modeled_sections(of_class: type[PreTrainedConfig]) -> list[int]:
    """The sections that a model falls back on where its configuration names none: they are in its code alone."""
    file = sys.modules[of_class.__module__].__file__
    code = Path(str(file).replace("configuration_", "modeling_"))
    found = re.search(r'"mrope_section", [\[(]([\d, ]+)', code.read_text()) if code.exists() else None
    return [int(section) for section in found[1].split(",")] if found else []
