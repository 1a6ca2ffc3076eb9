"""Greedy selection beside torch's: ties, infinities and NaN, ends of rows, and what the next step reads."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from pkv_hf.kernels import reference
from pkv_hf.kernels.checks.attention import DTYPES
from pkv_hf.kernels.reference import EndOfSequence, NextStep
from pkv_hf.kernels.select import BLOCK, select

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = torch.inf, torch.nan


def drawn(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits `[rows, 1, width]` of few values, so that most of a row's largest are equal, and of -0.0 beside 0.0."""
    logits = torch.randint(-5, 6, (rows, 1, width)).to(dtype) * torch.rand(rows, 1, 1).to(dtype)
    logits[1::4] = logits[1::4].clamp(max=0.0)  # zeros of both signs are the largest
    return logits.to(DEVICE)


def special(width: int) -> torch.Tensor:
    """Logits `[rows, 1, width]` whose largest are none, beyond all numbers, or equal at the ends of programs' parts."""
    logits = torch.randn(10, 1, width)
    edge = min(BLOCK, width - 1)
    logits[0, 0, 5::7], logits[1, 0, 3::5], logits[2] = INF, NAN, -INF
    logits[3], logits[4], logits[4, 0, -1] = NAN, -INF, -6e4
    logits[5, 0, [edge - 1, edge]], logits[6, 0, [0, -1]], logits[7, 0, [edge, -1]] = 9.0, 9.0, 9.0
    logits[8], logits[8, 0, 2], logits[9], logits[9, 0, 2:] = -0.0, 0.0, -3.0, -2.5
    logits[1, 0, 2], logits[1, 0, 4] = INF, -NAN
    return logits.to(DEVICE)


def state(rows: int, planes: tuple[int, ...]) -> tuple[torch.Tensor, NextStep]:
    newest = torch.stack([torch.full((rows,), -1), (torch.rand(rows) < 0.7).long()]).to(DEVICE)
    positions = torch.randint(2**33, (*planes, rows, 1), device=DEVICE)
    ends = torch.randint(1000, (rows,), dtype=torch.int32, device=DEVICE)
    return newest, NextStep(torch.zeros(rows, 1, dtype=torch.long, device=DEVICE), positions, ends)


def assert_same(logits: torch.Tensor, end: EndOfSequence | None, most: torch.Tensor | None, planes=()) -> torch.Tensor:
    """Two steps by the kernel, in the same scratch, leave what two by torch do; the last one's tokens."""
    newest, step = state(len(logits), planes)
    newest_, step_ = newest.clone(), NextStep(*(tensor.clone() for tensor in step))
    scratch = torch.zeros_like(newest)
    for logits_ in (logits, logits.flip(-1)):
        reference.select(logits_, newest, step, end, most)
        select(logits_, newest_, step_, end, most, scratch=scratch)
        for ours, theirs in zip((newest_, *step_), (newest, *step)):
            assert torch.equal(ours, theirs)
        assert not scratch.any()
    return newest_


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "planes", "count", "holds"),
    [(1, 5003, (), 1, True), (3, 2048, (3,), 0, False), (17, 1, (1,), 5, False), (80, 1030, (2, 2), 3, True)],
)
def test_tokens_are_those_of_torch(rows, width, planes, count, holds, dtype):
    logits, end, most = drawn(rows, width, dtype), None, None
    if count:
        tokens = logits[:count, -1].argmax(-1)  # some rows end, by tokens that also lie in other rows
        tokens = torch.cat([tokens, torch.full((count - len(tokens),), 10**6, device=DEVICE)])
        end = EndOfSequence(tokens, torch.tensor(1, device=DEVICE))
    if holds:
        most = torch.full((width,), INF, dtype=dtype, device=DEVICE)
        most[logits[: rows // 2 + 1, -1].argmax(-1)] = -INF
    assert_same(logits, end, most, planes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [40, 2 * BLOCK + 100])
def test_the_first_of_the_largest_is_taken_and_nan_is_larger(width, dtype):
    logits = special(width).to(dtype)
    held_off = torch.full((width,), INF, device=DEVICE)
    held_off[[0, 2, 3, 5, width - 1]] = -INF
    for most in (None, held_off.to(dtype)):
        tokens, _ = assert_same(logits, None, most)
    plain, _ = assert_same(logits.flip(-1), None, None)
    edge = min(BLOCK, width - 1)
    assert plain.tolist()[:9] == [5, 3, 0, 0, width - 1, edge - 1, 0, edge, 0]
    assert plain[9] == 2
    assert not torch.equal(plain, tokens)


def test_an_ended_row_stays_so_until_it_is_begun_anew():
    logits = torch.zeros(2, 1, 8, device=DEVICE)
    logits[:, :, 6] = 1.0
    end = EndOfSequence(torch.tensor([6, 2], device=DEVICE), torch.tensor(3, device=DEVICE))
    newest, step = state(2, ())
    newest[1] = torch.tensor([1, 0])
    scratch = torch.zeros_like(newest)
    for expected in ([[6, 3], [0, 0]], [[3, 3], [0, 0]]):
        select(logits, newest, step, end, scratch=scratch)
        assert newest.tolist() == expected


def test_what_the_kernel_cannot_take_is_named():
    logits, (newest, step) = torch.zeros(2, 1, 8, device=DEVICE), state(2, ())
    scratch = torch.zeros_like(newest)
    with pytest.raises(ValueError, match=r"logits is torch.float64: want one of"):
        select(logits.double(), newest, step, scratch=scratch)
    with pytest.raises(ValueError, match=r"ends is torch.int64 \[2\]: want contiguous torch.int32 \[2\]"):
        select(logits, newest, step._replace(ends=step.ends.long()), scratch=scratch)
    with pytest.raises(ValueError, match=r"most is \[7\]: want \[8\]"):
        select(logits, newest, step, most=torch.zeros(7, device=DEVICE), scratch=scratch)
