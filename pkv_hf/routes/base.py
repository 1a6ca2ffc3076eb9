"""What a way to run decode attention over pages is, and the step that it is asked about.

A route says `Accepted` or `Rejected(reason)` to a step before anything of it has run; `policy` takes one of those that
accept.
"""

from __future__ import annotations

import functools
import importlib.util
import operator
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from pkv_hf.cache.layer import PagedLayer
from pkv_hf.cache.table import BlockTable
from pkv_hf.kernels.launch import Tile, choose_tile, device_limits
from pkv_hf.kernels.quantize import LARGEST
from pkv_hf.routes.costs import Work

MAX_DECODE_QUERIES = 8
"""Queries a row in one decode step (speculative verification); a longer block over the pages is prefill."""


class Norms(NamedTuple):
    """An RMSNorm of every head of q and of k, or of all heads of each together."""

    q: torch.Tensor
    """Its weight for q, less offset: `[D]`, or `[H_q * D]` of all heads together, as k's is `[H_kv * D]`."""
    k: torch.Tensor
    eps: float
    offset: float = 0.0


@dataclass(frozen=True)
class Rotary:
    """Which elements of a head RoPE turns, as `kernels.reference.rotate` defines it."""

    dim: int | None = None
    """The first so many; None for all, 0 for none."""
    interleaved: bool = False
    """Pairs are neighbours, not an element and the one half of them further on."""
    paired: bool = False
    """cos and sin have the angles of pair i at 2 i and 2 i + 1."""
    once: bool = False
    """The model's cos and sin have each angle once; routes get them for both halves."""


WHOLE = Rotary()
"""All of a head, in halves."""


class Scores(NamedTuple):
    """What a layer does with its scores, from queries and keys to weights."""

    scale: float
    softcap: float = 0.0
    """Scores are `softcap * tanh(scores / softcap)`; 0 for scores as they are."""
    sinks: torch.Tensor | None = None
    """`[H_q]`: of every query head one more score in the softmax, which has no value."""
    chunked: bool = False
    """Rows are cut into chunks of as many tokens as the layer's window has, and each attends to itself."""

    @property
    def plain(self) -> bool:
        """Whether a causal softmax of scaled scores is all."""
        return not (self.softcap or self.chunked) and self.sinks is None


@dataclass(frozen=True)
class Accepted:
    pass


@dataclass(frozen=True)
class Rejected:
    reason: str


@dataclass(frozen=True)
class StepShape:
    """What routes and the policy decide on: one step, by its layers of one kind, those of full attention if it has any.

    Lengths and counts are in tokens and rows; `tokens` and `longest` are of what rows attend to, by their windows.
    """

    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    q_len: int
    group: int
    """Query heads a KV head."""
    kv_heads: int
    head_dim: int
    """Of K, and of V unless `value_head_dim` says otherwise."""
    page_size: int
    layers: int
    rows: int
    tokens: int
    """Of all rows together."""
    longest: int
    padded: bool
    """Some row begins after position 0."""
    windowed: bool
    """Some layer has a sliding window."""
    autocast: bool
    captured: bool
    """A CUDA graph replays the step."""
    named: bool
    """The caller asked for one route by name, so that Triton's interpreter counts as a device too."""
    fused: bool = False
    """Our kernels run its layers: a new token's RoPE and append are a launch, or part of the one that attends."""
    value_head_dim: int = 0
    """V's, 0 where it is K's."""
    softcap: float = 0.0
    sinks: bool = False
    chunked: bool = False
    """These as in `Scores`."""

    @property
    def value_dim(self) -> int:
        """V's head_dim."""
        return self.value_head_dim or self.head_dim

    @functools.cached_property
    def processors(self) -> int:
        """Multiprocessors of the device."""
        return device_limits(self.device)[0]

    @functools.cached_property
    def tile(self) -> Tile | None:
        """The tile of the Triton routes, None where the queries leave no room for any."""
        shared_memory = device_limits(self.device)[1]
        queries, itemsize = self.q_len * self.group, self.dtype.itemsize
        head_dim = max(self.head_dim, self.value_dim)
        return choose_tile(head_dim, itemsize, queries, shared_memory, self.kv_dtype.itemsize)

    @functools.cached_property
    def token_bytes(self) -> int:
        """Bytes of a token's K and V of one head."""
        return (self.head_dim + self.value_dim) * self.kv_dtype.itemsize + 8 * (self.kv_dtype in LARGEST)

    def kind(self) -> tuple[Any, ...]:
        """All that routes look at when they take a step or reject it: what is not of its rows."""
        return _KIND(self)

    def work(self, tokens_a_program: int, launches: float, partials: int = 0, *, appends: bool = False) -> Work:
        """The work of a route whose longest program reads so many tokens of a head and which leaves `partials`.

        `appends` says that its launches append a new token too.
        """
        heads_tokens = self.tokens * self.kv_heads
        return Work(
            kv_bytes=heads_tokens * self.token_bytes,
            parallel=max(heads_tokens, 1) / (max(tokens_a_program, 1) * self.processors),
            launches=launches + (self.fused and not appends),
            merge_bytes=2 * partials * self.q_len * self.group * (self.value_dim + 2) * 4,
        )


