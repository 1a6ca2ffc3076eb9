"""What is known of a model, and by what evidence: the one place that the gate and all that follows it ask.

Some of it is read from the modules when the model is patched (`served_layers`), some seen in its forwards
(`Evidence.learn`). What rests on code, settings or hooks is looked at again whenever one of them has changed
(`Evidence.look`): fused steps, packed and shared prompts, static steps and the run-ahead loop ask for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import transformers
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.utils import ModelOutput

from pkv_hf import compat, configurations, origins
from pkv_hf.cache.paged import PagedCache
from pkv_hf.errors import UnsupportedModelError
from pkv_hf.runtime.ahead.found import Found
from pkv_hf.runtime.captured.watch import Watch


class LayerShape(NamedTuple):
    """What the kernels of an attention layer depend on."""

    group: int
    """Query heads a KV head."""
    kv_heads: int
    head_dim: int
    value_head_dim: int
    softcap: float = 0.0
    sinks: bool = False
    chunked: bool = False
    """These as in `routes.base.Scores`."""


@dataclass
class Look:
    """What a model's modules showed when they were last looked at: it holds until one of them changes.

    Reasons are empty where there is none.
    """

    watch: Watch
    """The modules as they were. It holds addresses of one process."""
    foreign: str
    """Which module's code is of no known library."""
    loop: str
    """Why the run-ahead loop does not know the causal LM's forward and generation."""
    not_static: str
    """Why decode steps do not run on static buffers."""
    causal: bool
    """Whether all attention modules attend causally where they get no mask."""
    refused: str = ""
    """Why no call can be served, as the layers turned out."""
    not_captured: str = ""
    """Why no step is captured in a CUDA graph, by a capture that failed."""
    fusions: dict[str, Any] = field(default_factory=dict)
    """Which layers are fused in the steps of a route, by its name."""
    mixes: str | None = None
    """What may mix the tokens of a prompt beside attention, empty for nothing; None until that was asked."""
    places: bool | None = None
    """Whether the decoder, given no positions, takes every token's place in its row; None until that was asked."""
    ahead: dict[frozenset[str], Found] = field(default_factory=dict)
    """What steps that run ahead have to do, or why they do not, by the arguments that the decoder is given."""
    not_ahead: str = ""
    """Why the last call's steps did not run ahead, by what the model was found to do."""
    token: object = field(default_factory=object)
    """Of this look alone, for those that may not hold the modules."""

    @property
    def hooked(self) -> bool:
        """Whether anybody's hooks look on, to which every row and its place in the batch may matter."""
        return self.watch.hooked

    @property
    def shares_prompts(self) -> bool:
        """Whether equal rows may go through the model as one: nobody's code sees which row is which."""
        return not (self.foreign or self.hooked)


@dataclass
class Evidence:
    """What is known of one patched model."""

    kinds: tuple[compat.LayerKind, ...]
    """What each layer keeps, as the layers were made with."""
    model: Any
    """The causal LM."""
    decoder: Any
    attentions: list[Any]
    """The decoder's attention modules."""
    shapes: dict[int, LayerShape] = field(default_factory=dict)
    """Of the attention layers that forwards have shown, by layer."""
    output_type: type[ModelOutput] | None = None
    """What the decoder returns where it has no more to say than hidden states; None until that is known."""
    own_states: bool | None = None
    """Whether layers keep linear-attention states in modules instead of in the cache; None until a forward shows it."""
    served: set[bool] = field(default_factory=set)
    """Whether a prompt (False) and a later step (True) have been served."""
    last: Look | None = None
    _by_shape: dict[LayerShape, list[int]] | None = None
    _implementation: tuple[dict[str, Any], str] | None = None
    """What computed attention when that was last looked at, and why it is not known."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "last": None, "_implementation": None}

    @property
    def may_keep_states(self) -> bool:
        """Whether modules may keep linear-attention states, which no cache copies for more rows or takes back."""
        return self.own_states is not False and any(kind.states for kind in self.kinds)

    @property
    def paged_layers(self) -> int:
        """How many layers keep K and V."""
        return sum(kind.window is not None for kind in self.kinds)

    @property
    def by_shape(self) -> dict[LayerShape, list[int]]:
        """The layers of each shape."""
        known = self._by_shape
        if known is None:
            known = {}
            for layer_idx, shape in list(self.shapes.items()):  # which another thread's first forward may be filling
                known.setdefault(shape, []).append(layer_idx)
            self._by_shape = known
        return known

    def learn(self, layer_idx: int, shape: LayerShape) -> bool:
        """Notes the shape of a layer that asked for attention. Returns whether that is one that no other has."""
        if self.shapes.get(layer_idx) == shape:
            return False
        known = set(self.shapes.values())
        self.shapes[layer_idx], self._by_shape = shape, None
        return set(self.shapes.values()) != known

    def learn_states(self, cache: PagedCache) -> None:
        """Notes where linear-attention states are that a forward has left."""
        self.own_states = bool(cache.linear_layers) and not cache.holds_states

    def learn_output(self, output: Any) -> None:
        """Notes what the decoder returned when it was asked for hidden states alone."""
        plain = isinstance(output, ModelOutput) and set(output) <= {"last_hidden_state", compat.CACHE}
        self.output_type = type(output) if plain else None

    def look(self) -> Look:
        """What is known of the code and the settings that a call would run by now."""
        last = self.last
        if last is None or not last.watch.unchanged():
            last = self.last = self._new_look()
        return last

    def _new_look(self) -> Look:
        watch = Watch(self.model, self.decoder.config)
        foreign = origins.foreign(watch.modules)
        static = compat.not_captured(self.decoder)
        loop = "" if self.decoder is self.model else origins.unfamiliar_loop(self.model)
        not_static = foreign or static or watch.reason or compat.dynamic_rope(self.decoder) or drops_out(self.decoder)
        causal = all(getattr(module, "is_causal", True) for module in self.attentions)
        return Look(watch, foreign, loop, not_static, causal)

    def unfamiliar_implementation(self) -> str:
        """Why pages cannot stand for the attention function that the model's user has chosen; empty where they can."""
        name = configurations.configured_implementation(self.decoder.config)
        functions, last = compat.implementation_functions(name, self.attentions[0]), self._implementation
        if last is None or last[0] != functions:
            last = self._implementation = functions, compat.unfamiliar_implementation(name, functions)
        return last[1]

    @property
    def not_captured(self) -> str:
        """Why no step is captured, as the last capture ended; empty where steps may be."""
        return self.last.not_captured if self.last is not None else ""

    @property
    def refused(self) -> str:
        """Why no call can be served; empty where calls can."""
        return self.look().refused if self.last is not None and self.last.refused else ""


