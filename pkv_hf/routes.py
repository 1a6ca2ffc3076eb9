"""The ways to run decode attention over pages, and which one a step takes.

A route says `Accepted` or `Rejected(reason)` to a step before anything of it has run. `auto` takes the first that
accepts; a route that the caller named runs or raises.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from pkv_hf.attention import over_pages
from pkv_hf.errors import RouteError
from pkv_hf.kernels.launch import choose_tile, device_limits
from pkv_hf.layer import PagedLayer

MAX_DECODE_QUERIES = 8
"""Queries a row in one decode step (speculative verification); a longer block over the pages is prefill."""


Norms = tuple[torch.Tensor, torch.Tensor, float]
"""The weights `[D]` of an RMSNorm of every head of q and of k, and its epsilon."""


@dataclass(frozen=True)
class Accepted:
    pass


@dataclass(frozen=True)
class Rejected:
    reason: str


@dataclass(frozen=True)
class StepShape:
    """What routes decide on: one step of one kind of layers. Lengths and counts are in tokens and rows."""

    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    q_len: int
    group: int
    head_dim: int
    ragged: bool
    autocast: bool
    named: bool
    """The caller asked for one route by name: then Triton's interpreter counts as a device too."""


@dataclass
class Bounds:
    """What a step's queries attend to: they are at positions begin, ..., begin + q_len - 1 of rows from `starts` on."""

    starts: np.ndarray
    begin: int
    q_len: int
    horizon: int = 0
    """Launches must do for rows that end up to here, as a captured step's must; 0 for this step's own end."""
    mirrors: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    plans: dict[tuple, object] = field(default_factory=dict)

    @property
    def end(self) -> int:
        return self.begin + self.q_len

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """starts and ends, int32 `[rows]`, on a device; made once a step for all layers there."""
        if device not in self.mirrors:
            starts = torch.from_numpy(self.starts.astype(np.int32)).to(device, non_blocking=True)
            self.mirrors[device] = (starts, torch.full_like(starts, self.end))
        return self.mirrors[device]


