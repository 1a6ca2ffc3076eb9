"""Our own kernels as routes: appends by Triton, and decode attention by splitting or by a workqueue."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from pkv_hf.cache.layer import PagedLayer
from pkv_hf.cache.table import BlockTable
from pkv_hf.kernels.launch import (
    MOST_HEAD_DIM,
    PROGRAMS_PER_SM,
    capability,
    device_limits,
    has_dtypes,
    is_head_dim,
    splits_for,
)
from pkv_hf.kernels.quantize import LARGEST
from pkv_hf.routes.base import WHOLE, Accepted, Bounds, Norms, Rejected, Rotary, Scores, StepShape, installed
from pkv_hf.routes.costs import Work

if TYPE_CHECKING:  # importing it imports Triton
    from pkv_hf.kernels.attention.new_token import NewToken


class Triton:
    """What routes that append by Triton share: what they take, and how they append."""

    name: str
    fuses_rope = True

    def supports(self, shape: StepShape) -> Accepted | Rejected:
        if not installed("triton"):
            return Rejected("triton is not installed")
        interpreted = shape.named and os.environ.get("TRITON_INTERPRET") == "1"
        if shape.device.type != "cuda" and not interpreted:
            return Rejected(f"Triton kernels need a GPU, the step is on {shape.device.type}")
        if shape.autocast:
            return Rejected("under autocast queries and pages differ in dtype")
        if shape.kv_dtype != shape.dtype and shape.kv_dtype not in LARGEST:
            return Rejected(f"queries are {shape.dtype}, pages {shape.kv_dtype}")
        if shape.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return Rejected(f"{shape.dtype} is not one of float16, bfloat16, float32")
        major, minor = capability(shape.device)
        if not has_dtypes(shape.device, shape.dtype):
            return Rejected(f"bfloat16 needs sm_80 or newer, this is sm_{major}{minor}")
        if not has_dtypes(shape.device, shape.kv_dtype):
            return Rejected(f"fp8 pages need sm_89 or newer, this is sm_{major}{minor}: use int8")
        for head_dim in (shape.head_dim, shape.value_dim):
            if not is_head_dim(head_dim):
                return Rejected(f"head_dim {head_dim} is not a multiple of 16 up to {MOST_HEAD_DIM}")
        if not 1 <= shape.group <= 16:
            return Rejected(f"{shape.group} query heads a KV head, at most 16 are served")
        if shape.tile is None:
            queries, shared_memory = shape.q_len * shape.group, device_limits(shape.device)[1]
            return Rejected(f"{queries} queries a KV head do not fit {shared_memory} bytes of shared memory")
        return Accepted()

    def prepare(self, table: BlockTable, device: torch.device) -> None:
        pass

    def append(self, layer: PagedLayer, k: torch.Tensor, v: torch.Tensor, bounds: Bounds) -> None:
        from pkv_hf.kernels.append import append

        layer.length = layer.prepare(k, v)
        table, first_held = layer.table.on(k.device)
        append(*layer.pages, k, v, table, first_held, bounds.on(k.device)[1], layer.scales)

    def rope_append(
        self, layer: PagedLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        cos: torch.Tensor | None, sin: torch.Tensor | None, bounds: Bounds,
        rotary: Rotary = WHOLE, norms: Norms | None = None,
    ) -> torch.Tensor:  # fmt: skip
        from pkv_hf.kernels.append import rope_append

        layer.length = layer.prepare(k, v)
        table, first_held = layer.table.on(k.device)
        ends = bounds.on(k.device)[1]
        return rope_append(
            *layer.pages, q, k, v, cos, sin, table, first_held, ends, norms, layer.scales,
            rotary=rotary.dim, interleaved=rotary.interleaved, paired_angles=rotary.paired,
        )  # fmt: skip

    def rope_attend(
        self, layer: PagedLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        cos: torch.Tensor | None, sin: torch.Tensor | None, scores: Scores, bounds: Bounds,
        rotary: Rotary = WHOLE, norms: Norms | None = None,
    ) -> torch.Tensor:  # fmt: skip
        q = self.rope_append(layer, q, k, v, cos, sin, bounds, rotary, norms)
        return self.decode(layer, q, scores, bounds)

    def decode(self, layer: PagedLayer, q: torch.Tensor, scores: Scores, bounds: Bounds) -> torch.Tensor:
        raise NotImplementedError


class Split(Triton):
    """A rectangular grid (row, KV head, split): sequence splitting, for one row or rows of equal length."""

    name = "split"

    def work(self, shape: StepShape) -> Work:
        tile = _tokens(shape)
        items, tiles = shape.rows * shape.kv_heads, -(-shape.longest // tile)
        splits = splits_for(items, tiles, shape.processors)
        merges = splits > 1
        partials = items * splits if merges else 0
        return shape.work(-(-tiles // splits) * tile, 1 + merges, partials, appends=shape.q_len == 1)

    def rope_attend(
        self, layer: PagedLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        cos: torch.Tensor | None, sin: torch.Tensor | None, scores: Scores, bounds: Bounds,
        rotary: Rotary = WHOLE, norms: Norms | None = None,
    ) -> torch.Tensor:  # fmt: skip
        if bounds.q_len > 1:
            return super().rope_attend(layer, q, k, v, cos, sin, scores, bounds, rotary, norms)
        from pkv_hf.kernels.attention.new_token import NewToken

        layer.length = layer.prepare(k, v)
        first_held = layer.table.on(k.device)[1]
        pairing = rotary.dim, rotary.interleaved, rotary.paired
        return self._attend(layer, q, scores, bounds, NewToken(k, v, cos, sin, first_held, norms, *pairing))

    def decode(self, layer: PagedLayer, q: torch.Tensor, scores: Scores, bounds: Bounds) -> torch.Tensor:
        return self._attend(layer, q, scores, bounds)

    def _attend(
        self, layer: PagedLayer, q: torch.Tensor, scores: Scores, bounds: Bounds, new: NewToken | None = None
    ) -> torch.Tensor:
        from pkv_hf.kernels.attention.split import decode_split

        table, _ = layer.table.on(q.device)
        starts, ends = bounds.on(q.device)
        window = layer.table.window
        longest = max(bounds.end, bounds.horizon) - int(bounds.starts.min())
        if window:
            longest = min(longest, window + bounds.q_len)
        return decode_split(
            q,
            *layer.pages,
            table,
            starts,
            ends,
            window=window,
            longest=longest,
            scales=layer.scales,
            new=new,
            **scores._asdict(),
        )


class Workqueue(Triton):
    """Tiles of all rows and heads in equal shares, one a resident CTA (stream-K): for rows of unequal length."""

    name = "workqueue"

    def work(self, shape: StepShape) -> Work:
        tile = _tokens(shape)
        tiles = (-(-shape.tokens // tile) + shape.rows) * shape.kv_heads  # a row's last tile is part of one
        programs = min(PROGRAMS_PER_SM * shape.processors, tiles)
        items = shape.rows * shape.kv_heads
        return shape.work(-(-tiles // programs) * tile, 2, items + programs)

    def decode(self, layer: PagedLayer, q: torch.Tensor, scores: Scores, bounds: Bounds) -> torch.Tensor:
        from pkv_hf.kernels.attention.workqueue import decode_workqueue

        table, _ = layer.table.on(q.device)
        bounds_there = bounds.on(q.device)
        window = layer.table.window
        return decode_workqueue(
            q, *layer.pages, table, *bounds_there, window=window, scales=layer.scales, **scores._asdict()
        )


def _tokens(shape: StepShape) -> int:
    """Tokens of a tile of the Triton routes, for a step that they take."""
    assert shape.tile is not None
    return shape.tile.tokens
