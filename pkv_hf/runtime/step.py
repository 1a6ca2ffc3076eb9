"""One forward of a patched model over a `PagedCache`: what its layers share, from begin to commit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from pkv_hf.cache.layer import PagedLayer
from pkv_hf.cache.packing import Packing
from pkv_hf.cache.paged import PagedCache
from pkv_hf.configurations import serving
from pkv_hf.errors import LayerNotServed
from pkv_hf.routes.base import WHOLE, Bounds, Norms, Rotary, Route, Scores
from pkv_hf.routes.sdpa import over_packed_prompt, over_pages, over_prompt
from pkv_hf.runtime.fusion import Fusion
from pkv_hf.runtime.masks import Expanded

NOT_FUSED = Fusion()


def current_step() -> Step | None:
    """The step whose forward runs in this thread."""
    return serving.get()


@contextmanager
def outside_of_steps() -> Iterator[None]:
    """Lets a call inside of another's step, by a hook say, run as if there were none."""
    token = serving.set(None)
    try:
        yield
    finally:
        serving.reset(token)


def launching_on(device: torch.device) -> AbstractContextManager:
    """Makes a device the current one: Triton launches there, whatever device the tensors are on."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


class KeptTensors:
    """Tensors that modules keep from call to call, outside of any cache, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [
            (module, name, tensor, None if tensor is None else tensor.clone())
            for module in model.modules()
            for name, tensor in vars(module).items()
            if tensor is None or isinstance(tensor, torch.Tensor)
        ]

    def restore(self) -> None:
        """Has them where they were then, with what was in them."""
        for module, name, tensor, value in self._kept:
            if tensor is not None and value is not None:
                with torch.inference_mode():  # in which tensors of either mode may be written
                    tensor.copy_(value)
            vars(module)[name] = tensor


@contextmanager
def taken_back(decoder: nn.Module) -> Iterator[None]:
    """Tensors that a decoder's modules keep are as before where this fails."""
    kept = KeptTensors(decoder)
    try:
        yield
    except BaseException:
        kept.restore()
        raise


class ShownMask:
    """A mask of transformers' own that a step gave its layers, and what it stands for: a window (0: full attention), or
    chunks of so many tokens.

    Hooks may hand layers another, or write into this one: only a mask of the values that were given is causal alone.
    """

    def __init__(self, mask: torch.Tensor | None, window: int, chunked: bool) -> None:
        self.window = window
        self.chunked = chunked
        self._mask = mask
        self._values = None if mask is None else mask.clone()

    def is_given(self, mask: torch.Tensor | None) -> bool:
        if mask is None or self._values is None:
            return mask is self._mask
        return mask.shape == self._values.shape and torch.equal(mask.to(self._values.device), self._values)


