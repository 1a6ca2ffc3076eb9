"""The attention forward that the families share: RoPE and append in one launch, attention straight from the pages."""

from __future__ import annotations

from typing import Any

import torch

from pkv_hf import compat
from pkv_hf.cache.paged import PagedCache
from pkv_hf.replaced import original
from pkv_hf.routes.base import Scores
from pkv_hf.runtime.interface import changes_nothing

OWN_ARGUMENTS = frozenset({"hidden_states", "position_embeddings", "attention_mask", compat.CACHE})


def attention_forward(self: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Takes the place of an attention module's `forward`; prompts, and steps without pages, go to the one before.

    Takes what that does, by name or by place: hidden_states `[B, q_len, hidden]`, position_embeddings cos and sin
    `[1 or B, q_len, D]`, the cache.
    """
    call = compat.call_arguments(self, args, kwargs)
    cache, position_embeddings = call.get(compat.CACHE), call.get("position_embeddings")
    step: Any = cache.step if isinstance(cache, PagedCache) else None
    if step is None or position_embeddings is None or not step.fuses_rope or not _understood(call):
        return original(self, "forward")(**call)
    hidden_states = call["hidden_states"]
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k = self.q_proj(hidden_states).view(shape), self.k_proj(hidden_states).view(shape)
    v = self.v_proj(hidden_states).view(shape)
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    cos, sin = position_embeddings
    out = step.rope_attend(q, k, v, cos, sin, self.layer_idx, Scores(self.scaling))
    return self.o_proj(out.flatten(2)), None


def _understood(call: dict[str, Any]) -> bool:
    """Whether what a call has beyond our own arguments leaves attention as it is."""
    return changes_nothing({name: value for name, value in call.items() if name not in OWN_ARGUMENTS})
