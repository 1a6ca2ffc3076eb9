"""A prefix that many continuations share: prefilled once, handed to any number of generate() calls."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from pkv_hf import compat
from pkv_hf.arguments import token_ids, whole
from pkv_hf.cache.paged import PagedCache
from pkv_hf.cache.shifting import shifted
from pkv_hf.compat import unwrap
from pkv_hf.errors import UnsupportedModelError
from pkv_hf.replaced import STATE
from pkv_hf.runtime.state import PatchState
from pkv_hf.runtime.step import taken_back


class Prefix:
    """Tokens and their pages, as `prefix` makes them; all that `cache` and `inputs` return shares those pages.

    A continuation copies the last page, where the prefix does not fill it, and no other; what continuations of unequal
    length copy beside, `inputs` says. All caches of a prefix are on one pool, so only one of them may be used at a time
    (threads need a prefix each).
    """

    def __init__(self, ids: torch.Tensor, cache: PagedCache, tokenizer: Any, vocabulary: int, padding: int) -> None:
        self.ids = ids
        """The tokens, int64 `[1, length]`, on the model's device."""
        self.tokenizer = tokenizer
        self._cache = cache
        self._vocabulary = vocabulary
        self._padding = padding

    def __len__(self) -> int:
        return self.ids.shape[1]

    def cache(self, rows: int = 1) -> PagedCache:
        """A cache of `rows` rows, 1 or more, that hold the prefix each, for `generate()` and forwards."""
        rows = whole("rows", rows, 1, "pass the number of continuations")
        return shifted(self._cache, np.zeros(rows, dtype=np.int64))

    def inputs(self, continuations: str | list[str] | Sequence[int] | torch.Tensor | Mapping) -> dict[str, Any]:
        """What `model.generate(**prefix.inputs(...))` takes to go on from the prefix, in one way or in several.

        Continuations of unequal length come as a left-padded batch. The cache is as long as the prefix, so a row that
        is `n` tokens shorter than the longest runs the prefix's last `n` tokens again, or all where there are no more.
        It shares the prefix's pages where `n` is a whole number of them. All whose `n` leaves the same rest share one
        copy: there are fewer copies than a page has tokens.

        Args:
            continuations: a text or a list of texts, tokenised without special tokens; or token ids, `[length]` or
                `[rows, length]`, or a list of rows, or what a tokenizer returns that holds them.

        Returns:
            `input_ids` and `attention_mask`, int64 `[rows, length]`, of padding, prefix and continuation, and the
            cache, by the name that the installed transformers gives it. Padding is the model's `pad_token_id`, or else
            0; under the mask its value does not matter.

        Raises:
            ValueError: texts without a tokenizer, a continuation without a token or with padding, what are no token
                ids of the model, or continuations of unequal length for a model with linear-attention states.
            PoolAllocationError: the copies do not fit.
        """
        settings = {"add_special_tokens": False}
        rows = _tokens("continuations", continuations, self._vocabulary, self.tokenizer, **settings)
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        pads = lengths.max() - lengths
        if pads.any() and self._cache.linear_layers:
            raise ValueError(
                f"continuations are of {lengths.min()} to {lengths.max()} tokens, and the model's linear-attention "
                "states of the prefix do not go back: pass those of one length together, each length in a call"
            )
        ids = torch.full((len(rows), len(self) + int(lengths.max())), self._padding)
        mask = torch.zeros_like(ids)
        for i, (row, pad) in enumerate(zip(rows, pads.tolist())):
            ids[i, pad : pad + len(self)] = self.ids[0]
            ids[i, pad + len(self) :] = row
            mask[i, pad:] = 1
        device = self.ids.device
        return {
            "input_ids": ids.to(device),
            "attention_mask": mask.to(device),
            compat.CACHE: shifted(self._cache, pads),
        }


