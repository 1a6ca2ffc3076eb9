"""Random cases for the decode kernels, and their error beside that of torch's own attention; for tests and scripts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from pkv_hf.kernels.quantize import LARGEST, dequantize, quantize
from pkv_hf.kernels.reference import paged_attention

GROUPS = (1, 3, 4, 5, 6, 7, 8, 16)
HEAD_DIMS = (64, 80, 96, 128, 256)
PAGE_SIZES = (16, 32, 64, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUTES = ("split", "workqueue")
JUDGED_PAIRS = 2048
"""Queries times tokens that an error in float32 is taken over: of few softmaxes, the ratio of two errors is chance."""
MAX_DRAWS = 64
POISONS = (float("nan"), float("inf"), float("-inf"))


def log_uniform(rng: np.random.Generator, most: int) -> int:
    """A size from 1 to `most`: small ones are as likely as large ones, by their logarithm."""
    return int(2 ** rng.uniform(0, np.log2(most)))


@dataclass(frozen=True)
class Case:
    """One decode step: row `b` holds tokens [starts[b], ends[b]) and its last q_len ones are queries."""

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    num_kv_heads: int
    group: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    q_len: int = 1
    window: int = 0
    parts: int | None = None
    """Splits of `split`, programs of `workqueue`; None for their own choice."""
    head_major: bool = True
    kv_dtype: torch.dtype | None = None
    """int8 or float8_e4m3fn for quantised pages, None for the queries' own."""
    poison: float = POISONS[0]
    """What slots that no row reads hold; of quantised pages their scales (the values are NaN where 8 bits have one)."""
    seed: int = 0


def random_case(rng: np.random.Generator, longest: int, dtype: torch.dtype | None = None) -> Case:
    """A case of the whole supported space, with rows of 1 to `longest` tokens."""
    usual = rng.random() < 0.5
    compiled = Case(
        starts=(),
        ends=(),
        num_kv_heads=0,
        group=int(rng.choice(GROUPS)) if usual else int(rng.integers(1, 17)),
        head_dim=int(rng.choice(HEAD_DIMS)) if usual else 16 * int(rng.integers(1, 17)),
        page_size=int(rng.choice(PAGE_SIZES)),
        dtype=dtype or DTYPES[int(rng.integers(len(DTYPES)))],
        q_len=int(rng.choice([1, 1, 1, 2, 5, 8])),
        kv_dtype=(None, None, None, *LARGEST)[int(rng.integers(3 + len(LARGEST)))],
    )
    return vary(compiled, rng, longest)