def drops_out(decoder: Any) -> str:
    """What of a decoder's layers, in training mode, is left out or forgotten by chance or to save memory."""
    for module in decoder.modules():
        if not module.training:
            continue
        rates = (getattr(module, name, 0) for name in ("attention_dropout", "layerdrop"))
        dropout = module.p if isinstance(module, _DropoutNd) else 0
        if dropout or any(isinstance(rate, float) and rate > 0 for rate in rates):
            return f"a {type(module).__name__} drops out in training mode"
        if getattr(module, "gradient_checkpointing", False) is True:
            return "layers in training mode are checkpointed, for which transformers gives their cache up"
    return ""


class ServedLayers(NamedTuple):
    """What `patch` replaces in a model."""

    decoder: Any
    attentions: list[Any]


def served_layers(model: nn.Module) -> ServedLayers:
    """The decoder and its attention modules.

    Raises UnsupportedModelError with the reason for what cannot be served.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"patch() got a {type(model).__name__}, not a transformers model")
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder: pages serve decoder-only models")
    decoder: Any = compat.decoder_of(model)
    if not isinstance(decoder, PreTrainedModel):
        raise UnsupportedModelError(f"{name} has no decoder of transformers': its get_decoder() returned {decoder!r}")
    attentions = compat.attention_modules(decoder)
    if reason := _not_served(model, decoder, attentions):
        raise UnsupportedModelError(f"no layer of {name} was patched: {reason}")
    return ServedLayers(decoder, attentions)


def _causal(attention: Any) -> bool:
    return getattr(attention, "is_causal", False) is True


def _not_served(model: Any, decoder: Any, attentions: list[Any]) -> str:
    """Why a model without an encoder cannot be served, empty where it may be."""
    try:
        compat.layer_kinds(decoder.config)
    except ValueError as error:
        return str(error)
    if not compat.takes_cache(decoder):
        return (
            f"the forward of its {type(decoder).__name__} takes no {compat.CACHE!r}, which is what transformers "
            f"{transformers.__version__} passes caches as"
        )
    if compat.changes_layers(decoder):
        return (
            f"the forward of its {type(decoder).__name__} changes the layers of its cache: a PagedCache has the "
            "configuration's"
        )
    if not attentions:
        return f"no module of its {type(decoder).__name__} goes through transformers' attention interface"
    name = configurations.configured_implementation(decoder.config)
    if reason := compat.unfamiliar_implementation(name, compat.implementation_functions(name, attentions[0])):
        return f"{reason}: model.set_attn_implementation('sdpa') before patch"
    if decoder is model:
        if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not all(_causal(module) for module in attentions):
            return "it is not the decoder of a causal LM"
    elif not model.can_generate() or not model._supports_default_dynamic_cache():
        return "it is not a causal LM that generates with a DynamicCache around a decoder"
    for module in attentions:
        if getattr(module, "kv_lora_rank", None):
            return f"{type(module).__name__} is latent attention (MLA): pages hold the keys and values of heads"
    return ""