def prefix(
    model: nn.Module, text_or_ids: str | Sequence[int] | torch.Tensor | Mapping, tokenizer: Any = None
) -> Prefix:
    """Runs a system prompt, a document or examples through the model once, for many continuations.

    >>> shared = pkv_hf.prefix(model, "You are a helpful assistant. ", tokenizer)
    >>> output = model.generate(**shared.inputs("What is a page?"), max_new_tokens=100)

    Tokens stay as they are: a text cut where the tokenizer would join two tokens has other tokens than the whole text.

    Args:
        model: a causal LM; one that `patch` was called on reads the pages in place, any other gets dense K and V.
        text_or_ids: a text, tokenised with special tokens; token ids, `[length]` or `[1, length]`; or what a tokenizer
            returns that holds them, as `tokenizer.apply_chat_template(messages)` does.
        tokenizer: a transformers tokenizer, for texts here and in `Prefix.inputs`.

    Raises:
        ValueError: a text without a tokenizer, or with what is none; no token, several rows, padding, or what are no
            token ids of the model; UnsupportedModelError (a ValueError) for what is no transformers model, or one that
            keeps states of its tokens in its modules.
        PoolAllocationError: the pages do not fit.
    """
    inner: Any = unwrap(model)
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(f"prefix() got a {type(model).__name__}, not a transformers model")
    if not inner.can_generate() or inner.config.is_encoder_decoder:
        raise UnsupportedModelError(f"prefix() got a {type(inner).__name__}, which is no causal LM")
    embedding: Any = inner.get_input_embeddings()
    vocabulary = len(embedding.weight)
    rows = _tokens("text_or_ids", text_or_ids, vocabulary, tokenizer)
    if len(rows) != 1:
        raise ValueError(f"text_or_ids has {len(rows)} rows: a prefix is one row, make one prefix for each")
    ids = rows[0][None].to(inner.device)
    state: PatchState | None = getattr(inner, STATE, None)
    settings = {} if state is None else {"page_size": state.page_size, "kv_dtype": state.kv_dtype}
    cache = PagedCache(inner.config, max_length=ids.shape[1], **settings)  # type: ignore[arg-type]
    if not cache.linear_layers:
        cache.activate_past_recording()  # shorter continuations move what lies behind a window back into it
    own_states = taken_back(inner) if cache.linear_layers else contextlib.nullcontext()
    with torch.no_grad(), own_states:
        model(ids, use_cache=True, logits_to_keep=1, **{compat.CACHE: cache})
        if cache.linear_layers and not cache.holds_states:
            raise UnsupportedModelError(f"prefix() got a {type(inner).__name__}, which keeps states in its modules")
    padding: Any = getattr(inner.config.get_text_config(decoder=True), "pad_token_id", None)
    if not isinstance(padding, int) or not 0 <= padding < vocabulary:
        padding = 0
    return Prefix(ids, cache, tokenizer, vocabulary, padding)


def clear_prefix_cache(model: nn.Module) -> None:
    """Lets go of the pages of past prompts that `patch(model, prefix_cache=...)` keeps, and of their memory.

    Weights that torch saw change, optimizers' steps and training forwards do so by themselves. Call this after weights
    were changed in a way that nothing sees: through `.data`, numpy, or kernels of your own.

    Raises ValueError for a model that is not patched. Where no prefix cache was asked for there is nothing to do.
    """
    state: PatchState | None = getattr(unwrap(model), STATE, None)
    if state is None:
        raise ValueError(f"{type(model).__name__} is not patched: call pkv_hf.patch(model) first")
    if state.prefix_cache is not None:
        state.prefix_cache.clear()


def _only_ones(mask: Any) -> bool:
    """Whether a mask, or each of a list of masks, leaves nothing out."""
    if isinstance(mask, (list, tuple)) and mask and isinstance(mask[0], (list, tuple)):
        return all(map(_only_ones, mask))
    return bool(torch.as_tensor(mask).ne(0).all())


def _tokens(name: str, given: Any, vocabulary: int, tokenizer: Any, **settings: Any) -> list[torch.Tensor]:
    """Texts or ids, or what a tokenizer makes of texts, as ids of each row, int64 `[length]`."""
    if isinstance(given, Mapping):
        if "input_ids" not in given:
            raise ValueError(f"{name} has {sorted(given)} and no input_ids: pass what a tokenizer returns, or ids")
        mask = given.get("attention_mask")
        if mask is not None and not _only_ones(mask):
            raise ValueError(f"{name} is padded, by its attention_mask: pass each text alone, without padding")
        given = given["input_ids"]
    several = isinstance(given, (list, tuple)) and bool(given) and (isinstance(given[0], str) or np.ndim(given[0]) > 0)
    rows = list(given) if several or getattr(given, "ndim", 1) > 1 else [given]
    if isinstance(rows[0], str):
        if tokenizer is None:
            raise ValueError(f"{name} is text, which needs a tokenizer: pass tokenizer=..., or token ids")
        if not callable(tokenizer):
            raise ValueError(f"tokenizer={tokenizer!r} does not turn text into ids: pass a transformers tokenizer")
        try:
            rows = [tokenizer(text, **settings)["input_ids"] for text in rows]
        except Exception as error:
            raise ValueError(f"{name} is no text that the {type(tokenizer).__name__} takes: {error}") from error
    rows = [token_ids(name, row).cpu() for row in rows]
    if not all(map(len, rows)):
        raise ValueError(f"{name} has a row without a token: there is nothing to go on from")
    least, most = min(int(row.min()) for row in rows), max(int(row.max()) for row in rows)
    if not 0 <= least <= most < vocabulary:  # on a GPU that would end the process's CUDA context
        raise ValueError(f"{name} has ids from {least} to {most}: the model has {vocabulary} tokens")
    return rows
