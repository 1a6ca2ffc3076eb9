"""Attention of over_packed_prompt prompts on a GPU: one launch over rows of any length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pkv_hf.cache.packing import Packing
from pkv_hf.kernels.checks.attention import rms
from pkv_hf.routes.base import Scores
from pkv_hf.routes.sdpa import attend_block, over_packed_prompt

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("window", [0, 24, 500])
@pytest.mark.parametrize("head_dim", [16, 80, 128, 256, 264])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_packed_rows_are_as_exact_as_row_by_row(dtype, group, head_dim, window):
    packing = Packing(np.array([0, 199, 137, 72]), 200)  # the second row has one token
    shapes = [(1, heads, packing.tokens, head_dim) for heads in (2 * group, 2, 2)]
    q, k, v = (torch.randn(shape, device="cuda").to(dtype) for shape in shapes)
    ours = over_packed_prompt(q, k, v, Scores(head_dim**-0.5), packing, window)
    rows = Packing(packing.starts, packing.length)
    exact = over_packed_prompt(*(states.double().cpu() for states in (q, k, v)), Scores(head_dim**-0.5), rows, window)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = group, True
    theirs = [
        sdpa_attention_forward(
            module,
            *(states[:, :, segment] for states in (q, k, v)),
            attention_mask=_mask(segment.stop - segment.start, window),
        )[0]
        for segment in rows.segments()
    ]
    assert ours.shape == q.shape
    assert rms(ours.double().cpu() - exact) <= 2 * rms(torch.cat(theirs, dim=1).transpose(1, 2).double().cpu() - exact)


@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (192, 128), (512, 512)], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [0, 30])
@pytest.mark.parametrize("q_len", [1, 5, 200])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sinks_and_heads_of_other_sizes_are_exact_in_half_precision(dtype, q_len, window, sinks, dims):
    """Against float64 on the CPU, where no kernel of torch's is called by itself."""
    q = torch.randn(2, 8, q_len, dims[0], device="cuda").to(dtype)
    k, v = (torch.randn(2, 2, 230, dim, device="cuda").to(dtype) for dim in dims)
    scores = Scores(dims[0] ** -0.5, sinks=torch.randn(8, device="cuda").to(dtype) if sinks else None)
    wide = scores._replace(sinks=None if scores.sinks is None else scores.sinks.double().cpu())
    where = 230 - q_len, 0, window
    exact = attend_block(*(states.double().cpu() for states in (q, k, v)), wide, *where)
    out = attend_block(q, k, v, scores, *where)
    assert out.shape == exact.shape
    assert rms(out.double().cpu() - exact) <= 2 * torch.finfo(dtype).eps * rms(exact)


def _mask(length: int, window: int) -> torch.Tensor:
    behind = torch.arange(length, device="cuda")[:, None] - torch.arange(length, device="cuda")[None]
    return ((behind >= 0) & (behind < (window or length)))[None, None]