class Route(Protocol):
    name: str
    fuses_rope: bool
    """Whether `rope_append` is worth calling: RoPE and append in one launch."""

    def supports(self, shape: StepShape) -> Accepted | Rejected: ...

    def append(self, layer: PagedLayer, k: torch.Tensor, v: torch.Tensor, bounds: Bounds) -> None:
        """Writes k and v `[rows, H_kv, q_len, D]` to a layer's pages at the step's positions."""
        ...

    def rope_append(
        self, layer: PagedLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        cos: torch.Tensor, sin: torch.Tensor, bounds: Bounds, norms: Norms | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """`append` with RoPE on q `[rows, H_q, q_len, D]` and on k before it; returns the rotated q.

        `norms`, where there are any, come before RoPE.
        """
        ...

    def decode(self, layer: PagedLayer, q: torch.Tensor, scale: float, bounds: Bounds) -> torch.Tensor:
        """Attention of q `[rows, H_q, q_len, D]` over a layer's pages, as `[rows, q_len, H_q, D]`."""
        ...


class Sdpa:
    """torch's attention on views of the pages, or on gathered copies where a row's pages are not consecutive."""

    name = "sdpa"
    fuses_rope = False

    def supports(self, shape: StepShape) -> Accepted | Rejected:
        return Accepted()

    def append(self, layer: PagedLayer, k: torch.Tensor, v: torch.Tensor, bounds: Bounds) -> None:
        layer.write(k, v)

    def rope_append(self, *_: object) -> torch.Tensor:
        raise NotImplementedError("the model's own RoPE goes with this route")

    def decode(self, layer: PagedLayer, q: torch.Tensor, scale: float, bounds: Bounds) -> torch.Tensor:
        return over_pages(layer, q, scale, bounds.starts, bounds.begin).transpose(1, 2)


class _Triton:
    """What the two Triton routes share: what they take, and how they append."""

    name: str
    fuses_rope = True

    def supports(self, shape: StepShape) -> Accepted | Rejected:
        if importlib.util.find_spec("triton") is None:
            return Rejected("triton is not installed")
        interpreted = shape.named and os.environ.get("TRITON_INTERPRET") == "1"
        if shape.device.type != "cuda" and not interpreted:
            return Rejected(f"Triton kernels need a GPU, the step is on {shape.device.type}")
        if shape.autocast:
            return Rejected("under autocast queries and pages differ in dtype")
        if shape.kv_dtype != shape.dtype:
            return Rejected(f"queries are {shape.dtype}, pages {shape.kv_dtype}")
        if shape.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return Rejected(f"{shape.dtype} is not one of float16, bfloat16, float32")
        if shape.dtype == torch.bfloat16 and shape.device.type == "cuda":
            capability = torch.cuda.get_device_capability(shape.device)
            if capability[0] < 8:
                return Rejected(f"bfloat16 needs sm_80 or newer, this is sm_{capability[0]}{capability[1]}")
        if shape.head_dim % 16 or not 16 <= shape.head_dim <= 256:
            return Rejected(f"head_dim {shape.head_dim} is not a multiple of 16 up to 256")
        if not 1 <= shape.group <= 16:
            return Rejected(f"{shape.group} query heads a KV head, at most 16 are served")
        queries = min(shape.q_len, MAX_DECODE_QUERIES) * shape.group
        shared_memory = device_limits(shape.device)[1]
        if choose_tile(shape.head_dim, shape.dtype.itemsize, queries, shared_memory) is None:
            return Rejected(f"{queries} queries a KV head do not fit {shared_memory} bytes of shared memory")
        return Accepted()

    def append(self, layer: PagedLayer, k: torch.Tensor, v: torch.Tensor, bounds: Bounds) -> None:
        from pkv_hf.kernels.append import append

        layer.length = layer.prepare(k, v)
        table, first_held = layer.table.on(k.device)
        append(*layer.pages, k, v, table, first_held, bounds.on(k.device)[1])

    def rope_append(
        self, layer: PagedLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        cos: torch.Tensor, sin: torch.Tensor, bounds: Bounds, norms: Norms | None = None,
    ) -> torch.Tensor:  # fmt: skip
        from pkv_hf.kernels.append import rope_append

        layer.length = layer.prepare(k, v)
        table, first_held = layer.table.on(k.device)
        return rope_append(*layer.pages, q, k, v, cos, sin, table, first_held, bounds.on(k.device)[1], norms)


class Split(_Triton):
    """A rectangular grid (row, KV head, split): sequence splitting, for one row or rows of equal length."""

    name = "split"

    def decode(self, layer: PagedLayer, q: torch.Tensor, scale: float, bounds: Bounds) -> torch.Tensor:
        from pkv_hf.kernels.split import decode_split

        table, _ = layer.table.on(q.device)
        starts, ends = bounds.on(q.device)
        window = layer.table.window
        longest = max(bounds.end, bounds.horizon) - int(bounds.starts.min())
        if window:
            longest = min(longest, window + bounds.q_len)
        return decode_split(q, *layer.pages, table, starts, ends, scale=scale, window=window, longest=longest)


class Workqueue(_Triton):
    """Tiles of all rows and heads in equal shares, one a resident CTA (stream-K): for rows of unequal length."""

    name = "workqueue"

    def decode(self, layer: PagedLayer, q: torch.Tensor, scale: float, bounds: Bounds) -> torch.Tensor:
        from pkv_hf.kernels.workqueue import decode_workqueue, make_plan

        table, _ = layer.table.on(q.device)
        starts, ends = bounds.on(q.device)
        window = layer.table.window
        key = (window, q.device)
        if key not in bounds.plans:
            bounds.plans[key] = make_plan(q, layer.pages[0], starts, ends, window=window)
        return decode_workqueue(q, *layer.pages, table, starts, ends, bounds.plans[key], scale=scale)


ROUTES: dict[str, Route] = {route.name: route for route in (Split(), Workqueue(), Sdpa())}


def choose(name: str, shape: StepShape) -> tuple[Route, dict[str, str]]:
    """The route of a step, and for every route that was asked and refused its reason.

    `auto` asks `workqueue` first for ragged rows and `split` first for the rest, then the other, then `sdpa`.

    Raises RouteError where the caller named a route that rejects the step.
    """
    order = ["workqueue", "split", "sdpa"] if shape.ragged else ["split", "workqueue", "sdpa"]
    if name != "auto":
        order = [name, *(other for other in order if other != name)]
    rejected = {}
    for candidate in order:
        answer = ROUTES[candidate].supports(shape)
        if isinstance(answer, Accepted):
            break
        rejected[candidate] = answer.reason
    if name != "auto" and name in rejected:
        reasons = "; ".join(f"{route}: {reason}" for route, reason in rejected.items())
        raise RouteError(f"route={name!r} cannot serve this step ({reasons}). Use route='auto' or {candidate!r}.")
    return ROUTES[candidate], rejected
