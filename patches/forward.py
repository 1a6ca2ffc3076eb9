"""The attention forward that the families share: RoPE and append in one launch, attention straight from the pages."""

from __future__ import annotations

from typing import Any

import torch

from pkv_hf.cache import PagedCache
from pkv_hf.interface import changes_nothing
from pkv_hf.state import original_forward


def attention_forward(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Takes the place of an attention module's `forward`; prompts, and steps without pages, go to the one before.

    hidden_states is `[B, q_len, hidden]`, position_embeddings cos and sin `[1 or B, q_len, D]`.
    """
    step = past_key_values.step if isinstance(past_key_values, PagedCache) else None
    if step is None or position_embeddings is None or not step.fuses_rope or not changes_nothing(kwargs):
        return original_forward(self)(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k = self.q_proj(hidden_states).view(shape), self.k_proj(hidden_states).view(shape)
    v = self.v_proj(hidden_states).view(shape)
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = step.rope_attend(q, k, v, *position_embeddings, self.layer_idx, self.scaling)
    return self.o_proj(out.flatten(2)), None
