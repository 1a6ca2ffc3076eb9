"""Random cases for the kernels that write new K and V into pages, with and without RoPE, and how far they are right."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pkv_hf.kernels import append as kernels
from pkv_hf.kernels.checks.attention import PAGE_SIZES, log_uniform, poisoned_scratch, random_head_dim
from pkv_hf.kernels.checks.layers import EPS, OFFSETS, Draw, Result, beside, same
from pkv_hf.kernels.quantize import LARGEST, dequantize, quantize
from pkv_hf.kernels.reference import rms_norm, rotate

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Integers of an element's size: NaN compares there, and float8, which torch does not index, is indexed."""


@dataclass(frozen=True)
class AppendCase:
    """Row `b` gets its q_len tokens before ends[b], but those before first_held[b], which is where a page begins."""

    dtype: torch.dtype
    head_dim: int
    page_size: int
    kv_dtype: torch.dtype | None
    """int8 or float8_e4m3fn for quantised pages, None for the states' own."""
    roped: bool
    norm: bool
    whole: bool = False
    """Whether norms are of all heads together."""
    rotary: int | None = None
    interleaved: bool = False
    paired_angles: bool = False
    wide_angles: bool = False
    """Whether cos and sin are float32."""
    offset: float = 0.0
    value_dim: int = 0
    """V's head_dim where it is another, else 0; never with RoPE."""
    ends: tuple[int, ...] = ()
    first_held: tuple[int, ...] = ()
    q_len: int = 1
    num_kv_heads: int = 1
    group: int = 1
    head_major: bool = True
    layout: str = "heads"
    """What is outermost in a row of q, k and v: `heads`, `tokens`, heads of v alone (`mixed`), tokens of all `together`
    in one tensor."""
    angles_by_row: bool = False
    eps: float = EPS[0]
    aligned: bool = True
    seed: int = 0

    @classmethod
    def random(cls, rng: np.random.Generator, dtype: torch.dtype) -> AppendCase:
        """What is compiled for a case of the supported space; `vary` draws its rows."""
        roped, head_dim = bool(rng.random() < 0.6), random_head_dim(rng)
        return cls(
            dtype,
            head_dim=head_dim,
            page_size=int(rng.choice(PAGE_SIZES)),
            kv_dtype=(None, None, *LARGEST)[int(rng.integers(2 + len(LARGEST)))],
            roped=roped,
            norm=roped and bool(rng.random() < 0.4),
            whole=bool(rng.random() < 0.4),
            rotary=(None, None, 0, 2 * int(rng.integers(1, head_dim // 2)))[int(rng.integers(4))],
            interleaved=bool(rng.random() < 0.4),
            paired_angles=bool(rng.random() < 0.4),
            wide_angles=bool(rng.random() < 0.3),
            offset=float(rng.choice(OFFSETS)),
            value_dim=0 if roped or rng.random() < 0.5 else random_head_dim(rng),
        )

    def vary(self, rng: np.random.Generator, longest: int) -> AppendCase:
        """Rows of up to `longest` tokens; some with padding or behind a window, up to all of what they would get."""
        rows, page = int(rng.integers(1, 6)), self.page_size
        q_len = 1 if rng.random() < 0.4 else log_uniform(rng, max(8, longest // 256))
        ends = [q_len - 1 + log_uniform(rng, longest) for _ in range(rows)]
        ends = [end if rng.random() < 0.7 else max(end // page * page, q_len) for end in ends]
        near = [max(end - int(rng.integers(0, q_len + page)), 0) for end in ends]
        first_held = [page * -(-first // page) if rng.random() < 0.5 else 0 for first in near]
        return dataclasses.replace(
            self,
            ends=tuple(ends),
            first_held=tuple(first_held),
            q_len=q_len,
            num_kv_heads=int(rng.integers(1, 6)),
            group=int(rng.integers(1, 9)),
            head_major=bool(rng.random() < 0.5),
            layout=str(rng.choice(["heads", "tokens", "mixed", "together"])),
            angles_by_row=bool(rng.random() < 0.5),
            eps=float(rng.choice(EPS)),
            aligned=bool(rng.random() < 0.7),
            seed=int(rng.integers(1 << 31)),
        )


def check_append(case: AppendCase, device: torch.device | str) -> dict[str, Result]:
    """The results of `append`, or of `rope_append`: what new slots hold, queries, and all memory beside the slots."""
    draw = Draw(case.seed, case.dtype, case.aligned, device)
    q, k, v = drawn_states(case, draw)
    pools, scales, table = _memory(case, draw)
    before = [bits_of(tensor).clone() for tensor in (*pools, *scales)]
    bounds = [torch.tensor(values, dtype=torch.int32, device=device) for values in (case.first_held, case.ends)]
    settings: dict[str, Any] = {"scales": tuple(scales)} if scales else {}
    results, exact_k = {}, None
    if case.roped:
        roping = Roping(case, draw, q, k)
        with poisoned_scratch():
            rotated_q = kernels.rope_append(
                *pools, q, k, v, *roping.angles, table, *bounds, **settings, **roping.settings
            )
        (q, k), (exact_q, exact_k) = roping(q, k, case.dtype), roping(q, k, torch.float64)
        results["q"] = beside(rotated_q, q, exact_q) if case.norm else same(rotated_q, q)
    else:
        kernels.append(*pools, k, v, table, *bounds, **settings)
    return {**results, **pages_written(case, pools, scales, table, before, k, v, exact_k)}


class Roping:
    """What becomes of a case's q and k before they are appended, by arguments of `rope_append` and by the reference."""

    def __init__(self, case: AppendCase, draw: Draw, q: torch.Tensor, k: torch.Tensor) -> None:
        self.case = case
        self.pairing = {name: getattr(case, name) for name in ("rotary", "interleaved", "paired_angles")}
        shape = len(k) if case.angles_by_row else 1, case.q_len, case.head_dim if case.rotary is None else case.rotary
        self.angles = [draw(*shape, dtype=torch.float32 if case.wide_angles else case.dtype) for _ in range(2)]
        self.weights = [draw((x.shape[1] if case.whole else 1) * case.head_dim) for x in (q, k)] if case.norm else []

    @property
    def settings(self) -> dict[str, Any]:
        norms = (*self.weights, self.case.eps, self.case.offset) if self.weights else None
        return {"norms": norms, **self.pairing}

    def __call__(self, q: torch.Tensor, k: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        states = [x.to(dtype) for x in (q, k)]
        if self.weights:
            states = [_normed(self.case, x, weight.to(dtype)) for x, weight in zip(states, self.weights)]
        wide = torch.promote_types(dtype, self.angles[0].dtype)
        return [rotate(x, *(angle.to(wide) for angle in self.angles), **self.pairing) for x in states]


def pages_written(
    case: AppendCase, pools: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], table: torch.Tensor,
    before: Sequence[torch.Tensor], k: torch.Tensor, v: torch.Tensor, exact_k: torch.Tensor | None,
) -> dict[str, Result]:  # fmt: skip
    """The results of pages that were to get k and v: slots, and all memory beside them, whose bits were `before`."""
    row, t, page, slot = slots_of(case, table)
    results = {}
    for name, states, pool, of_pool in zip("kv", (k, v), pools, scales or (None, None)):
        ours, theirs = bits_of(pool)[page, :, slot].view(pool.dtype), states[row, :, t]
        if of_pool is not None:
            ours = dequantize(ours, of_pool[page, :, slot], torch.float64)
            theirs = dequantize(*quantize(theirs, pool.dtype), torch.float64)
        normed_k = case.norm and name == "k" and exact_k is not None
        results[name] = beside(ours, theirs, exact_k[row, :, t]) if normed_k else same(ours, theirs)
    untouched = []
    for tensor, bits in zip((*pools, *scales), before):
        now = bits_of(tensor).clone()
        now[page, :, slot] = bits[page, :, slot]
        untouched.append(same(now, bits))
    return {**results, "elsewhere": max(untouched, key=lambda result: result.error)}


def _normed(case: AppendCase, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if not case.whole:
        return rms_norm(x, weight, case.eps, case.offset)
    together = x.transpose(1, 2)
    return rms_norm(together.flatten(2), weight, case.eps, case.offset).view(together.shape).transpose(1, 2)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(BITS[tensor.itemsize])


def drawn_states(case: AppendCase, draw: Draw, spread: float = 4.0) -> list[torch.Tensor]:
    """q, k and v `[rows, heads, q_len, head_dim]` in the case's layout, vectors of `spread` magnitudes, some 0."""
    rows, heads = len(case.ends), [case.num_kv_heads * case.group, case.num_kv_heads, case.num_kv_heads]
    dims = [case.head_dim, case.head_dim, case.value_dim or case.head_dim]

    def drawn(*shape: int) -> torch.Tensor:
        sizes = torch.rand((rows, *shape[:-1], 1), generator=draw.generator, device=draw.generator.device)
        scale = torch.where(sizes < 0.05, 0.0, 10 ** (spread * (sizes - 0.5)))
        return draw(rows, *shape, scale=scale)

    if case.layout == "together":
        states = drawn(case.q_len, sum(heads), max(dims)).transpose(1, 2).split(heads, dim=1)
        return [state[..., :dim] for state, dim in zip(states, dims)]
    by_heads = {"heads": (True, True, True), "tokens": (False, False, False), "mixed": (False, False, True)}
    return [
        drawn(count, case.q_len, dim) if whole else drawn(case.q_len, count, dim).transpose(1, 2)
        for count, whole, dim in zip(heads, by_heads[case.layout], dims)
    ]


def _memory(case: AppendCase, draw: Draw) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """K and V pages of NaN, their scales if they are quantised, and a table of pages in random order."""
    device, rows = draw.generator.device, len(case.ends)
    width = 1 + max(*case.first_held, *case.ends) // case.page_size
    pages = 2 + rows * width  # the null page, and one that no row has
    order = 1 + torch.randperm(pages - 1, generator=draw.generator, device=device)[: rows * width]
    column = case.page_size * torch.arange(width, device=device)
    first, end = (torch.tensor(bounds, device=device)[:, None] for bounds in (case.first_held, case.ends))
    held = (column >= first) & (column < end)
    table = torch.where(held, order.view(rows, width), 0).to(torch.int32)
    shape = (case.num_kv_heads, pages) if case.head_major else (pages, case.num_kv_heads)
    page = (*shape, case.page_size)
    pools = []
    for head_dim in (case.head_dim, case.value_dim or case.head_dim):
        filled = torch.full((*page, head_dim), float("nan"), dtype=case.dtype, device=device)
        if case.kv_dtype:
            filled = torch.full(filled.shape, 0x7F, dtype=torch.uint8, device=device).view(
                case.kv_dtype
            )  # NaN if it has
        pools.append(filled)
    scales = [torch.full(page, float("nan"), device=device) for _ in pools] if case.kv_dtype else []
    if case.head_major:
        pools, scales = ([tensor.transpose(0, 1) for tensor in tensors] for tensors in (pools, scales))
    return pools, scales, table


def slots_of(case: AppendCase, table: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Row, token, page and slot of every vector that a head gets."""
    rows, tokens = torch.meshgrid(torch.arange(len(case.ends)), torch.arange(case.q_len), indexing="ij")
    positions = torch.tensor(case.ends)[:, None] - case.q_len + tokens
    kept = positions >= torch.tensor(case.first_held)[:, None]
    row, t, position = (index[kept].to(table.device) for index in (rows, tokens, positions))
    return row, t, table[row, position // case.page_size].long(), position % case.page_size
