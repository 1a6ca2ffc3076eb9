"""Every kernel over memory that nothing has written, as a cache's pages are: initcheck's part of scripts/sanitize.sh.

On a GPU nothing runs there but these kernels: inputs are drawn and results judged on the CPU, so that it reports no
other library's.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton")

from pkv_hf.kernels.append import append, rope_append
from pkv_hf.kernels.attention.split import decode_split
from pkv_hf.kernels.attention.workqueue import decode_workqueue
from pkv_hf.kernels.checks.attention import ROUTES
from pkv_hf.kernels.elementwise import act_mul, add_norms, layer_norm, rms_norm
from pkv_hf.kernels.launch import has_dtypes
from pkv_hf.kernels.linear import gated, linear
from pkv_hf.kernels.quantize import dequantize, quantize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS, PAGE, HEADS = (5, 33, 70), 16, 2
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def empty_pages(head_dim: int, dtype: torch.dtype):
    """Pools in the memory of a head's pages side by side, scales where they are quantised, and a table."""
    columns = -(-max(LENGTHS) // PAGE)
    table = 1 + torch.randperm(len(LENGTHS) * columns).to(torch.int32).view(len(LENGTHS), columns)
    shape = (HEADS, 1 + table.numel(), PAGE)
    pools = [torch.empty((*shape, head_dim), dtype=dtype, device=DEVICE).transpose(0, 1) for _ in range(2)]
    scales = None
    if dtype.itemsize == 1:
        scales = tuple(torch.empty(shape, device=DEVICE).transpose(0, 1) for _ in range(2))
    return pools, scales, table.to(DEVICE)


def attention(q, k, v, window):
    """Of one row's last queries `[H_q, q_len, head_dim]` over its K and V `[H_kv, length, head_dim]`, in float64."""
    q, k, v = q.double(), *(states.double().repeat_interleave(len(q) // len(k), 0) for states in (k, v))
    positions, keys = torch.arange(k.shape[1])[-q.shape[1] :, None], torch.arange(k.shape[1])
    seen = (keys <= positions) & (keys > positions - (window or k.shape[1]))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(0, 1)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "group", "head_dim", "q_len", "window", "parts"),
    [
        (torch.float32, None, 4, 64, 1, 0, None),
        (torch.float16, None, 1, 128, 1, 0, 1),
        (torch.bfloat16, None, 7, 80, 3, 0, 3),
        (torch.float16, None, 4, 64, 1, 20, 2),
        (torch.float16, torch.int8, 4, 128, 1, 0, None),
        (torch.bfloat16, torch.float8_e4m3fn, 3, 64, 2, 0, 40),
    ],
)
def test_append_then_attend(route, dtype, kv_dtype, group, head_dim, q_len, window, parts):
    if not has_dtypes(DEVICE, dtype, kv_dtype):
        pytest.skip(f"this GPU does not have {dtype} and {kv_dtype}")
    pools, scales, table = empty_pages(head_dim, kv_dtype or dtype)
    rows = len(LENGTHS)
    ends, zeros = (torch.tensor(bounds, dtype=torch.int32).to(DEVICE) for bounds in (LENGTHS, (0,) * rows))
    states = [[torch.randn(HEADS, length, head_dim).to(dtype) for _ in range(2)] for length in LENGTHS]
    for row, pair in enumerate(states):
        here = slice(row, row + 1)
        k, v = (tokens[None].to(DEVICE) for tokens in pair)
        append(*pools, k, v, table[here], zeros[here], ends[here], scales=scales)
    drawn = torch.randn(rows, HEADS * group, q_len, head_dim).to(dtype)
    inputs = {
        "q": drawn.to(DEVICE), "k_pages": pools[0], "v_pages": pools[1], "block_table": table, "starts": zeros,
        "ends": ends, "scale": head_dim**-0.5, **({"scales": scales} if scales else {}),
    }  # fmt: skip
    if route == "split":
        out = decode_split(**inputs, window=window, longest=max(LENGTHS), num_splits=parts)
    else:
        out = decode_workqueue(**inputs, window=window, programs=parts)
    tolerance = TOLERANCE[dtype]
    for row, (k, v) in enumerate(states):
        if kv_dtype:  # what pages hold of them
            k, v = (dequantize(*quantize(tokens, kv_dtype), torch.float64) for tokens in (k, v))
        expected = attention(drawn[row], k, v, window)
        torch.testing.assert_close(out[row].cpu().double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "kv_dtype"), [(torch.bfloat16, None), (torch.float16, torch.int8)])
def test_rope_append(dtype, kv_dtype):
    pools, scales, table = empty_pages(80, kv_dtype or dtype)
    q, k, v = (torch.randn(3, heads, 2, 80).to(dtype) for heads in (6, HEADS, HEADS))
    cos, sin = (torch.randn(3, 2, 80).to(dtype) for _ in range(2))
    ends, zeros = (torch.tensor(bounds, dtype=torch.int32).to(DEVICE) for bounds in (LENGTHS, (0, 0, 0)))
    norms = tuple(torch.randn(80).to(dtype).to(DEVICE) for _ in range(2))
    on_device = [tensor.to(DEVICE) for tensor in (q, k, v, cos, sin)]
    for normed in (None, (*norms, 1e-6, 1.0)):
        rotated = rope_append(*pools, *on_device, table, zeros, ends, norms=normed, scales=scales)
        assert torch.isfinite(rotated.cpu()).all()


@pytest.mark.parametrize("rows", [1, 3])
def test_linear_layers(rows):
    def drawn(*shape):
        return torch.randn(shape).mul(0.1).to(torch.float16)

    x, norm, weights, residual = drawn(rows, 96), drawn(96), [drawn(n, 96) for n in (40, 24, 24)], drawn(rows, 40)
    gpu = [tensor.to(DEVICE) for tensor in weights]
    scale = {"norm": norm.to(DEVICE), "eps": 1e-5} if rows == 1 else {}
    there = x.to(DEVICE)
    normed, total = rms_norm(there, norm.to(DEVICE), 1e-5, there)
    assert torch.equal(total.cpu(), x + x)
    outputs = [
        linear(there, gpu, **scale),
        *add_norms(there, there, (norm.to(DEVICE), 1e-5, 1.0), (norm.to(DEVICE), 1e-5, 0.0), scale=0.5),
        layer_norm(there, norm.to(DEVICE), None, 1e-5)[0],
        gated(there, gpu[1], gpu[2], **scale),
        act_mul(there, there, "silu"),
        normed,
    ]
    assert all(torch.isfinite(out.cpu()).all() for out in outputs)
    expected = residual.double() + x.double() @ weights[0].double().T
    torch.testing.assert_close(
        linear(there, gpu[:1], residual=residual.to(DEVICE)).cpu().double(), expected, atol=2e-3, rtol=2e-3
    )
