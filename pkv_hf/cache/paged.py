"""`PagedCache`: a transformers `Cache` whose K and V live in reference-counted pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from pkv_hf.arguments import whole
from pkv_hf.cache import linear
from pkv_hf.cache.layer import PagedLayer
from pkv_hf.cache.linear import Checkpoint, LinearLayer, SecondBuffers
from pkv_hf.cache.pending import Reordering, check_indices
from pkv_hf.cache.sizes import KV_DTYPES, PAGE_SIZES, CacheMemory, check_kv_dtype, check_page_size
from pkv_hf.cache.steps import CacheStep, LastStep, StaticSteps
from pkv_hf.cache.table import BlockTable
from pkv_hf.cache.tables import Tables
from pkv_hf.compat import LayerKind, layer_kinds


class PagedCache(DynamicCache):
    """KV cache in pages `[num_pages, H_kv, page_size, head_dim]`, one pool for each kind of layer.

    A kind is full attention or one sliding window. Layers of linear attention (convolutions, recurrences) keep
    transformers' own states beside them, which are copied where pages are shared.

    A patched model's `generate()` makes such a cache by itself. Made by hand it can be passed to any model in the place
    of its own: a patched one reads the pages in place, any other gets dense K and V from `update`.

    Args:
        config: the model's configuration; its text decoder decides the layers and their windows.
        page_size: tokens a page, a power of two from 16 to 256.
        max_length: positions that a row may come to, at least 1. Pages are reserved for them when the first tokens
            come, at most for 8192 new tokens and as far as memory holds them. A longer sequence still works: beyond
            what is reserved, and with None from the start, the pool grows by a factor as tokens come.
        kv_dtype: `torch.float16`, `torch.bfloat16` or `torch.float32` for the pages; None takes that of the states.
            "int8" and "fp8" (float8_e4m3) quantise them, with a float32 scale for each token and head: half the bytes.

    Raises:
        ValueError: an argument outside of these, a layer that keeps something else than K and V and linear-attention
            states, no layer that keeps K and V, or (from an update) K or V of another shape than the cache holds.
        PoolAllocationError: (from the first update or a growth) the pages do not fit.
    """

    layers: list[Any]
    """Of each decoder layer a `PagedLayer`, a `LinearLayer`, both in one, or transformers' own that keeps nothing."""

    def __init__(
        self,
        config: PreTrainedConfig,
        page_size: int = 16,
        max_length: int | None = None,
        kv_dtype: torch.dtype | str | None = None,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(f"config is a {type(config).__name__}: pass a model's configuration, as model.config")
        check_page_size(page_size)
        if max_length is not None:
            max_length = whole("max_length", max_length, 1, "pass a number of tokens, or None to grow")
        check_kv_dtype(kv_dtype)
        kinds = layer_kinds(config)
        dtype = None if kv_dtype is None else KV_DTYPES[kv_dtype]
        self._hold(Tables([kind.window for kind in kinds], page_size, max_length or 0, dtype), kinds, page_size)

    @classmethod
    def of_kinds(cls, kinds: Sequence[LayerKind]) -> PagedCache:
        """A cache of layers that keep what is said of each."""
        cache = cls.__new__(cls)
        page_size = PAGE_SIZES[0]
        cache._hold(Tables([kind.window for kind in kinds], page_size, 0, None), kinds, page_size)
        return cache

    def _hold(self, tables: Tables, kinds: Sequence[LayerKind], page_size: int) -> None:
        """Makes this the cache of some tables, which its layers share."""
        self._tables, self._kinds = tables, tuple(kinds)
        self.page_size, self.kv_dtype = page_size, tables.kv_dtype
        self.step: CacheStep | None = None  # set while a patched model's forward serves this cache
        self.static_steps = StaticSteps()
        self.last_step = LastStep()
        self.last_route: str | None = None  # of its last step in a patched model
        Cache.__init__(self, layers=[linear.layer_of(kind, tables, layer_idx) for layer_idx, kind in enumerate(kinds)])

    @property
    def paged_layers(self) -> list[PagedLayer]:
        """The layers that keep K and V."""
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]

    @property
    def linear_layers(self) -> list[LinearLayer]:
        """The layers that keep linear-attention states."""
        return [layer for layer in self.layers if isinstance(layer, LinearLayer)]

    @property
    def holds_states(self) -> bool:
        """Whether any linear-attention states are held."""
        return any(layer.tensors for layer in self.linear_layers)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """What each layer keeps."""
        return self._kinds[: len(self.layers)]

    @property
    def tables(self) -> dict[int, BlockTable]:
        """The block table of each kind of layer, by its window, 0 for full attention."""
        return self._tables.settled()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "step": None}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends K and V `[B, H_kv, q_len, head_dim]` of a layer.

        Returns dense K and V of all positions that the queries can see, as every transformers cache does; inside a
        patched model's forward, what its attention needs to read the pages in place.

        Raises IndexError for a layer that is not there, ValueError for states that do not go with those held.
        """
        if not isinstance(layer_idx, (int, np.integer)) or not 0 <= layer_idx < len(self.layers):
            raise IndexError(f"layer_idx={layer_idx!r}, but the PagedCache has {len(self.layers)} layers")
        layer = self.layers[int(layer_idx)]
        if self.step is not None and isinstance(layer, PagedLayer):
            return self.step.update(key_states, value_states, layer_idx)
        return layer.update(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens a row that a layer holds, padding included.

        Raises RuntimeError in a step that is being captured: its graph would keep this step's length.
        """
        if self.step is not None and self.step.captured:
            raise RuntimeError("the model reads the length of its cache on the host")
        return super().get_seq_length(layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The position of the next token, for masks."""
        return super().get_seq_length(layer_idx)

    def start(self, rows: int, pads: np.ndarray) -> None:
        """Begins `rows` rows whose first `pads[row]` positions are padding, int64 `[rows]`, which costs no page.

        Raises ValueError for other than one count for each row.
        """
        rows = whole("rows", rows, 1, "reset() forgets all rows")
        try:
            counts = np.asarray(pads)
        except ValueError:  # rows of unequal length
            counts = np.zeros(0)
        if counts.shape != (rows,) or counts.dtype.kind not in "iu" or counts.min() < 0:
            raise ValueError(f"pads={pads!r} of {rows} rows: pass how many positions of each are padding, 0 or more")
        with linear.atomic(self.linear_layers) as before:
            before.forget()
            self._tables.start(rows, counts)

    def expect_copies(self, copies: int, shared: int = 0) -> None:
        """Reserves pages, when the first tokens come, for `copies` rows of each that share its first `shared` tokens.

        `batch_repeat_interleave(copies)` makes them. Raises ValueError for less than one copy or no token.
        """
        copies = whole("copies", copies, 1, "1 expects none")
        shared = whole("shared", shared, 0, "pass the tokens that come before the copies")
        for table in self.tables.values():
            table.copies, table.shared = copies, shared

    def expect_prompt(self, length: int) -> None:
        """Reserves pages, when the first tokens come, for a prompt of `length` positions, of which they may be a chunk.

        Raises ValueError for less than one.
        """
        length = whole("length", length, 1, "pass the positions of the prompt")
        for table in self.tables.values():
            table.prompt = length

    def truncate(self, length: int) -> None:
        """Takes every layer back to `length` tokens: after a forward that failed halfway, all layers agree again.

        Raises ValueError for less than no token, RuntimeError for linear-attention states, which go back to 0 alone.
        """
        length = whole("length", length, 0, "pass the tokens to keep")
        lengths = [min(held, length) for held in self._lengths()]
        if length and lengths != self._lengths() and self.linear_layers:
            raise RuntimeError(
                f"length={length} takes linear-attention states back, which hold all tokens in one: take a "
                "checkpoint() before, or a fork()"
            )
        self._cut(lengths)

    def _check_states(self) -> None:
        """Raises RuntimeError where there are tokens and linear-attention layers, but no states of theirs."""
        if self.linear_layers and any(self._lengths()) and not self.holds_states:
            raise RuntimeError("the model keeps linear-attention states in its modules, which no cache copies or crops")

    def _cut(self, lengths: list[int], cropped: int | None = None) -> None:
        """Takes paged layers to their lengths, and all others to nothing where those are 0, or crops them."""
        with self._tables.atomic(), linear.atomic(self.linear_layers) as before:
            if not any(lengths):
                before.forget()
                self.last_step = LastStep()
            elif cropped is not None:
                before.crop(cropped)
            self._tables.cut(lengths)
        if not any(lengths):
            self._tables.forget_unfinished()

    def _lengths(self) -> list[int]:
        return [self._tables.length(layer_idx) for layer_idx in range(len(self._tables.windows))]

    def checkpoint(self, values: bool = True, second: SecondBuffers | None = None) -> tuple[list[int], Checkpoint]:
        """What `go_back` takes: lengths, and copies of all states; without `values` only where these are.

        In `second` buffers they hold until the next checkpoint there.
        """
        return self._lengths(), Checkpoint(self.linear_layers, values, second)

    def take_back(self) -> None:
        """Takes back the last token, of a decode step on static buffers: linear-attention states, too.

        Waits for no device, though it may still be computing the step. Raises RuntimeError where there are such states,
        and anything else has changed the cache since that step.
        """
        if self.holds_states:
            self.last_step.take_back(self)
        else:
            self.crop(-1)

    def go_back(self, checkpoint: tuple[list[int], Checkpoint]) -> None:
        """Takes every layer back to what it held at `checkpoint`, after a forward that failed halfway."""
        lengths, states = checkpoint
        self._cut([min(length, held) for length, held in zip(lengths, self._lengths())])
        if any(lengths):
            states.restore()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens (a negative count, or 0 for none) and frees their pages.

        Raises:
            ValueError: a positive count, or more tokens than the cache holds.
            RuntimeError: the sliding window, or the state of a convolution, that ends there is not held any more
                (`activate_past_recording` before appending keeps it), or recurrent states, which do not go back.
        """
        held = self.get_seq_length()  # assisted generation of older releases passes a tensor
        instead = f"pass minus the number of tokens to remove, the cache holds {held}"
        tokens_to_remove = whole("tokens_to_remove", tokens_to_remove, -held, instead)
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove} is positive: {instead}")
        length = held + tokens_to_remove
        if tokens_to_remove and length:
            self._check_states()
        for table in self.tables.values():
            if tokens_to_remove and not table.can_shrink(length):
                raise RuntimeError(
                    f"tokens_to_remove={tokens_to_remove} needs positions that the sliding window of {table.window} "
                    "has left behind: call activate_past_recording() before appending tokens that may be cropped"
                )
        self._cut([max(held + tokens_to_remove, 0) for held in self._lengths()], tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row `i` becomes row `beam_idx[i]`: table rows and reference counts move, no K or V does.

        Does not wait for a GPU: `beam_idx` is copied from it meanwhile, and the rows move when the tables are next
        asked for. Raises as `batch_select_indices` does, where it names rows that are not there only then.
        """
        if not isinstance(beam_idx, torch.Tensor) or not beam_idx.is_cuda or beam_idx.dtype == torch.bool:
            return self.batch_select_indices(beam_idx)
        check_indices(beam_idx, self.rows)
        self._tables.settled()
        reordering = Reordering(beam_idx)
        with linear.atomic(self.linear_layers) as before:
            before.select(beam_idx.clamp(-self.rows, self.rows - 1) % self.rows)  # the host does not know them yet
            self._tables.reordering = reordering
        before.keep_places()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, side by side, on the same pages until one of them writes."""
        repeats = whole("repeats", repeats, 1, "reset() forgets all rows")
        if self.rows:
            self._select(np.repeat(np.arange(self.rows), repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices` (or those where a boolean mask is true), in that order.

        Raises:
            ValueError: what is not a tensor `[count]` of integers or `[rows]` of booleans, or keeps no row.
            IndexError: a row that is not there.
        """
        check_indices(indices, self.rows)
        chosen = indices.cpu().numpy()
        if self.rows:
            self._select(np.flatnonzero(chosen) if chosen.dtype == bool else chosen)

    def _select(self, rows: np.ndarray) -> None:
        held = self.rows
        with self._tables.atomic(), linear.atomic(self.linear_layers) as before:
            self._tables.select(rows)
            before.select(torch.from_numpy(rows.astype(np.int64) % held))
        before.keep_places()

    def reset(self) -> None:
        """Forgets all tokens and returns their pages; the pools stay for the next ones."""
        self.truncate(0)

    def fork(self) -> PagedCache:
        """A second cache with the same contents on the same pages; whichever writes into a page first copies it.

        Linear-attention states are copied at once. Forks share one pool, so only one of them may be used at a time
        (threads need `copy.deepcopy`). Raises RuntimeError where the model keeps its states in its modules.
        """
        self._check_states()
        twin = object.__new__(PagedCache)
        twin._hold(self._tables.fork(), self._kinds, self.page_size)
        twin.last_route = self.last_route
        del twin.layers[len(self.layers) :]
        for own, other in zip(twin.linear_layers, self.linear_layers):
            own.copy_states(other)
        return twin

    def memory(self) -> CacheMemory:
        """Bytes and pages that the cache holds now."""
        states = sum(layer.nbytes for layer in self.linear_layers)
        return CacheMemory.of(self.tables.values(), self.get_seq_length(), states, self.last_step.nbytes)

    @property
    def rows(self) -> int:
        """Rows of the batch, 0 before the first tokens."""
        return next(iter(self.tables.values())).rows

    @property
    def pads(self) -> np.ndarray:
        """Leading positions of each row that hold no token, int64 `[rows]`."""
        return next(iter(self.tables.values())).pads

    @property
    def batch_size(self) -> int:
        return self.rows or -1

    @property
    def max_cache_len(self) -> int:
        """-1, as there is no largest length. PEFT asks caches for it."""
        return -1

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of the K and the V pages, which differ where autocast made them; empty before the first tokens."""
        storage = next(iter(self.tables.values())).pool.storage
        return {pages.dtype for pages in next(iter(storage.values()))[:2]} if storage else set()

    @property
    def kv_heads(self) -> int | None:
        """Of the pages, with tensor parallelism fewer than the configuration names. None before the first tokens."""
        storage = next(iter(self.tables.values())).pool.storage
        return len(next(iter(storage.values())).k) if storage else None

    @property
    def device(self) -> torch.device:
        """Where the first tokens were."""
        return next(iter(self.tables.values())).pool.device
