"""Random cases for append, RoPE, linear layers, norms and SwiGLU, as scripts/soak.py runs them, and what they catch."""

from __future__ import annotations

import dataclasses
import secrets

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from pkv_hf.kernels import append, elementwise, linear
from pkv_hf.kernels.attention import split
from pkv_hf.kernels.checks import attention as check
from pkv_hf.kernels.checks.append import AppendCase
from pkv_hf.kernels.checks.fuzz import BOUND
from pkv_hf.kernels.checks.fuzz_layers import DTYPES, batches, judge
from pkv_hf.kernels.checks.layers import ElementwiseCase, LinearCase, beside
from pkv_hf.kernels.checks.new_token import TokenCase
from pkv_hf.kernels.checks.quantized import Linear4Case
from pkv_hf.kernels.quantized import linear4

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = [(kind, dtype) for kind, dtypes in DTYPES.items() for dtype in dtypes]


@pytest.mark.parametrize(("kind", "dtype"), KINDS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_random_cases(kind, dtype):
    seed = secrets.randbits(32)
    rng = np.random.default_rng(seed)
    for _ in range(3):
        first = kind.random(rng, dtype)
        for _ in range(3):
            outcome = judge(first.vary(rng, longest=600), DEVICE)
            assert not outcome.failed, (seed, outcome)


def test_batches_share_what_is_compiled_and_go_through_all_kernels():
    made = batches(np.random.default_rng(secrets.randbits(32)), 50, 3, longest=100)
    assert [len(cases) for cases in made] == [3] * 16 + [2]
    assert [(type(cases[0]), cases[0].dtype) for cases in made[: len(KINDS)]] == KINDS
    for cases in made:
        fixed = {"dtype", "head_dim", "page_size", "kv_dtype", "roped", "gated", "bias", "norm", "residual", "offset"}
        fixed |= {"rotary", "interleaved", "paired_angles", "wide_angles", "operation", "activation", "multiplier"}
        fixed |= {"quant_type", "packing", "scaled", "block", "form", "held", "scales_of", "unit"}
        fixed |= {"whole", "lora_dtype"} | ({"parts"} if not isinstance(cases[0], TokenCase) else set())
        assert len({tuple(getattr(case, name, None) for name in fixed) for case in cases}) == 1
        assert len({case.seed for case in cases}) == len(cases)


def broken(kernel, place):
    """A kernel with one element of its output, or of the pages, off by 1 or left unwritten."""

    def wrong(*args, **kwargs):
        out = kernel(*args, **kwargs)
        changed = args[0] if place == "page" else out[0] if isinstance(out, tuple) else out
        if place == "page":
            changed[0, 0, 0, 0] = 0
        elif place == "unwritten":
            changed.view(-1)[-1] = float("nan")
        else:
            changed.view(-1)[-1] += 1
        return out

    return wrong


APPEND = AppendCase(
    torch.bfloat16, head_dim=80, page_size=16, kv_dtype=None, roped=False, norm=False, ends=(40, 7), first_held=(0, 0)
)
ROPED = dataclasses.replace(APPEND, roped=True)
TOKEN = TokenCase(**{**vars(ROPED), "norm": True}, starts=(3, 0), parts=3)
LINEAR = LinearCase(
    torch.bfloat16, rows=16, outputs=(700,), gated=False, bias=True, norm=False, residual=True, inputs=64
)
GATED = LinearCase(
    torch.float16,
    rows=1,
    outputs=(90, 90),
    gated=True,
    bias=True,
    norm=True,
    residual=False,
    activation="gelu_tanh",
    offset=1.0,
    inputs=50,
)
LINEAR4 = Linear4Case(
    torch.bfloat16,
    rows=1,
    outputs=(90,),
    gated=False,
    bias=True,
    norm=True,
    residual=True,
    quant_type="nf4",
    packing="bytes",
    scaled="nested",
    block=64,
    inputs=192,
)
NORM = ElementwiseCase(torch.float32, "rms_norm", residual=True, rows=9, width=300)
CENTERED = ElementwiseCase(torch.bfloat16, "layer_norm", bias=True, rows=9, width=300)
BOTH = ElementwiseCase(torch.bfloat16, "add_norms", offset=1.0, after=True, before=True, rows=9, width=300)
PARTS = dataclasses.replace(BOTH, after=False, parts=3, bias=True)
ACT = ElementwiseCase(torch.bfloat16, "act", activation="relu2", rows=3, width=500)
SILU = ElementwiseCase(torch.bfloat16, "act_mul", strided=True, rows=3, width=500)


@pytest.mark.parametrize(
    ("case", "module", "kernel", "place", "failed"),
    [
        (APPEND, append, "append", "page", "elsewhere"),
        (ROPED, append, "rope_append", "page", "elsewhere"),
        (ROPED, append, "rope_append", "last", "q"),
        (dataclasses.replace(ROPED, norm=True), append, "rope_append", "last", "q"),
        *[(TOKEN, split, "decode_split", place, "out") for place in ("last", "unwritten")],
        *[(LINEAR, linear, "linear", place, "out") for place in ("last", "unwritten")],
        *[(LINEAR4, linear4, "linear4", place, "out") for place in ("last", "unwritten")],
        (dataclasses.replace(ROPED, rotary=32, interleaved=True, offset=1.0), append, "rope_append", "last", "q"),
        (GATED, linear, "gated", "last", "out"),
        (dataclasses.replace(ROPED, norm=True, whole=True), append, "rope_append", "last", "q"),
        *[(NORM, elementwise, "rms_norm", place, "out") for place in ("last", "unwritten")],
        (CENTERED, elementwise, "layer_norm", "last", "out"),
        (BOTH, elementwise, "add_norms", "last", "sum"),
        (PARTS, elementwise, "add_norms", "last", "sum"),
        (ACT, elementwise, "act", "last", "out"),
        (SILU, elementwise, "act_mul", "last", "out"),
    ],
)
def test_one_wrong_element_is_caught(case, module, kernel, place, failed, monkeypatch):
    monkeypatch.setattr(check, "MAX_DRAWS", 2)
    case = dataclasses.replace(case, seed=secrets.randbits(31))
    assert judge(case, DEVICE).failed == []
    monkeypatch.setattr(module, kernel, broken(getattr(module, kernel), place))
    assert judge(case, DEVICE).failed == [failed]


@pytest.mark.parametrize("kv_dtype", [None, torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_token_that_is_not_written_is_caught(kv_dtype, monkeypatch):
    case = dataclasses.replace(APPEND, kv_dtype=kv_dtype, q_len=3, seed=secrets.randbits(31))
    right = append.append

    def all_but_the_last(k_pages, v_pages, k, v, table, first_held, ends, scales=None):
        right(k_pages, v_pages, k[:, :, :-1], v[:, :, :-1], table, first_held, ends - 1, scales)

    monkeypatch.setattr(append, "append", all_but_the_last)
    outcome = judge(case, DEVICE)
    assert outcome.failed == ["k", "v"]
    assert not outcome.redrawn  # equality is no chance


def test_one_wrong_element_among_millions_is_caught():
    exact = torch.randn(1 << 22, dtype=torch.float64)
    theirs = exact.to(torch.bfloat16)
    ours = theirs.clone()
    ours[-1] += 3
    result = beside(ours, theirs, exact)
    assert result.error < BOUND * result.torch_error
    assert result.ratio > BOUND
