"""Random cases for attention with a new token: what `rope_append` does, and a decode step over the pages, in one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from pkv_hf.kernels.attention import split
from pkv_hf.kernels.attention.new_token import NewToken
from pkv_hf.kernels.checks import attention as check
from pkv_hf.kernels.checks.append import AppendCase, Roping, bits_of, drawn_states, pages_written, slots_of
from pkv_hf.kernels.checks.attention import Case, build, log_uniform, poisoned_scratch, random_case, rms, vary
from pkv_hf.kernels.checks.layers import Draw, Result
from pkv_hf.kernels.reference import first_seen


@dataclass(frozen=True)
class TokenCase(AppendCase):
    """An `AppendCase` of one token a row, with the attention of `Case` after it. Row `b` begins at starts[b]; rows that
    have no tokens begin where they end, and get none."""

    chunked: bool = False
    softcap: float = 0.0
    sinks: torch.dtype | None = None
    starts: tuple[int, ...] = ()
    window: int = 0
    parts: int | None = None
    poison: float = 0.0

    @classmethod
    def random(cls, rng: np.random.Generator, dtype: torch.dtype) -> TokenCase:
        drawn, scores = super().random(rng, dtype), random_case(rng, 1, dtype)
        norm, alike = bool(rng.random() < 0.5), ("group", "chunked", "softcap", "sinks")
        of_scores = {name: getattr(scores, name) for name in alike}
        return dataclasses.replace(drawn, roped=True, norm=norm, value_dim=0, **of_scores)  # type: ignore[return-value]

    def vary(self, rng: np.random.Generator, longest: int) -> TokenCase:
        """Few rows and heads, whose splits are tens of programs: kernels of other numbers are the same."""
        forms, drawn = super().vary(rng, longest), vary(self.attention, rng, log_uniform(rng, longest))
        parts = None if drawn.parts is None else 1 + drawn.parts // 4
        ends = drawn.ends[:3]
        starts = [end if rng.random() < 0.1 else start for start, end in zip(drawn.starts, ends)]
        first_held = []
        for start, end in zip(starts, ends):
            seen = first_seen(start, end - 1, drawn.window, self.chunked)
            first_held.append((seen + (start == end) * (self.page_size - 1)) // self.page_size * self.page_size)
        return dataclasses.replace(  # type: ignore[return-value]
            forms, starts=tuple(starts), ends=ends, first_held=tuple(first_held), q_len=1, group=self.group,
            num_kv_heads=min(drawn.num_kv_heads, 2), head_major=drawn.head_major, window=drawn.window, parts=parts,
            poison=drawn.poison,
        )  # fmt: skip

    @property
    def attention(self) -> Case:
        """What is attended to, with the new token where it has its place."""
        shared = {own.name for own in dataclasses.fields(Case)} & {own.name for own in dataclasses.fields(TokenCase)}
        return Case(**{name: getattr(self, name) for name in shared})


def check_token(case: TokenCase, device: torch.device | str) -> dict[str, Result]:
    """The results of `decode_split` with a new token: its output, and pages as `pages_written` has them."""
    draw = Draw(case.seed, case.dtype, case.aligned, device)
    q, k, v = drawn_states(case, draw, spread=0.0)
    roping, inputs = Roping(case, draw, q, k), build(case.attention, device)
    pools, scales, table = [inputs["k_pages"], inputs["v_pages"]], inputs.get("scales", ()), inputs["block_table"]
    _, _, page, slot = slots_of(case, table)
    for pool in pools:
        bits_of(pool)[page, :, slot] = bits_of(torch.full((), case.poison, dtype=case.dtype)) if not scales else 0x7F
    for of_pool in scales:
        of_pool[page, :, slot] = case.poison
    before = [bits_of(tensor).clone() for tensor in (*pools, *scales)]
    first_held = torch.tensor(case.first_held, dtype=torch.int32, device=device)
    new = NewToken(k, v, *roping.angles, first_held, **roping.settings)
    out = torch.full((len(q), 1, q.shape[1], case.head_dim), float("nan"), dtype=case.dtype, device=device)
    longest = max(end - start for start, end in zip(case.starts, case.ends))
    settings = {**case.attention.scores, "longest": longest, "num_splits": case.parts, "out": out, "new": new}
    with poisoned_scratch():
        split.decode_split(**{**inputs, "q": q}, **settings)
    (rotated_q, rotated_k), (exact_q, exact_k) = roping(q, k, case.dtype), roping(q, k, torch.float64)
    expected = check.reference(case.attention, {**inputs, "q": exact_q})  # by which q's own rounding counts for both
    inputs["q"] = rotated_q
    error, torch_error = (rms(attended - expected) for attended in (out, check.sdpa(case.attention, inputs)))
    least = rms(expected) * torch.finfo(case.dtype).eps / 2  # of few tokens torch's own error may be nearly none
    result = Result(error, max(torch_error, least), 0.0, 0.0, bool(torch.isfinite(out).all()))
    return {"out": result, **pages_written(case, pools, scales, table, before, rotated_k, v, exact_k)}
