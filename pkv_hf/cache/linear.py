"""Layers that keep transformers' linear-attention states (of convolutions, recurrences), alone or beside pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from pkv_hf.cache.layer import PagedLayer
from pkv_hf.cache.tables import Tables
from pkv_hf.compat import LayerKind, layer_without_cache

OF_THE_STATES = (
    "conv_states", "recurrent_states", "is_conv_states_initialized", "is_recurrent_states_initialized",
    "has_previous_state", "conv_kernel_size",
)  # fmt: skip
"""What transformers' layer keeps by the number of a state."""


class LinearLayer(LinearAttentionLayer):
    """transformers' own layer of states `[rows, ...]`, of which a cache also makes copies, and goes back to them.

    States hold all tokens in one: unlike pages they cannot be cut, shared or read for less than all.
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}(states={self.number_of_states})"

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        with torch.inference_mode(False):  # what is made in that mode cannot be written outside of it
            super().lazy_initialization(*args, **kwargs)

    @property
    def tensors(self) -> list[torch.Tensor]:
        held = [*self.conv_states.values(), *self.recurrent_states.values()]
        return [tensor for tensor in held if tensor is not None]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def saved(self) -> dict[str, dict[int, Any]]:
        """What `restore` takes: the tensors themselves, not what is in them."""
        return {name: dict(getattr(self, name)) for name in OF_THE_STATES}

    def restore(self, saved: dict[str, dict[int, Any]]) -> None:
        for name, by_state in saved.items():
            setattr(self, name, dict(by_state))

    def forget_states(self) -> None:
        """As before the first token: rows to come may be more or fewer."""
        fresh = LinearAttentionLayer(self.number_of_states)
        self.restore({name: getattr(fresh, name) for name in OF_THE_STATES})

    def select_states(self, rows: torch.Tensor) -> None:
        """Keeps `rows` (int64 `[count]`, repeats allowed), in new tensors."""
        with torch.inference_mode(False), torch.no_grad():
            for by_state in (self.conv_states, self.recurrent_states):
                for i, held in by_state.items():
                    if held is not None:
                        by_state[i] = held.index_select(0, rows.to(held.device))

    def copy_states(self, other: LinearLayer) -> None:
        """Holds copies of another layer's states in the place of its own."""
        self.restore(other.saved())
        self.device, self.dtype, self.record_past = other.device, other.dtype, other.record_past
        with torch.inference_mode(False), torch.no_grad():
            for by_state in (self.conv_states, self.recurrent_states):
                by_state.update({i: held.clone() for i, held in by_state.items() if held is not None})

    reset = forget_states  # transformers' own keeps zeros of as many rows, which others do not fit into

    def crop(self, tokens_to_remove: int) -> None:
        """As transformers' own, which takes recurrent states for what they were before the removed tokens.

        Raises RuntimeError for these, and where the past was not recorded.
        """
        if tokens_to_remove and any(self.is_recurrent_states_initialized.values()):
            raise RuntimeError(
                f"tokens_to_remove={tokens_to_remove} needs recurrent states as they were before: fork() the cache "
                "before appending tokens that may be cropped"
            )
        if not self.record_past or self.tensors:
            super().crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.tensors:
            rows = torch.arange(len(self.tensors[0]), device=self.tensors[0].device)
            self.select_states(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.select_states(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)


class PagedLinearLayer(LinearLayer, PagedLayer):  # type: ignore[override]
    """States beside K and V in pages, as layers have them whose heads are of attention and of a recurrence."""

    is_compileable = False
    offload = PagedLayer.offload
    prefetch = PagedLayer.prefetch
    reset = PagedLayer.reset

    def __init__(self, tables: Tables, layer_idx: int, number_of_states: int) -> None:
        PagedLayer.__init__(self, tables, layer_idx)
        LinearLayer.__init__(self, number_of_states)

    def __repr__(self) -> str:
        return f"{PagedLayer.__repr__(self)[:-1]}, states={self.number_of_states})"

    @property
    def record_past(self) -> bool:  # type: ignore[override]
        return self._record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self._record_past = value
        if self.is_sliding:
            self.table.keep_past = value

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of K and V, which come by place, or of a state, whose tensors come by name."""
        of = PagedLayer if args else LinearLayer
        of.lazy_initialization(self, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        LinearLayer.crop(self, tokens_to_remove)
        PagedLayer.crop(self, tokens_to_remove)  # type: ignore[arg-type]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        LinearLayer.reorder_cache(self, beam_idx)
        CacheLayerMixin.reorder_cache(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        LinearLayer.batch_repeat_interleave(self, repeats)
        PagedLayer.batch_repeat_interleave(self, repeats)  # type: ignore[arg-type]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        LinearLayer.batch_select_indices(self, indices)
        PagedLayer.batch_select_indices(self, indices)  # type: ignore[arg-type]


def layer_of(kind: LayerKind, tables: Tables | None = None, layer_idx: int = 0) -> Any:
    """The layer of a cache that keeps what its kind says; one that keeps K and V is over `tables`."""
    if kind.window is not None:
        assert tables is not None
        return PagedLinearLayer(tables, layer_idx, kind.states) if kind.states else PagedLayer(tables, layer_idx)
    return LinearLayer(kind.states) if kind.states else layer_without_cache()


class SecondBuffers:
    """Room for all states of a cache once more, which one step after the other is taken back to."""

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def nbytes(self) -> int:
        return sum(copied.nbytes for _, copied in self._pairs)

    def filled(self, tensors: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each of the states, and what is in it now, in few launches. What was there before is gone."""
        if len(tensors) != len(self._pairs) or any(own is not other for (own, _), other in zip(self._pairs, tensors)):
            self._pairs = []  # and their memory, before there is more
            self._pairs = [(tensor, torch.empty_like(tensor)) for tensor in tensors]
        _fill([(copied, tensor) for tensor, copied in self._pairs])
        return self._pairs


class Checkpoint:
    """The states of layers, and how they were: which tensors and, with `values`, what was in them.

    Copies of values are its own, or in `second` buffers, where they hold until these are filled again.
    """

    def __init__(self, layers: Sequence[LinearLayer], values: bool, second: SecondBuffers | None = None) -> None:
        self.layers = layers
        self._saved = [(layer, layer.saved()) for layer in layers]
        self._sealed: list[tuple[torch.Tensor, int]] = []
        tensors = [tensor for layer in layers for tensor in layer.tensors] if values else []
        copies = [(tensor, tensor.clone()) for tensor in tensors] if second is None else second.filled(tensors)
        self._values = copies

    def seal(self) -> None:
        """Notes the states as they are now, of which `sealed` says whether that has changed."""
        self._sealed = [(tensor, tensor._version) for layer in self.layers for tensor in layer.tensors]

    @property
    def sealed(self) -> bool:
        """Whether nothing has changed the states since `seal`, by torch's count of writes."""
        tensors = [tensor for layer in self.layers for tensor in layer.tensors]
        return len(tensors) == len(self._sealed) and all(
            own is other and own._version == version for own, (other, version) in zip(tensors, self._sealed)
        )

    def restore(self) -> None:
        """Puts all back, in the same tensors, whose addresses CUDA graphs keep."""
        for layer, saved in self._saved:
            layer.restore(saved)
        _fill(self._values)

    def forget(self) -> None:
        for layer in self.layers:
            layer.forget_states()

    def crop(self, tokens_to_remove: int) -> None:
        for layer in self.layers:
            LinearLayer.crop(layer, tokens_to_remove)

    def select(self, rows: torch.Tensor) -> None:
        """Keeps `rows` of all states, int64 `[count]`, in new tensors."""
        for layer in self.layers:
            layer.select_states(rows)

    def keep_places(self) -> None:
        """Has states where they were then, with what is in them now, if they still are of as many rows."""
        for layer, saved in self._saved:
            for name in ("conv_states", "recurrent_states"):
                by_state = getattr(layer, name)
                for i, tensor in saved[name].items():
                    if tensor is not None and by_state[i] is not tensor and by_state[i].shape == tensor.shape:
                        _fill([(tensor, by_state[i])])
                        by_state[i] = tensor


def _fill(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copies into the first of each pair what is in the second, in a launch for many of one dtype on one device."""
    alike: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for tensor, value in pairs:
        alike.setdefault((tensor.device, tensor.dtype, value.device, value.dtype), []).append((tensor, value))
    with torch.inference_mode():  # in which tensors of either mode may be written
        for some in alike.values():
            tensors, values = zip(*some)
            torch._foreach_copy_(tensors, values)


@contextmanager
def atomic(layers: Sequence[LinearLayer]) -> Iterator[Checkpoint]:
    """Layers whose states are replaced inside, and not written in place, have them back where that fails."""
    before = Checkpoint(layers, values=False)
    try:
        yield before
    except BaseException:
        before.restore()
        raise


def addresses(layers: Sequence[LinearLayer]) -> list[int]:
    """Where all states are, on which CUDA graphs rely."""
    return [tensor.data_ptr() for layer in layers for tensor in layer.tensors]