class Step:
    """Appends each layer's new K and V to the pages and attends over them by the step's route.

    Lives on `cache.step` while the forward runs; a forward that fails leaves the cache as it was, and so does one in
    which a layer did not append or attend. With `packing` the forward is over the rows' real tokens side by side, as
    one row. `captured` says that a CUDA graph keeps what the forward does, `fusion` which layers run by forwards of
    ours. `config` is the decoder's own. `shows_masks` gives layers transformers' masks
    for their hooks to see. `expanded` is what masks said that the model
    made: where they were causal no layer may bring one that is more, which would be made of less.
    """

    def __init__(
        self,
        cache: PagedCache,
        bounds: Bounds,
        route: Route,
        config: Any,
        packing: Packing | None = None,
        captured: bool = False,
        fusion: Fusion = NOT_FUSED,
        shows_masks: bool = False,
        expanded: Expanded | None = None,
    ) -> None:
        self.cache = cache
        self.bounds = bounds
        self.route = route
        self.config = config
        self.packing = packing
        self.captured = captured
        self.fusion = fusion
        self.shows_masks = shows_masks
        self.causal = packing is not None or (expanded is not None and expanded.causal)
        self.explicit = self.causal and expanded is not None and expanded.explicit
        self.masks: list[ShownMask] = []
        self.masked = False  # some layer's attention was transformers' own, under a mask that the model made
        self.doubled: Any = None  # angles that came once for both halves of a head, and as kernels take them
        self._unread: set[int] = set()  # layers that have appended and not attended yet

    def __enter__(self) -> Step:
        if not self.cache.rows:
            self.cache.start(len(self.bounds.starts), self.bounds.starts)
        self._before = self.cache.checkpoint(values=not self.captured)  # a capture runs nothing
        self.cache.step = self
        self._outer = serving.set(self)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        serving.reset(self._outer)
        self.cache.step = None
        missed = self._unread.union(
            layer.layer_idx for layer in self.cache.paged_layers if layer.length != self.bounds.end
        )
        if error is not None or missed:
            self.cache.go_back(self._before)
        del self._before
        if error is None and missed:
            raise LayerNotServed(f"layer {min(missed)} does not go through transformers' cache and attention interface")

    def update(self, k: torch.Tensor, v: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends k and v `[rows, H_kv, q_len, D]` to a layer; returns them with a handle that leads back here.

        Raises LayerNotServed for states that are not this step's tokens, once a layer.
        """
        layer = self.cache.layers[layer_idx]
        rows, tokens = (1, self.packing.tokens) if self.packing else (len(self.bounds.starts), self.bounds.q_len)
        if (
            k.shape[:3] != v.shape[:3]
            or k.shape[0] != rows
            or k.shape[2] != tokens
            or layer.length != self.bounds.begin
        ):
            raise LayerNotServed(
                f"layer {layer_idx} keeps keys {list(k.shape)} and values {list(v.shape)} after {layer.length} tokens, "
                f"in a step of {rows} x {tokens} after {self.bounds.begin}"
            )
        if self.packing is not None:
            layer.write_packed(k, v, self.packing)
        else:
            with launching_on(k.device):
                self.route.append(layer, k, v, self.bounds)
        self._unread.add(layer_idx)
        return self.handed_on(k, v, layer_idx)

    def handed_on(self, k: torch.Tensor, v: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v with a handle that leads to what this step holds of a layer."""
        k.pkv_hf_handle = v.pkv_hf_handle = (self, layer_idx)  # type: ignore[attr-defined]
        return k, v

    def attended(self, layer_idx: int) -> bool:
        """Whether a layer has attended to what it appended: others that do share its K and V."""
        return layer_idx not in self._unread

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer_idx: int, scores: Scores) -> torch.Tensor:
        """Attention of q `[rows, H_q, q_len, D]`, whose own k and v were appended: `[rows, q_len, H_q, V's D]`.

        Queries of a layer that shares K and V may be of the step's last tokens alone.
        """
        layer, bounds = self.cache.layers[layer_idx], self.bounds
        self._unread.discard(layer_idx)
        if self.packing is not None:
            return over_packed_prompt(q, k, v, scores, self.packing, layer.table.window).transpose(1, 2)
        if not bounds.begin:
            return over_prompt(q, k, v, scores, bounds.starts, layer.table.window).transpose(1, 2)
        return self._over_pages(layer, q, scores)

    def dense(self, k: torch.Tensor, v: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of all positions that a prompt's queries can see, whose own k and v were appended.

        For attention by transformers, under a mask that the model made.
        """
        self._unread.discard(layer_idx)
        self.masked = True
        begin = self.bounds.begin
        if not begin:
            return k, v
        layer = self.cache.layers[layer_idx]
        held_k, held_v = layer.dense(layer.table.first_visible(begin), self.bounds.end)
        return held_k.to(k.dtype), held_v.to(v.dtype)

    def _over_pages(self, layer: PagedLayer, q: torch.Tensor, scores: Scores) -> torch.Tensor:
        bounds, begin = self.bounds, self.bounds.end - q.shape[2]
        if not bounds.decodes or begin > bounds.begin:
            return over_pages(layer, q, scores, bounds.starts, begin).transpose(1, 2)
        with launching_on(q.device):
            return self.route.decode(layer, q, scores, bounds)

    def rope_attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None,
        layer_idx: int, scores: Scores, rotary: Rotary = WHOLE, norms: Norms | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """`update` and `attend` with RoPE in the append, as `Route.rope_append` has it: q, k and v as projected.

        `[rows, heads, q_len, D]` each. Returns `[rows, q_len, H_q, D]`.
        """
        layer, bounds = self.cache.layers[layer_idx], self.bounds
        with launching_on(q.device):
            if bounds.decodes:
                return self.route.rope_attend(layer, q, k, v, cos, sin, scores, bounds, rotary, norms)
            q = self.route.rope_append(layer, q, k, v, cos, sin, bounds, rotary, norms)
        return self._over_pages(layer, q, scores)


def handle_of(states: torch.Tensor) -> tuple[Step, int] | None:
    """The step and layer that `Step.update` put on its keys and values, None for any other tensor."""
    return getattr(states, "pkv_hf_handle", None)
