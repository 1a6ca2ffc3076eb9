"""Experts by the kernels: what fuzzing may not draw, and what launches take. Random cases are tests/kernels' own."""

from __future__ import annotations

import dataclasses
import secrets

import pytest
import torch

pytest.importorskip("triton")

from pkv_hf.kernels.checks.attention import poisoned_scratch, rms
from pkv_hf.kernels.checks.experts import ExpertsCase, check_experts
from pkv_hf.kernels.checks.layers import Draw
from pkv_hf.kernels.experts import experts as module
from pkv_hf.kernels.experts import reference
from pkv_hf.kernels.experts.blocks import Block, choose_block, padded
from pkv_hf.kernels.experts.experts import experts
from pkv_hf.kernels.experts.reference import Form

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SILU = Form(False, "halves", "silu")
GPT_OSS = Form(True, "interleaved", "silu", limit=7.0, alpha=1.702, shift=1.0)
CASE = ExpertsCase(
    torch.bfloat16, one_row=False, choices=2, form=SILU, bias=False, rows=5, count=6, hidden=56, width=24, seed=0
)


def case(**changed) -> ExpertsCase:
    return dataclasses.replace(CASE, seed=secrets.randbits(31), **changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": 80, "count": 128, "choices": 8},
        {"rows": 80, "count": 3, "choices": 1, "crowded": True},
        {"rows": 1, "count": 128, "choices": 8},
        {"rows": 1, "count": 1, "choices": 1, "hidden": 9, "width": 1},
        {"rows": 33, "form": GPT_OSS, "bias": True, "scale": 8.0},
        {"rows": 1, "form": GPT_OSS, "bias": True, "scale": 8.0, "count": 32, "choices": 4},
        {"rows": 2, "hidden": 600, "width": 520, "count": 2},
        {"rows": 1, "hidden": 600, "width": 520, "count": 2},
        {"rows": 17, "form": Form(False, "plain", "relu2"), "weights_dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_sizes_at_the_ends(changed):
    result = check_experts(case(**changed), DEVICE)["out"]
    assert result.written
    assert result.ratio <= 2


@pytest.mark.parametrize("form", [SILU, GPT_OSS], ids=["as they are", "transposed"])
@pytest.mark.parametrize("rows", [1, 3])
def test_numbers_of_no_expert_count_as_nothing_and_equal_choices_twice(rows, form):
    of_case = case(rows=rows, form=form, choices=4, bias=True, dtype=torch.float32)
    draw = Draw(of_case.seed, torch.float32, True, DEVICE)
    of, x = of_case.stacked(draw), draw(rows, of_case.hidden)
    index = torch.tensor([[2, -1, 2, 2 + 2**33]] * rows, device=DEVICE)
    weights = torch.tensor([[0.5, float("nan"), 0.25, float("inf")]] * rows, device=DEVICE)
    with poisoned_scratch():
        ours = experts(x, index, weights, of)
    exact = reference.experts(x.double(), index[:, :1], torch.full_like(weights[:, :1], 0.75), of)
    assert rms(ours - exact) <= 1e-6 * rms(exact)


def test_a_row_does_not_depend_on_what_others_choose():
    of_case = case(rows=9, choices=3)
    draw = Draw(of_case.seed, of_case.dtype, True, DEVICE)
    of, x, (index, weights) = of_case.stacked(draw), draw(9, of_case.hidden), of_case.chosen(draw)
    alone = experts(x, index, weights, of)
    assert torch.equal(experts(x, index, weights, of), alone)  # sums have one order
    x[4:], index[4:] = float("nan"), index[0, 0]
    assert torch.equal(experts(x, index, weights, of)[:4], alone[:4])


@pytest.mark.parametrize("rows", [1, 20])
def test_nan_in_gates_and_ups_is_not_clamped_away(rows):
    of_case = case(rows=rows, form=GPT_OSS, count=2, dtype=torch.float32)
    draw = Draw(of_case.seed, torch.float32, True, DEVICE)
    of, x = of_case.stacked(draw), draw(rows, of_case.hidden)
    index, weights = torch.zeros(rows, 1, dtype=torch.long, device=DEVICE), torch.ones(rows, 1, device=DEVICE)
    for column in (0, 1):  # a gate, then an up
        of.up[0, :, column] = float("nan")
        assert torch.isnan(experts(x, index, weights, of)).all()
        of.up[0, :, column] = 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(81, 56)}, "x is torch.float32"),
        ({"x": torch.zeros(81, 56, dtype=torch.bfloat16)}, "1 to 80"),
        ({"index": torch.zeros(5, 2)}, "index is torch.float32"),
        ({"weights": torch.zeros(5, 3)}, r"weights are torch.float32 \[5, 3\]"),
        ({"form": SILU._replace(activation="mish")}, "activation='mish' is not one of silu"),
        ({"form": SILU._replace(layout="thirds")}, "layout='thirds' is not one of halves"),
        ({"form": SILU._replace(alpha=2.0, activation="gelu")}, "alpha=2.0 with activation='gelu'"),
        ({"form": SILU._replace(layout="plain")}, r"up is torch.bfloat16 \[6, 48, 56\]: want .* \[6, 24, 56\]"),
        ({"up_bias": torch.zeros(6, 24, dtype=torch.bfloat16)}, "up_bias is torch.bfloat16"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_bad_arguments_are_named(change, named):
    draw = Draw(0, torch.bfloat16, True, "cpu")
    of = CASE.stacked(draw)
    of = of._replace(**{name: value for name, value in change.items() if name in of._fields})
    call = {"x": draw(5, 56), "index": torch.zeros(5, 2, dtype=torch.long), "weights": torch.zeros(5, 2)}
    call |= {name: value for name, value in change.items() if name in call}
    with pytest.raises(ValueError, match=named):
        experts(**call, of=of)


def test_any_blocks_give_the_same():
    of_case = case(rows=6, hidden=120, width=72, choices=3)
    draw = Draw(of_case.seed, of_case.dtype, True, DEVICE)
    of, x, (index, weights) = of_case.stacked(draw), draw(6, 120), of_case.chosen(draw)
    given = experts(x, index, weights, of, (Block(32, 32, 2), Block(128, 16, 2)))
    torch.testing.assert_close(given, experts(x, index, weights, of), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("shared_kib", [99, 163, 227])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 48, 80])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_fit_shared_memory(transposed, itemsize, rows, shared_kib):
    for inputs, outputs in ((2048, 1536), (2880, 5760), (40, 3)):
        block = choose_block(rows, inputs, outputs, transposed, itemsize, shared_kib * 1024)
        assert block.shared_memory(rows, itemsize) <= shared_kib * 1024
        assert padded(rows) >= rows
        if rows > 1:
            assert min(block.outputs, block.inputs) >= 16


def test_rows_by_capability(monkeypatch):
    for major, most in ((7, 1), (8, 80), (9, 80), (12, 80)):
        monkeypatch.setattr(module, "capability", lambda _, major=major: (major, 0))
        assert module.most_rows(torch.device(DEVICE)) == most