def vary(case: Case, rng: np.random.Generator, longest: int) -> Case:
    """Other rows, bounds, heads and pages for the kernels that a case compiles; page ends and single tokens among them.

    What is drawn anew compiles little: one split has a kernel of its own.
    """
    rows, page_size = int(rng.integers(1, 6)), case.page_size
    lengths = rng.integers(1, longest + 1, rows)
    kind = rng.integers(0, 4, rows)
    lengths = np.where(kind == 0, np.maximum(lengths // page_size * page_size, 1), lengths)  # exact page ends
    lengths = np.where(kind == 1, 1, lengths)
    ends = np.maximum(lengths + rng.integers(0, 2 * page_size, rows), case.q_len)
    starts = np.maximum(ends - np.maximum(lengths, 1), 0)
    return dataclasses.replace(
        case,
        starts=tuple(int(start) for start in starts),
        ends=tuple(int(end) for end in ends),
        num_kv_heads=int(rng.integers(1, 5)),
        window=int(rng.integers(1, longest + 1)) if rng.random() < 0.3 else 0,
        parts=int(rng.integers(1, 40)) if rng.random() < 0.5 else None,
        head_major=bool(rng.random() < 0.5),
        poison=POISONS[int(rng.integers(len(POISONS)))],
        seed=int(rng.integers(1 << 31)),
    )


@dataclass(frozen=True)
class Result:
    error: float
    """RMS error against float64 of the same inputs."""
    sdpa_error: float
    """The same of torch's `scaled_dot_product_attention` in the case's dtype."""
    rms: float
    """RMS of the float64 result."""
    written: bool
    """No output element kept the NaN that it held before."""

    @property
    def ratio(self) -> float:
        return self.error / self.sdpa_error if self.sdpa_error else (float("inf") if self.error else 0.0)


def build(case: Case, device: torch.device | str) -> dict[str, Any]:
    """Inputs of a case: pools full of poison but for the live tokens, page tables by a random permutation."""
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(case.seed)
    rows, page_size = len(case.ends), case.page_size
    width = -(-max(case.ends) // page_size)
    pages = 1 + rows * width
    shape = (case.num_kv_heads, pages, page_size, case.head_dim)
    permutation = torch.randperm(pages - 1, generator=generator, device=device).cpu()
    permutation = permutation.add(1).to(torch.int32).view(rows, width)
    table = torch.zeros_like(permutation)
    live = torch.zeros(pages * page_size, dtype=torch.bool)
    for row, (start, end) in enumerate(zip(case.starts, case.ends)):
        if case.window:
            start = max(start, end - case.q_len - case.window + 1)
        held = slice(start // page_size, -(-end // page_size))
        table[row, held] = permutation[row, held]
        positions = torch.arange(start, end)
        live[table[row, positions // page_size].long() * page_size + positions % page_size] = True
    pools, scales = [], []
    for _ in range(2):
        pool = torch.randn(shape, generator=generator, dtype=case.dtype, device=device)
        dead = ~live.to(device).view(pages, page_size)
        if case.kv_dtype is None:
            pool[:, dead] = case.poison
        else:
            pool, of_pool = quantize(pool, case.kv_dtype)
            pool.view(torch.uint8)[:, dead] = 0x7F  # NaN in float8
            of_pool[:, dead] = case.poison
            scales.append(of_pool.transpose(0, 1) if case.head_major else of_pool.transpose(0, 1).contiguous())
        pool = pool.transpose(0, 1)
        pools.append(pool if case.head_major else pool.contiguous())
    heads = case.num_kv_heads * case.group
    q = torch.randn((rows, case.q_len, heads, case.head_dim), generator=generator, device=device).to(case.dtype)
    bounds = [torch.tensor(values, dtype=torch.int32, device=device) for values in (case.starts, case.ends)]
    return {
        "q": q.transpose(1, 2),
        "k_pages": pools[0],
        "v_pages": pools[1],
        "block_table": table.to(device),
        "starts": bounds[0],
        "ends": bounds[1],
        **({"scales": tuple(scales)} if scales else {}),
    }


def run(case: Case, route: str, inputs: dict[str, Any], out: torch.Tensor) -> torch.Tensor:
    """A route's kernels on a case's inputs, into `out` `[rows, q_len, H_q, head_dim]`."""
    scale = case.head_dim**-0.5
    if route == "split":
        from pkv_hf.kernels.attention.split import decode_split

        longest = max(end - start for start, end in zip(case.starts, case.ends))
        return decode_split(**inputs, scale=scale, window=case.window, longest=longest, num_splits=case.parts, out=out)
    from pkv_hf.kernels.attention.workqueue import decode_workqueue

    return decode_workqueue(**inputs, scale=scale, window=case.window, programs=case.parts, out=out)


def measure(case: Case, route: str, device: torch.device | str) -> Result:
    """A route's error on a case, and that of torch's attention; see `measure_routes`."""
    return measure_routes(case, (route,), device)[route]


def measure_routes(
    case: Case, routes: Sequence[str], device: torch.device | str, draws: int | None = None
) -> dict[str, Result]:
    """Errors of several routes on a case, and those of torch's attention, on the same inputs.

    float32 cases too small to judge by one draw are drawn again, up to `JUDGED_PAIRS` or `MAX_DRAWS`, and their errors
    pooled: in the interpreter, one query over 2 to 20 random tokens at head_dim 256 had more than twice SDPA's error in
    24 % of single draws, since either error may happen to be small, and in 0.2 % of 64 pooled. The half types need one
    draw: their errors are mostly those of rounding the output, alike in both. `draws` sets the number outright.
    """
    lengths = [end - start for start, end in zip(case.starts, case.ends)]
    if case.window:
        lengths = [min(length, case.window) for length in lengths]
    pairs = sum(length for length in lengths if length > 1) * case.num_kv_heads * case.group * case.q_len
    if draws is None:
        draws = 1
        if case.dtype == torch.float32 and pairs:
            draws = min(-(-JUDGED_PAIRS // pairs), MAX_DRAWS)
    drawn = [_draw(dataclasses.replace(case, seed=case.seed + i), routes, device) for i in range(draws)]
    return {
        route: Result(
            error=_pooled([results[route].error for results in drawn]),
            sdpa_error=_pooled([results[route].sdpa_error for results in drawn]),
            rms=_pooled([results[route].rms for results in drawn]),
            written=all(results[route].written for results in drawn),
        )
        for route in routes
    }


def _pooled(values: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _draw(case: Case, routes: Sequence[str], device: torch.device | str) -> dict[str, Result]:
    inputs = build(case, device)
    q = inputs["q"]
    expected = reference(case, inputs)
    size, sdpa_error = rms(expected), rms(sdpa(case, inputs) - expected)
    results = {}
    for route in routes:
        out = torch.full((q.shape[0], q.shape[2], q.shape[1], q.shape[3]), float("nan"), dtype=q.dtype, device=device)
        with poisoned_scratch():
            run(case, route, inputs, out)
        results[route] = Result(rms(out - expected), sdpa_error, size, bool(torch.isfinite(out).all()))
    return results


@contextmanager
def poisoned_scratch() -> Iterator[None]:
    """In this block `torch.empty` comes filled with NaN and the largest integers (a mode that torch has for this)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def reference(case: Case, inputs: dict[str, Any]) -> torch.Tensor:
    """The judge's result, in float64."""
    scale = case.head_dim**-0.5
    return paged_attention(**{**inputs, "q": inputs["q"].double()}, scale=scale, window=case.window)


def sdpa(case: Case, inputs: dict[str, Any]) -> torch.Tensor:
    """torch's attention in the inputs' dtype, a row at a time over its live tokens gathered into dense K and V.

    The queries of a KV head's group are one block of queries, so that K and V are not repeated.
    """
    q, table = inputs["q"], inputs["block_table"]
    out = torch.zeros_like(q.transpose(1, 2))
    for row, (start, end) in enumerate(zip(case.starts, case.ends)):
        if case.window:
            start = max(start, end - case.q_len - case.window + 1)
        keys = torch.arange(start, end, device=q.device)
        pages, slots = table[row, keys // case.page_size].long(), keys % case.page_size
        k, v = (inputs[name][pages, :, slots] for name in ("k_pages", "v_pages"))
        if "scales" in inputs:
            k, v = (dequantize(x, s[pages, :, slots], q.dtype) for x, s in zip((k, v), inputs["scales"]))
        k, v = (x.transpose(0, 1)[None] for x in (k, v))
        positions = torch.arange(end - case.q_len, end, device=q.device)
        real = positions >= start
        mask = keys <= positions[real, None]
        if case.window:
            mask &= keys > positions[real, None] - case.window
        grouped = q[row, :, real].reshape(1, case.num_kv_heads, -1, case.head_dim)  # group by group, then by token
        theirs = functional.scaled_dot_product_attention(
            grouped, k, v, attn_mask=mask.repeat(case.group, 1), scale=case.head_dim**-0.5
        )
        out[row, real] = theirs.reshape(case.num_kv_heads * case.group, -1, case.head_dim).transpose(0, 1)
    return out
