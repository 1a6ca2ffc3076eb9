"""What is known of a model, and by what evidence: the one place that the gate and all that follows it ask.

Some of it is read from the modules when the model is patched (`served_layers`), some seen in its first forward
(`Evidence.learn`), some looked at again before every step that rests on it (`Evidence.not_static`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from pkv_hf import compat
from pkv_hf.errors import UnsupportedModelError
from pkv_hf.runtime.watch import Watch, hooked

ORIGINAL = "pkv_hf_original"
"""The attribute of a patched decoder's own configuration that holds the one it was made from."""


class LayerShape(NamedTuple):
    """What the kernels of an attention layer depend on."""

    group: int
    """Query heads a KV head."""
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float
    """Scores are `softcap * tanh(scores / softcap)`; 0 for scores as they are."""


@dataclass
class Evidence:
    """What is known of one patched model."""

    prefix: str
    """What the names of the family's classes begin with; empty for a model of no known family."""
    windows: tuple[int, ...]
    """The sliding window of each attention layer in tokens, 0 for full attention, as the layers were made with."""
    shapes: set[LayerShape]
    """Of the attention layers; those of a generic model are seen in its first forward."""
    output_type: type[ModelOutput] | None
    """What the decoder returns where it has no more to say than hidden states; None until that is known."""
    refused: str = ""
    """Why no call can be served, as the model's layers turned out; empty where calls can."""
    watch: Watch | None = None
    """The modules as they were when they were last looked at. It holds addresses of one process."""
    _not_static: str = ""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "watch": None}

    @property
    def generic(self) -> bool:
        """Of no known family: all that is known of the layers is what they ask of attention."""
        return not self.prefix

    @property
    def torch_alone(self) -> str:
        """Why the layers are left to torch on any device, empty where kernels may serve them."""
        if len(self.shapes) > 1:
            return "layers differ in their heads, head_dim or scale"
        return "attention scores are capped" if any(shape.softcap for shape in self.shapes) else ""

    def learn(self, shape: LayerShape) -> bool:
        """Notes the shape of a layer that asked for attention. Returns whether a generic model has a new one."""
        if not self.generic or shape in self.shapes:
            return False
        self.shapes.add(shape)
        return True

    def learn_output(self, output: Any) -> None:
        """Notes what a generic decoder returned when it was asked for hidden states alone."""
        if self.generic:
            plain = isinstance(output, ModelOutput) and set(output) <= {"last_hidden_state", compat.CACHE}
            self.output_type = type(output) if plain else None

    def packs(self, decoder: Any) -> bool:
        """Whether padding may be left out of a prompt: nothing but attention mixes its tokens, nobody looks on."""
        return not self.generic and not hooked(decoder) and not compat.unfamiliar(decoder, self.prefix)

    def loops_as_known(self, model: Any) -> bool:
        """Whether a causal LM's generation is transformers' own, whose loop ours may take the place of.

        The loop runs the decoder and the output embeddings: what else a model does with logits only its class says. A
        checkpoint may bring a generate() of its own.
        """
        return not self.generic and compat.known_loop(model, self.prefix) and "generate" not in vars(model)

    def not_static(self, model: nn.Module, decoder: Any) -> str:
        """Why decode steps do not run on static buffers, by the modules as they are now; empty where they do.

        `watch` is another object after this wherever a module has changed: what was captured before is void then.
        """
        if self.watch is None or not self.watch.unchanged():
            self.watch = Watch([model])
            unknown = compat.not_captured(decoder) if self.generic else compat.unfamiliar(decoder, self.prefix)
            self._not_static = self.watch.reason or compat.dynamic_rope(decoder) or unknown
        return self._not_static


def shares_prompts(model: nn.Module) -> bool:
    """Whether equal rows may go through the model as one: nobody's hook sees which row is which."""
    return not hooked(model)


class ServedLayers(NamedTuple):
    """What `patch` replaces in a model."""

    decoder: Any
    prefix: str
    """That of the family's class names; empty for a model whose own layers run."""
    attentions: list[Any]


def served_layers(model: nn.Module, prefixes: dict[str, str]) -> ServedLayers:
    """The decoder and its attention modules; `prefixes` are those of the known families, by model_type.

    Raises UnsupportedModelError with the reason for what cannot be served.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"patch() got a {type(model).__name__}, not a transformers model")
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder: pages serve decoder-only models")
    decoder: Any = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):
        raise UnsupportedModelError(f"{name} has no decoder of transformers': its get_decoder() returned {decoder!r}")
    attentions = compat.attention_modules(decoder)
    prefix = prefixes.get(decoder.config.model_type, "")
    if prefix and {type(module) for module in attentions} != {compat.own_class(decoder, prefix, "Attention")}:
        prefix = ""
    if reason := _not_served(model, decoder, prefix, attentions):
        raise UnsupportedModelError(f"no layer of {name} was patched: {reason}")
    return ServedLayers(decoder, prefix, attentions)


def _not_served(model: Any, decoder: Any, prefix: str, attentions: list[Any]) -> str:
    """Why a model without an encoder cannot be served, empty where it may be."""
    try:
        windows = compat.layer_windows(decoder.config)
    except ValueError as error:
        return str(error)
    if not compat.takes_cache(decoder):
        return (
            f"the forward of its {type(decoder).__name__} takes no {compat.CACHE!r}, which is what transformers "
            f"{transformers.__version__} passes caches as"
        )
    if not attentions:
        return f"no module of its {type(decoder).__name__} goes through transformers' attention interface"
    if prefix:
        return ""
    if getattr(decoder.config, ORIGINAL, decoder.config) is not model.config:
        return f"it is more than its {type(decoder).__name__}, whose configuration is a part of its own"
    if decoder is model or not model.can_generate() or not model._supports_default_dynamic_cache():
        return "it is not a causal LM that generates with a DynamicCache around a decoder"
    if len(attentions) != len(windows):
        return f"{len(attentions)} modules go through transformers' attention interface, for {len(windows)} layers"
    for module in attentions:
        if getattr(module, "kv_lora_rank", None):
            return f"{type(module).__name__} is latent attention (MLA): pages hold keys and values of one head_dim"
        dim = getattr(module, "qk_head_dim", getattr(module, "head_dim", None))
        if dim != getattr(module, "v_head_dim", dim):
            return f"its keys have {dim} dimensions and its values {module.v_head_dim}: pages hold one head_dim"
    return ""
