"""Attention with a new token in its launch: each form that its k and q may have, and rows that get none."""

from __future__ import annotations

import dataclasses
import secrets

import pytest
import torch

pytest.importorskip("triton")

from pkv_hf.kernels.attention.new_token import NewToken
from pkv_hf.kernels.attention.split import decode_split
from pkv_hf.kernels.checks.fuzz_layers import judge
from pkv_hf.kernels.checks.new_token import TokenCase

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASE = TokenCase(
    torch.float16, head_dim=64, page_size=16, kv_dtype=None, roped=True, norm=True, starts=(5, 0, 20), ends=(6, 64, 83),
    first_held=(0, 0, 16), num_kv_heads=2, group=4, parts=3, poison=float("nan"),
)  # fmt: skip
FORMS: dict[str, dict] = {
    "more splits than tiles": {"parts": 9},
    "one split, interleaved": {"parts": 1, "interleaved": True, "angles_by_row": True, "offset": 1.0},
    "partial, angles in pairs": {"rotary": 24, "paired_angles": True, "wide_angles": True, "layout": "together"},
    "interleaved, angles in pairs": {"rotary": 40, "head_dim": 80, "interleaved": True, "paired_angles": True},
    "all heads normed together": {"whole": True, "group": 16, "layout": "mixed"},
    "nothing turned": {"rotary": 0, "dtype": torch.bfloat16, "norm": False, "group": 1},
    "large float32 heads": {"dtype": torch.float32, "head_dim": 272, "rotary": 200, "group": 3},
    "int8": {"kv_dtype": torch.int8, "dtype": torch.bfloat16, "head_dim": 48, "poison": float("inf")},
    "float8": {"kv_dtype": torch.float8_e4m3fn, "dtype": torch.float32, "parts": None, "norm": False},
    "window": {"window": 17, "softcap": 1.5, "sinks": torch.float32, "first_held": (0, 32, 64)},
    "chunks": {"window": 30, "chunked": True, "head_major": False, "first_held": (0, 48, 80)},
    "rows without tokens": {"parts": 1, "starts": (6, 64, 0), "first_held": (16, 64, 0), "ends": (6, 64, 1)},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_new_token_is_appended_and_attended_to(form):
    outcome = judge(dataclasses.replace(CASE, seed=secrets.randbits(31), **FORMS[form]), DEVICE)
    assert not outcome.failed, outcome


@pytest.mark.parametrize(
    ("q_len", "change", "named"),
    [
        (2, {}, "new is one token a row, q has 2"),
        (1, {"k": torch.zeros(2, 2, 1, 64)}, r"k is \[2, 2, 1, 64\]"),
        (1, {"first_held": torch.zeros(3)}, "first_held is torch.float32"),
        (1, {"sin": None}, "sin is None"),
    ],
)
def test_bad_tokens_are_named(q_len, change, named):
    pages = [torch.zeros(9, 2, 16, 64) for _ in range(2)]
    table, ends = torch.zeros(3, 3, dtype=torch.int32), torch.full((3,), 20, dtype=torch.int32)
    states = [torch.zeros(3, 2, q_len, 64) for _ in range(2)]
    angles = [torch.zeros(1, q_len, 64) for _ in range(2)]
    new = NewToken(*states, *angles, torch.zeros(3, dtype=torch.int32))._replace(**change)
    with pytest.raises(ValueError, match=named):
        decode_split(torch.zeros(3, 8, q_len, 64), *pages, table, ends, ends, scale=1.0, longest=20, new=new)
    assert not any(pool.any() for pool in pages)
