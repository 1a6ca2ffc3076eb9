"""Kernels that write new K and V into pages, with RoPE and norms on the way, to the bit of transformers' own."""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton")

from pkv_hf.kernels.append import append, rope_append
from pkv_hf.kernels.checks.attention import DTYPES, poisoned_scratch
from pkv_hf.kernels.quantize import LARGEST, dequantize, quantize
from pkv_hf.kernels.queries import rope
from pkv_hf.kernels.reference import rms_norm, rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pools(dtype: torch.dtype, head_dim: int, value_dim: int | None = None):
    """Pages of NaN, a table of three rows, and where their last three tokens go."""
    dims = head_dim, value_dim or head_dim
    k_pages, v_pages = (torch.full((12, 2, 16, dim), float("nan"), dtype=dtype, device=DEVICE) for dim in dims)
    table = torch.tensor([[3, 5, 0], [0, 9, 2], [7, 1, 4]], dtype=torch.int32, device=DEVICE)
    ends = torch.tensor([17, 33, 48], dtype=torch.int32, device=DEVICE)
    first_held = torch.tensor([0, 16, 0], dtype=torch.int32, device=DEVICE)
    return k_pages, v_pages, table, first_held, ends


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (80, 80), (96, 32), (32, 512)])
def test_append_writes_just_the_new_tokens(head_dim, value_dim, dtype):
    k_pages, v_pages, table, first_held, ends = pools(dtype, head_dim, value_dim)
    k, v = (torch.randn(3, 3, 2, dim, device=DEVICE).to(dtype).transpose(1, 2) for dim in (head_dim, value_dim))
    append(k_pages, v_pages, k, v, table, first_held, ends)
    for pages, states in ((k_pages, k), (v_pages, v)):
        for row in range(3):
            for t in range(3):
                position = int(ends[row]) - 3 + t
                assert torch.equal(pages[int(table[row, position // 16]), :, position % 16], states[row, :, t])
        assert int(torch.isfinite(pages).sum()) == states.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96])
@pytest.mark.parametrize("rows_of_cos", [1, 3])
def test_rope_append_rounds_as_transformers_does(rows_of_cos, head_dim, dtype):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    k_pages, v_pages, table, first_held, ends = pools(dtype, head_dim)
    q, k, v = (torch.randn(3, 3, heads, head_dim, device=DEVICE).to(dtype).transpose(1, 2) for heads in (6, 2, 2))
    angles = torch.randn(rows_of_cos, 3, head_dim // 2, device=DEVICE).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cos, sin)
    rotated_q = rope_append(k_pages, v_pages, q, k, v, cos, sin, table, first_held, ends)
    assert torch.equal(rotated_q, expected_q)
    for pages, states in ((k_pages, expected_k), (v_pages, v)):
        for row in range(3):
            for t in range(3):
                position = int(ends[row]) - 3 + t
                written = pages[int(table[row, position // 16]), :, position % 16]
                assert torch.equal(written, states[row, :, t])
        assert int(torch.isfinite(pages).sum()) == states.numel()


KINDS = [("glm4", 40), ("glm4", 80), ("phi3", 20), ("cohere", 80), ("olmo2", 80), ("smollm3", 0)]
PAGES = None, torch.int8


@pytest.mark.parametrize(
    ("model", "rotary", "kv_dtype", "dtype"),  # each kind with both pages, each dtype with both
    [(*kind, PAGES[(i + j) % 2], dtype) for i, kind in enumerate(KINDS) for j, dtype in enumerate(DTYPES)],
    ids=str,
)
def test_rope_is_that_of(model, rotary, kv_dtype, dtype):
    """Partial, interleaved, with angles in pairs, in float32, and none: by transformers' own functions."""
    own = importlib.import_module(f"transformers.models.{model}.modeling_{model}").apply_rotary_pos_emb
    k_pages, v_pages, table, first_held, ends = pools(dtype, 80)
    scales = None
    if kv_dtype:
        k_pages, v_pages = (torch.zeros_like(k_pages).to(kv_dtype) for _ in range(2))
        scales = tuple(torch.zeros(k_pages.shape[:3], device=DEVICE) for _ in range(2))
    q, k, v = (torch.randn(3, heads, 3, 80, device=DEVICE).to(dtype) for heads in (6, 2, 2))
    angles = torch.randn(3, 3, rotary // 2, device=DEVICE)
    angles = angles.repeat_interleave(2, -1) if model == "cohere" else angles.repeat(1, 1, 2)
    cos, sin = (each if model == "olmo2" else each.to(dtype) for each in (angles.cos(), angles.sin()))
    expected_q, expected_k = own(q, k, cos, sin) if rotary else (q, k)
    if model == "cohere":  # computes in float32
        cos, sin = cos.float(), sin.float()
    pairing = {"interleaved": model in ("glm4", "cohere"), "paired_angles": model == "cohere"}
    held = table, first_held, ends
    of = (cos, sin) if rotary else (None, None)
    rotated_q = rope_append(k_pages, v_pages, q, k, v, *of, *held, scales=scales, rotary=rotary, **pairing)
    assert torch.equal(rotated_q, expected_q)
    assert torch.equal(rotate(q, *of, rotary, *pairing.values()), expected_q)
    with poisoned_scratch():
        assert torch.equal(rope(q, *of, rotary=rotary, **pairing), expected_q)
    for row in range(3):
        for t in range(3):
            position = int(ends[row]) - 3 + t
            at = int(table[row, position // 16]), slice(None), position % 16
            if scales is None:
                assert torch.equal(k_pages[at], expected_k[row, :, t])
            else:
                values, of_values = quantize(expected_k[row, :, t], kv_dtype)
                assert torch.equal(k_pages[at], values)
                assert torch.equal(scales[0][at], of_values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("offset", "whole"), [(0.0, False), (1.0, False), (0.0, True)])
def test_heads_are_normed_as_transformers_rounds_them(offset, whole, dtype):
    k_pages, v_pages, table, first_held, ends = pools(dtype, 80)
    q, k, v = (torch.randn(3, heads, 3, 80, device=DEVICE).to(dtype) for heads in (6, 2, 2))
    shapes = [(1, 3, 80)] * 2 + [(480,), (160,)] if whole else [(1, 3, 80)] * 2 + [(80,)] * 2
    cos, sin, q_norm, k_norm = (torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)
    held = table, first_held, ends
    rotated_q = rope_append(k_pages, v_pages, q, k, v, cos, sin, *held, norms=(q_norm, k_norm, 0.1, offset))
    assert torch.equal(rope(q, cos, sin, (q_norm, 0.1, offset)), rotated_q)
    with pytest.raises(ValueError, match=r"norm is .* \[7\]: want .* of \(80, 480\) elements"):
        rope(q, cos, sin, (q_norm[:7], 0.1, offset))

    def normed(x, weight):
        together = x.transpose(1, 2).flatten(2) if whole else x
        together = rms_norm(together, weight, 0.1, offset)
        return together.view(3, 3, -1, 80).transpose(1, 2) if whole else together

    expected_q, expected_k = (rotate(normed(x, weight), cos, sin) for x, weight in ((q, q_norm), (k, k_norm)))
    with pytest.raises(ValueError, match=r"want .80, 80., of a head, or .480, 160., of all heads"):
        rope_append(k_pages, v_pages, q, k, v, cos, sin, *held, norms=(q_norm, q_norm[:7], 0.1, offset))
    last = [(int(table[row, p // 16]), p % 16) for row in range(3) for p in range(int(ends[row]) - 3, int(ends[row]))]
    written = torch.stack([k_pages[page, :, slot] for page, slot in last]).view(3, 3, 2, 80).transpose(1, 2)
    for ours, expected in ((rotated_q, expected_q), (written, expected_k)):
        assert float((ours != expected).double().mean()) < 0.005  # where the order of a sum is rounded the other way


@pytest.mark.parametrize("roped", [False, True])
def test_positions_in_the_null_page_are_left_out(roped):
    k_pages, v_pages, table, first_held, ends = pools(torch.float32, 64)
    ends[1] = 18  # its three tokens are at 15, 16 and 17, the first of them in the null page
    k, v = (torch.randn(3, 2, 3, 64, device=DEVICE) for _ in range(2))
    if roped:
        angle = torch.ones(1, 3, 64, device=DEVICE)
        rope_append(k_pages, v_pages, k, k, v, angle, angle, table, first_held, ends)
    else:
        append(k_pages, v_pages, k, v, table, first_held, ends)
    for pages in (k_pages, v_pages):
        assert torch.isnan(pages[0]).all()
        assert int(torch.isfinite(pages).sum()) == k.numel() - 2 * 64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_dtype", LARGEST, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_appends_quantize_as_the_reference_does(head_dim, kv_dtype, dtype):
    k_pages, _, table, first_held, ends = pools(torch.float32, head_dim)
    states = torch.randn(2, 3, 3, 2, head_dim, device=DEVICE) * 10 ** torch.randn(2, 3, 3, 2, 1, device=DEVICE)
    states[0, 1, 1] = 0  # a vector of zeros
    k, v = states.to(dtype).transpose(2, 3)
    ones, zeros = torch.ones(1, 3, head_dim, dtype=dtype, device=DEVICE), torch.zeros(1, 3, head_dim, dtype=dtype)
    for roped in (False, True):
        pages = [torch.full_like(k_pages, 0).to(kv_dtype) for _ in range(2)]
        scales = tuple(torch.full(k_pages.shape[:3], float("nan"), device=DEVICE) for _ in range(2))
        where = (table, first_held, ends)
        if roped:  # by angles of 0
            q = torch.zeros(3, 4, 3, head_dim, dtype=dtype, device=DEVICE)
            rope_append(*pages, q, k, v, ones, zeros.to(DEVICE), *where, scales=scales)
        else:
            append(*pages, k, v, *where, scales=scales)
        for values, of_values, exact in zip(pages, scales, (k, v)):
            expected, expected_scales = quantize(exact, kv_dtype)
            for row in range(3):
                for t in range(3):
                    position = int(ends[row]) - 3 + t
                    at = (int(table[row, position // 16]), slice(None), position % 16)
                    assert torch.equal(values[at].view(torch.uint8), expected[row, :, t].view(torch.uint8))
                    assert torch.equal(of_values[at], expected_scales[row, :, t])
            assert int(torch.isfinite(of_values).sum()) == exact[..., 0].numel()


@pytest.mark.parametrize("kv_dtype", LARGEST, ids=str)
def test_quantizing_errs_by_half_a_step(kv_dtype):
    states = torch.randn(50, 7, 96) * 10 ** torch.randn(50, 7, 1)
    states[3] = 0
    back = dequantize(*quantize(states, kv_dtype), torch.float32)
    largest = states.abs().amax(-1, keepdim=True)
    half_steps = largest / 254 if kv_dtype == torch.int8 else (states.abs() / 16).maximum(largest / 448 / 1024)
    assert ((back - states).abs() <= half_steps * 1.001).all()
    assert not back[3].any()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": torch.zeros(3, 1, 2, 64), "v": torch.zeros(3, 1, 2, 64)}, "want both with 2 heads"),
        ({"v": torch.zeros(3, 2, 2, 32)}, r"v is \[3, 2, 2, 32\]"),
        ({"k": torch.zeros(2, 2, 2, 64)}, "k is|v is"),
        ({"k": torch.zeros(3, 2, 64, 2).transpose(2, 3)}, "contiguous head_dim"),
        ({"first_held": torch.zeros(3)}, "first_held is torch.float32"),
        ({"block_table": torch.zeros(3, 3, dtype=torch.int32, device="meta")}, "block_table is on meta"),
        ({"cos": torch.zeros(2, 2, 64)}, r"cos is \[2, 2, 64\]"),
        ({"sin": torch.zeros(1, 2, 64, dtype=torch.float16)}, "sin is torch.float16"),
        ({"cos": None}, "cos is None"),
        ({"rotary": 31}, "rotary=31"),
        ({"rotary": 32}, r"cos is \[1, 2, 64\] .* want \[2, 32\]"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_bad_arguments_of_append_are_named(change, named):
    k_pages, v_pages, table, first_held, ends = (tensor.cpu() for tensor in pools(torch.float32, 64))
    states = {name: torch.zeros(3, 2, 2, 64) for name in ("k", "v")}
    angles = {name: torch.zeros(1, 2, 64) for name in ("cos", "sin")}
    where = {"block_table": table, "first_held": first_held, "ends": ends}
    with pytest.raises(ValueError, match=named):
        rope_append(k_pages, v_pages, **{"q": torch.zeros(3, 4, 2, 64), **states, **angles, **where, **change})
    if not change.keys() & {"cos", "sin", "rotary"}:
        with pytest.raises(ValueError, match=named):
            append(k_pages, v_pages, **{**states, **where, **change})
