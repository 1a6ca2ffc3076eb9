"""How far an engine's logits are from those of exact arithmetic: what "other tokens" is worth in half precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from pkv_hf import compat

CHUNK = 2048
MOST_TOKENS = 1 << 16
"""Longer prompts, all rows together, are not judged: a forward in float32 over them takes minutes."""


def first_step(
    model: Any, inputs: dict[str, torch.Tensor], new_tokens: int, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a greedy `generate()` of `new_tokens` (2 or more) does at its first decode step.

    Returns the tokens that it stands behind, `[B, length + 1]`, and its logits `[B, vocabulary]`.
    """
    length = inputs["input_ids"].shape[1]
    output = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    return output.sequences[:, : length + 1], output.logits[1]


def can_be_judged(model: nn.Module, attention_mask: torch.Tensor) -> bool:
    """Whether `expected` has an answer: of weights that are not quantised, for `MOST_TOKENS` at most.

    torchao's tensors give the dtype of what they stand for.
    """
    plain = (p.is_floating_point() and not hasattr(p, "__tensor_flatten__") for p in model.parameters())
    return int(attention_mask.sum()) <= MOST_TOKENS and all(plain)


@torch.no_grad()
def expected(model: Any, tokens: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Logits `[B, vocabulary]` after `tokens` in the next wider arithmetic: float32, of a float32 model float64.

    By forwards of an unpatched model, row by row and in chunks: torch has no attention in float32 that takes grouped
    heads without a matrix of weights. `attention_mask` is that of the prompt, padded on the left.
    """
    found = []
    with _wider(model, torch.float64 if model.dtype == torch.float32 else torch.float32):
        for row, length in zip(tokens, attention_mask.sum(-1).tolist()):
            cache = DynamicCache(config=model.config)
            for chunk in row[None, len(row) - length - 1 :].split(CHUNK, dim=1):
                logits = model(chunk, **{compat.CACHE: cache}, use_cache=True, logits_to_keep=1).logits
            found.append(logits[0, -1])
    return torch.stack(found)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The root mean square of the difference, over that of the exact logits."""
    wide = exact.double()
    return float((found.to(wide) - wide).norm() / wide.norm())


@contextlib.contextmanager
def _wider(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, a module's weights are of another dtype while it runs, and narrow again after it."""
    kept: dict[nn.Module, dict[str, torch.Tensor]] = {}

    def widen(module: nn.Module, _: Any) -> None:
        kept[module] = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)

    def narrow(module: nn.Module, *_: Any) -> None:
        for name, data in kept.pop(module).items():
            getattr(module, name).data = data

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                stack.callback(module.register_forward_pre_hook(widen).remove)
                stack.callback(module.register_forward_hook(narrow, always_call=True).remove)
        yield
