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

from pkv_hf.kernels.launch import MOST_HEAD_DIM, next_power_of_2, padded_queries
from pkv_hf.kernels.quantize import LARGEST, dequantize, quantize
from pkv_hf.kernels.reference import first_seen, paged_attention

GROUPS = (1, 3, 4, 5, 6, 7, 8, 16)
HEAD_DIMS = (64, 80, 96, 128, 256, 512)
MOST_QUERIES = 128 * 256
"""Elements of a KV head's queries as they are padded: more leave no room for a tile."""
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
    chunked: bool = False
    """The window counts the tokens of chunks that rows are cut into."""
    value_dim: int = 0
    """V's head_dim where it is another, else 0."""
    softcap: float = 0.0
    sinks: torch.dtype | None = None
    parts: int | None = None
    """Splits of `split`, programs of `workqueue`; None for their own choice."""
    head_major: bool = True
    kv_dtype: torch.dtype | None = None
    """int8 or float8_e4m3fn for quantised pages, None for the queries' own."""
    poison: float = POISONS[0]
    """What slots that no row reads hold; of quantised pages their scales (the values are NaN where 8 bits have one)."""
    seed: int = 0

    @property
    def scores(self) -> dict[str, Any]:
        """What is done with scores, as the kernels and their judge are given it."""
        return {
            "scale": self.head_dim**-0.5,
            "window": self.window,
            "chunked": self.chunked,
            "softcap": self.softcap,
        }


