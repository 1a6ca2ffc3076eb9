"""What a causal LM makes of its decoder's last hidden states: found by its own forward, over a decoder that answers by
itself and does not run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pkv_hf.runtime.fusion import Product, call

MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Settings that logits are multiplied by (Cohere, Falcon-H1)."""

DIVISORS = ("logits_scaling",)
"""Settings that logits are divided by (Granite)."""

CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Settings c of logits that become `c tanh(logits / c)` (Gemma 2, RecurrentGemma)."""

SMALL, LARGE = 1.0, 500.0
"""The largest logits of two trials: a cap, of some tens, leaves the first as they are, and shows in the others."""


@dataclass(frozen=True)
class Logits:
    """`cap * tanh(scale * module(hidden) / cap)`, without the tanh where there is no cap."""

    of: weakref.ref[nn.Module]
    """The output embeddings. Steps keep this, and caches keep steps for longer than models live."""
    scale: float = 1.0
    cap: float | None = None
    vocabulary: int = 0
    """How many logits a token has."""

    @property
    def module(self) -> nn.Module:
        module = self.of()
        assert module is not None  # the model's forward runs
        return module

    def __call__(self, hidden: torch.Tensor, product: Product = call) -> torch.Tensor:
        """Logits `[B, q_len, vocabulary]` of hidden states `[B, q_len, hidden]`, which `product` multiplies."""
        return self.of_products(product(self.module, hidden))

    def of_products(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of any shape, of what the output embeddings gave: scaled and capped, each rounded as the models do."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


@dataclass(frozen=True)
class Stub:
    """What stands for a decoder in this thread, for the length of one forward of its model."""

    decoder: nn.Module
    answer: Callable[[dict[str, Any]], Any]
    """What the decoder returns, by the arguments of its call."""


stub: ContextVar[Stub | None] = ContextVar("pkv_hf_stub", default=None)


@contextmanager
def _standing_for(decoder: nn.Module, answer: Callable[[dict[str, Any]], Any]) -> Iterator[None]:
    token = stub.set(Stub(decoder, answer))
    try:
        yield
    finally:
        stub.reset(token)


def answered(
    model: Any, decoder: nn.Module, inputs: dict[str, Any], answer: Callable[[dict[str, Any]], Any]
) -> tuple[dict[str, Any] | None, Any]:
    """What a model's forward gives its decoder, and what it returns where the decoder answers so, and runs nothing.

    The first is None where the forward comes to the decoder not once, or more than once.
    """
    calls: list[dict[str, Any]] = []

    def noted(call: dict[str, Any]) -> Any:
        calls.append(call)
        return answer(call)

    with _standing_for(decoder, noted):
        output = model(**inputs, return_dict=True)
    return (calls[0] if len(calls) == 1 else None), output


def find(
    model: Any, decoder: nn.Module, run: Callable[[torch.Tensor], torch.Tensor], rows: int
) -> tuple[Logits | None, str]:
    """What a model's logits are of its decoder's hidden states, or why that is not known.

    `run` gives the model's own logits `[rows, 1, vocabulary]` of hidden states `[rows, 1, hidden]`.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        return None, f"{type(model).__name__} has no output embeddings"
    draw = torch.Generator().manual_seed(0)  # one of our own: the caller's is left where it was
    known = list(_candidates(model, head))
    for largest in (SMALL, LARGE):
        hidden = torch.randn((rows, 1, hidden_size(model, decoder)), generator=draw)
        hidden = hidden.to(next(decoder.parameters()))
        hidden = hidden * (largest / head(hidden).abs().max().clamp(min=1e-6))
        products, theirs = head(hidden), run(hidden)
        known = [each for each in known if _same(each.of_products(products), theirs)]
    if not known:
        return None, f"logits of {type(model).__name__} are not its output embeddings', scaled and capped by a setting"
    return replace(known[0], vocabulary=theirs.shape[-1]), ""


def hidden_size(model: Any, decoder: Any) -> int:
    """The width of the hidden states that a decoder returns."""
    size: int = getattr(model.get_output_embeddings(), "in_features", decoder.config.hidden_size)
    return size


def _candidates(model: Any, head: nn.Module) -> Iterator[Logits]:
    """What logits can be by the model's settings, the simplest first."""
    text = model.config.get_text_config(decoder=True)
    of = weakref.ref(head)
    multipliers, divisors = (_settings(names, model.config, text) for names in (MULTIPLIERS, DIVISORS))
    for cap in (None, *_settings(CAPS, model.config, text)):
        for scale in (1.0, *multipliers, *(1 / divisor for divisor in divisors)):
            yield Logits(of, scale, cap)


def _settings(names: tuple[str, ...], *configurations: Any) -> list[float]:
    found = [getattr(config, name, None) for config in configurations for name in names]
    return list(dict.fromkeys(float(value) for value in found if isinstance(value, (int, float)) and value))


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether logits are equal but for the last place of their dtype, which is as often too high as too low."""
    if ours.shape != theirs.shape:
        return False
    eps, of_scale = torch.finfo(ours.dtype).eps, torch.finfo(torch.float32).eps  # which a scale is rounded to
    found, expected = ours.double(), theirs.double()
    if not torch.allclose(found, expected, rtol=2 * eps, atol=eps * 1e-3 * float(expected.abs().max())):
        return False
    return abs(float((found * expected).sum() / (expected * expected).sum()) - 1) < eps / 16 + of_scale