OF_THE_ROWS = ("rows", "tokens", "longest")
_KIND = operator.attrgetter(*(own.name for own in fields(StepShape) if own.name not in OF_THE_ROWS))


@dataclass
class Bounds:
    """What a step's queries attend to: they are at positions begin, ..., begin + q_len - 1 of rows from `starts` on."""

    starts: np.ndarray
    begin: int
    q_len: int
    horizon: int = 0
    """Launches must do for rows that end up to here, as a captured step's must; 0 for this step's own end."""
    mirrors: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    plans: dict[tuple, Any] = field(default_factory=dict)

    @property
    def end(self) -> int:
        return self.begin + self.q_len

    @property
    def decodes(self) -> bool:
        """Whether a route attends; to prompts and longer blocks torch does."""
        return self.begin > 0 and self.q_len <= MAX_DECODE_QUERIES

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

    def work(self, shape: StepShape) -> Work | None:
        """What a layer of an accepted step costs; None for a route that only steps in where no other serves."""
        ...

    def prepare(self, table: BlockTable, device: torch.device) -> None:
        """Makes what `decode` keeps for a table, so that a capture need not."""
        ...

    def append(self, layer: PagedLayer, k: torch.Tensor, v: torch.Tensor, bounds: Bounds) -> None:
        """Writes k and v `[rows, H_kv, q_len, D]`, each of its own D, to a layer's pages at the step's positions."""
        ...

    def rope_append(
        self, layer: PagedLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        cos: torch.Tensor | None, sin: torch.Tensor | None, bounds: Bounds,
        rotary: Rotary = WHOLE, norms: Norms | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """`append` with RoPE on q `[rows, H_q, q_len, D]` and on k before it; returns the rotated q.

        cos and sin are `[1 or rows, q_len, rotary.dim]`, in q's dtype or float32; None where nothing is turned.
        `norms`, where there are any, come before RoPE.
        """
        ...

    def rope_attend(
        self, layer: PagedLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        cos: torch.Tensor | None, sin: torch.Tensor | None, scores: Scores, bounds: Bounds,
        rotary: Rotary = WHOLE, norms: Norms | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """`rope_append`, then `decode` of the rotated q, in as few launches as the route has for both."""
        ...

    def decode(self, layer: PagedLayer, q: torch.Tensor, scores: Scores, bounds: Bounds) -> torch.Tensor:
        """Attention of q `[rows, H_q, q_len, D]` over a layer's pages, as `[rows, q_len, H_q, V's D]`."""
        ...


@functools.cache
def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