def random_head_dim(rng: np.random.Generator) -> int:
    """One of the usual, or any that the kernels take."""
    return int(rng.choice(HEAD_DIMS)) if rng.random() < 0.5 else 16 * int(rng.integers(1, MOST_HEAD_DIM // 16 + 1))


def random_case(rng: np.random.Generator, longest: int, dtype: torch.dtype | None = None) -> Case:
    """A case of the whole supported space, with rows of 1 to `longest` tokens."""
    dtype = dtype or DTYPES[int(rng.integers(len(DTYPES)))]
    group = int(rng.choice(GROUPS)) if rng.random() < 0.5 else int(rng.integers(1, 17))
    head_dim, value_dim = random_head_dim(rng), random_head_dim(rng) if rng.random() < 0.2 else 0
    width = next_power_of_2(max(head_dim, value_dim))
    fitting = [q_len for q_len in (1, 1, 1, 2, 5, 8) if padded_queries(q_len * group) * width <= MOST_QUERIES]
    compiled = Case(
        starts=(),
        ends=(),
        num_kv_heads=0,
        group=group,
        head_dim=head_dim,
        page_size=int(rng.choice(PAGE_SIZES)),
        dtype=dtype,
        q_len=int(rng.choice(fitting)),
        kv_dtype=(None, None, None, *LARGEST)[int(rng.integers(3 + len(LARGEST)))],
        chunked=bool(rng.random() < 0.2),
        value_dim=value_dim,
        softcap=float(rng.choice([0.0, 0.0, 0.0, 1.5, 50.0])),
        sinks=(None, None, None, torch.float32, dtype)[int(rng.integers(5))],
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
        window=int(rng.integers(1, longest + 1)) if case.chunked or rng.random() < 0.3 else 0,
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
    shape = (case.num_kv_heads, pages, page_size)
    permutation = torch.randperm(pages - 1, generator=generator, device=device).cpu()
    permutation = permutation.add(1).to(torch.int32).view(rows, width)
    table = torch.zeros_like(permutation)
    live = torch.zeros(pages * page_size, dtype=torch.bool)
    for row, (start, end) in enumerate(zip(case.starts, case.ends)):
        start = first_seen(start, end - case.q_len, case.window, case.chunked)
        held = slice(start // page_size, -(-end // page_size))
        table[row, held] = permutation[row, held]
        positions = torch.arange(start, end)
        live[table[row, positions // page_size].long() * page_size + positions % page_size] = True
    pools, scales = [], []
    for head_dim in (case.head_dim, case.value_dim or case.head_dim):
        pool = torch.randn((*shape, head_dim), generator=generator, dtype=case.dtype, device=device)
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
    extra: dict[str, Any] = {"scales": tuple(scales)} if scales else {}
    if case.sinks is not None:
        extra["sinks"] = (2 * torch.randn(heads, generator=generator, device=device)).to(case.sinks)
    return {
        "q": q.transpose(1, 2),
        "k_pages": pools[0],
        "v_pages": pools[1],
        "block_table": table.to(device),
        "starts": bounds[0],
        "ends": bounds[1],
        **extra,
    }


def run(case: Case, route: str, inputs: dict[str, Any], out: torch.Tensor) -> torch.Tensor:
    """A route's kernels on a case's inputs, into `out` `[rows, q_len, H_q, value_dim]`."""
    if route == "split":
        from pkv_hf.kernels.attention.split import decode_split

        longest = max(end - start for start, end in zip(case.starts, case.ends))
        return decode_split(**inputs, **case.scores, longest=longest, num_splits=case.parts, out=out)
    from pkv_hf.kernels.attention.workqueue import decode_workqueue

    return decode_workqueue(**inputs, **case.scores, programs=case.parts, out=out)


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
        out = torch.full(expected.shape, float("nan"), dtype=q.dtype, device=device)
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
    return paged_attention(**{**inputs, "q": inputs["q"].double()}, **case.scores)


def sdpa(case: Case, inputs: dict[str, Any]) -> torch.Tensor:
    """torch's attention in the inputs' dtype, a row at a time over its live tokens gathered into dense K and V.

    The queries of a KV head's group are one block of queries, so that K and V are not repeated.
    """
    q, table = inputs["q"], inputs["block_table"]
    out = q.new_zeros(len(q), case.q_len, q.shape[1], inputs["v_pages"].shape[3])
    for row, (begin, end) in enumerate(zip(case.starts, case.ends)):
        start = first_seen(begin, end - case.q_len, case.window, case.chunked)
        keys = torch.arange(start, end, device=q.device)
        pages, slots = table[row, keys // case.page_size].long(), keys % case.page_size
        k, v = (inputs[name][pages, :, slots] for name in ("k_pages", "v_pages"))
        if "scales" in inputs:
            k, v = (dequantize(x, s[pages, :, slots], q.dtype) for x, s in zip((k, v), inputs["scales"]))
        k, v = (x.transpose(0, 1)[None] for x in (k, v))
        positions = torch.arange(end - case.q_len, end, device=q.device)
        real = positions >= start
        firsts = [first_seen(begin, position, case.window, case.chunked) for position in positions[real].tolist()]
        mask = (keys <= positions[real, None]) & (keys >= torch.tensor(firsts, device=q.device)[:, None])
        grouped = q[row, :, real].reshape(1, case.num_kv_heads, -1, case.head_dim)  # group by group, then by token
        mask = mask.repeat(case.group, 1)
        if case.softcap or "sinks" in inputs:
            theirs = _by_scores(case, grouped, k, v, mask, inputs.get("sinks"))
        else:
            theirs = functional.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=case.head_dim**-0.5)
        out[row, real] = theirs.reshape(case.num_kv_heads * case.group, -1, out.shape[3]).transpose(0, 1)
    return out


def _by_scores(
    case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor:
    """What SDPA does not do, rounded as its kernels round: scores in float32, weights in the inputs' dtype."""
    scores = (q.float() @ k.float().mT) * case.head_dim**-0.5
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        of_queries = sinks.float().view(case.num_kv_heads, case.group, 1).expand(-1, -1, q.shape[2] // case.group)
        scores = torch.cat([scores, of_queries.reshape(1, case.num_kv_heads, -1, 1)], dim=-1)
    return scores.softmax(dim=-1)[..., : k.shape[2]].to(q.dtype) @ v
