"""One forward of a patched model over a `PagedCache`: what its layers share, from begin to commit."""

from __future__ import annotations

import torch

from pkv_hf.attention import over_pages, packed, prefill
from pkv_hf.cache import PagedCache
from pkv_hf.packing import Packing
from pkv_hf.routes import MAX_DECODE_QUERIES, Bounds, Norms, Route


class Step:
    """Appends each layer's new K and V to the pages and attends over them by the step's route.

    Lives on `cache.step` while the forward runs; a forward that fails leaves the cache as it was. With `packing` the
    forward is over the rows' real tokens side by side, as one row.
    """

    def __init__(self, cache: PagedCache, bounds: Bounds, route: Route, packing: Packing | None = None) -> None:
        self.cache = cache
        self.bounds = bounds
        self.route = route
        self.packing = packing

    def __enter__(self) -> Step:
        if not self.cache.rows:
            self.cache.start(len(self.bounds.starts), self.bounds.starts)
        self.cache.step = self
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.cache.step = None
        if error is not None:
            self.cache.truncate(self.bounds.begin)

    def update(self, k: torch.Tensor, v: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends k and v `[rows, H_kv, q_len, D]` to a layer; returns them, k with a handle that leads back here."""
        if self.packing is not None:
            self.cache.layers[layer_idx].write_packed(k, v, self.packing)
        else:
            self.route.append(self.cache.layers[layer_idx], k, v, self.bounds)
        k.pkv_hf_handle = (self, layer_idx)  # type: ignore[attr-defined]
        return k, v

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer_idx: int, scale: float) -> torch.Tensor:
        """Attention of q `[rows, H_q, q_len, D]`, whose own k and v were appended; returns `[rows, q_len, H_q, D]`."""
        layer, bounds = self.cache.layers[layer_idx], self.bounds
        if self.packing is not None:
            return packed(q, k, v, scale, self.packing, layer.table.window).transpose(1, 2)
        if not bounds.begin:
            return prefill(q, k, v, scale, bounds.starts, layer.table.window).transpose(1, 2)
        if bounds.q_len > MAX_DECODE_QUERIES:
            return over_pages(layer, q, scale, bounds.starts, bounds.begin).transpose(1, 2)
        return self.route.decode(layer, q, scale, bounds)

    @property
    def fuses_rope(self) -> bool:
        """Whether this step is a decode step whose route takes `rope_decode`."""
        return self.route.fuses_rope and self.bounds.begin > 0 and self.bounds.q_len <= MAX_DECODE_QUERIES

    def rope_decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        layer_idx: int, scale: float, norms: Norms | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """`update` and `attend` with RoPE in the append: q, k, v as projected, cos and sin `[1 or rows, q_len, D]`."""
        layer = self.cache.layers[layer_idx]
        q = self.route.rope_append(layer, q, k, v, cos, sin, self.bounds, norms)
        return self.route.decode(layer, q, scale, self.bounds)


def handle_of(key: torch.Tensor) -> tuple[Step, int] | None:
    """The step and layer that `Step.update` put on the keys, None for any other keys."""
    return getattr(key, "pkv_hf_handle", None)
