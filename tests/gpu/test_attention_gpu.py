"""torch's attention on a GPU: packed prompts in one launch, and what layers ask of it beyond a causal softmax."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pkv_hf.cache.packing import Packing
from pkv_hf.kernels.checks.attention import rms
from pkv_hf.routes import sdpa
from pkv_hf.routes.base import Scores
from pkv_hf.routes.sdpa import attend_block, over_packed_prompt

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Of what is not exact, by the size of what is."""


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


def _mask(length: int, window: int) -> torch.Tensor:
    behind = torch.arange(length, device="cuda")[:, None] - torch.arange(length, device="cuda")[None]
    return ((behind >= 0) & (behind < (window or length)))[None, None]


@pytest.mark.parametrize("past", [0, 70])
@pytest.mark.parametrize("q_len", [1, 130])
@pytest.mark.parametrize(
    ("asked", "window", "dims", "flash"),
    [
        ({"sinks": True}, 0, (64, 64), True),
        ({"sinks": True}, 24, (128, 128), True),
        ({"sinks": True}, 24, (192, 128), False),
        ({"softcap": 1.5, "sinks": True}, 0, (64, 64), False),
        ({"softcap": 1.5}, 24, (256, 256), False),
        ({"chunked": True, "sinks": True}, 48, (64, 64), True),
        ({}, 0, (192, 128), False),
        ({}, 24, (512, 512), False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_what_layers_ask_for(dtype, asked, window, dims, flash, q_len, past, monkeypatch):
    """Sinks by the sums that the flash kernel returns, where it takes the heads; K and V of two sizes; wide heads."""
    lengths = (6, q_len), (2, past + q_len), (2, past + q_len)
    q, k, v = (torch.randn(3, *of, dim, device="cuda").to(dtype) for of, dim in zip(lengths, (dims[0], *dims)))
    sinks = 2 * torch.randn(6, device="cuda") if "sinks" in asked else None
    scores = Scores(dims[0] ** -0.5, **{**asked, "sinks": sinks})
    called, by_flash = [], sdpa.flash_with_sinks
    monkeypatch.setattr(sdpa, "flash_with_sinks", lambda *args: called.append(1) or by_flash(*args))
    ours = attend_block(q, k, v, scores, past, 0, window)
    assert bool(called) == (flash and dtype != torch.float32)
    wide = [states.double().cpu() for states in (q, k, v)]
    exact = attend_block(*wide, scores._replace(sinks=None if sinks is None else sinks.double().cpu()), past, 0, window)
    assert ours.shape == exact.shape
    assert rms(ours.double().cpu() - exact) <= TOLERANCE[dtype] * rms(exact)
