"""Kernels of one step of linear attention, beside transformers' own functions and float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from transformers.models.bamba import modeling_bamba
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.qwen3_next import modeling_qwen3_next

from pkv_hf.kernels.checks.attention import poisoned_scratch, rms
from pkv_hf.kernels.states import reference
from pkv_hf.kernels.states.convolution import convolution
from pkv_hf.kernels.states.delta import delta_rule
from pkv_hf.kernels.states.norm import gated_norm
from pkv_hf.kernels.states.ssm import state_space

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def drawn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def judge(kernel, theirs, exact, arguments: dict, state: torch.Tensor | None, **settings) -> None:
    """One step by our kernel, in memory full of NaN, and by transformers' function, both beside float64."""
    double = {name: None if tensor is None else tensor.double() for name, tensor in arguments.items()}
    states = [{} if state is None else {"state": each} for each in (*[state, state], state)]
    states = [{name: each.clone() for name, each in held.items()} for held in states]
    states[2] = {name: each.double() for name, each in states[2].items()}
    with poisoned_scratch():
        ours = kernel(**arguments, **states[0], **settings)
    other = theirs(SimpleNamespace(**arguments, **states[1]))
    expected = exact(**double, **states[2], **settings)
    tolerance = 1e-6 * rms(expected)  # of float32, for which the device's exp and rsqrt are a bit coarser than torch's
    assert ours.dtype == arguments["x"].dtype
    assert torch.isfinite(ours).all()
    assert rms(ours - expected) <= 2 * rms(other.reshape(ours.shape) - expected) + tolerance
    if state is not None:
        assert states[0]["state"].dtype == state.dtype
        ours, other, expected = (held["state"] for held in states)
        assert rms(ours - expected) <= 2 * rms(other - expected) + 1e-6 * rms(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "channels", "taps", "bias"), [(1, 200, 4, False), (3, 128, 3, True), (2, 20, 5, True)]
)
@pytest.mark.parametrize("kind", ["silu", "plain", "gated"])
def test_convolution(kind, rows, channels, taps, bias, dtype):
    silu, gated = kind == "silu", kind == "gated"
    arguments = {
        "x": drawn(rows, channels * (3 if gated else 1) + 8, dtype=dtype)[:, 8:],
        "weight": drawn(channels, taps, dtype=dtype),
        "bias": drawn(channels, dtype=dtype) if bias else None,
    }

    def theirs(given):
        b, c, x = given.x.chunk(3, dim=1) if gated else (1, 1, given.x)
        update = modeling_bamba.causal_conv1d_update
        y = update((b * x)[..., None], given.state, given.weight, given.bias, "silu" if silu else None)
        return c * y[..., 0]

    state = drawn(rows, channels, taps, dtype=dtype)
    judge(convolution, theirs, reference.convolution, arguments, state, silu=silu, gated=gated)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "key_heads", "heads", "dk", "dv", "beta", "paired"),
    [
        (1, 2, 4, 128, 128, 1.0, True),
        (3, 1, 3, 24, 40, 2.0, False),
        (2, 2, 2, 80, 16, 1.0, False),
        (1, 1, 2, 200, 72, 1.0, False),
        (2, 2, 6, 16, 16, 1.0, True),
    ],
)
def test_delta_rule(rows, key_heads, heads, dk, dv, beta, paired, dtype):
    both = drawn(rows, key_heads, 2, heads // key_heads, dtype=dtype)
    b, a = (both[:, :, i].reshape(rows, heads).contiguous() for i in range(2))
    width = 2 * key_heads * dk + heads * dv
    arguments = {
        "x": drawn(rows, width + 3, dtype=dtype)[:, :width],
        "a": a, "b": b,
        "a_log": drawn(heads, dtype=torch.float32), "dt_bias": drawn(heads, dtype=dtype),
    }  # fmt: skip

    def theirs(given):
        q, k, v = given.x[:, None].split([key_heads * dk, key_heads * dk, heads * dv], dim=-1)
        q, k, v = (each.reshape(rows, 1, -1, size) for each, size in ((q, dk), (k, dk), (v, dv)))
        q, k = (each.repeat_interleave(heads // key_heads, dim=2) for each in (q, k))
        decay = -given.a_log.exp() * torch.nn.functional.softplus(given.a.float() + given.dt_bias)
        step = modeling_qwen3_next.torch_recurrent_gated_delta_rule
        out, state = step(
            q, k, v, g=decay[:, None], beta=(given.b.sigmoid() * beta)[:, None], initial_state=given.state,
            output_final_state=True, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        given.state.copy_(state)
        return out

    def kernel(a, b, **rest):
        if paired:
            flat, repeats = both.view(rows, -1), heads // key_heads
            a, b = flat[:, repeats:], flat[:, : 2 * heads - repeats]
        return delta_rule(a=a, b=b, paired=paired, **rest)

    state = drawn(rows, heads, dk, dv, dtype=torch.float32)
    judge(kernel, theirs, reference.delta_rule, arguments, state, key_heads=key_heads, beta=beta)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "heads", "groups", "p", "n"), [(1, 4, 1, 64, 128), (3, 6, 3, 40, 24), (2, 4, 2, 16, 300), (1, 2, 1, 5, 16)]
)
def test_state_space(rows, heads, groups, p, n, dtype):
    width = heads * p + 2 * groups * n
    arguments = {
        "x": drawn(rows, width + 3, dtype=dtype)[:, 3:],
        "dt": drawn(rows, heads + 1, dtype=dtype, scale=4.0)[:, 1:],
        "a_log": drawn(heads, dtype=torch.float32),
        "dt_bias": drawn(heads, dtype=dtype, scale=4.0),
        "d": drawn(heads, dtype=dtype),
    }

    def theirs(given):
        x, b, c = given.x.split([heads * p, groups * n, groups * n], dim=1)
        b, c = (each.reshape(rows, groups, n) for each in (b, c))
        dt, bias, d = (
            given.dt[..., None].expand(-1, -1, p),
            given.dt_bias[:, None].expand(-1, p),
            given.d[:, None].expand(-1, p),
        )
        a = -given.a_log.exp()[:, None, None].expand(-1, p, n)
        step = modeling_bamba.mamba2_selective_state_update
        return step(given.state, x.reshape(rows, heads, p), dt, a, b, c, d, dt_bias=bias, dt_softplus=True)

    state = drawn(rows, heads, p, n, dtype=torch.float32)
    judge(state_space, theirs, reference.state_space, arguments, state, groups=groups)


def test_small_time_steps_are_exact():
    """softplus(dt) where it is far below 1, of which float32 sums keep little."""
    dt, state = torch.linspace(-30, 30, 61, device=DEVICE)[None], torch.zeros(1, 61, 1, 1, device=DEVICE)
    one, x = torch.ones(61, device=DEVICE), torch.ones(1, 61 + 2, device=DEVICE)
    state_space(x, dt, 0 * one, 0 * one, one, state, groups=1)
    expected = torch.nn.functional.softplus(dt.double(), threshold=100)
    rounded = 30 * torch.finfo(torch.float32).eps  # the argument of an exponential, of up to 30
    torch.testing.assert_close(state.view(1, -1).double(), expected, rtol=rounded, atol=0)


NORMS = {
    "qwen": (modeling_qwen3_next.Qwen3NextRMSNormGated, {}, False),
    "bamba": (modeling_bamba.BambaRMSNormGated, {"group_size": 24}, True),
    "falcon before": (FalconH1RMSNormGated, {"n_groups": 4, "norm_before_gate": True}, False),
    "falcon after": (FalconH1RMSNormGated, {"n_groups": 4, "norm_before_gate": False}, True),
    "gate alone": (None, {}, True),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_gated_norm(name, dtype):
    norm_class, given, gate_first = NORMS[name]
    rows, width, size, eps = 3, 96, 24, 0.1
    weight = drawn(size if name == "qwen" else width, dtype=dtype) if norm_class else None
    arguments = {
        "x": drawn(rows, width, dtype=dtype),
        "gate": drawn(rows, 2, width // 2 + 5, dtype=dtype)[..., : width // 2],
        "weight": weight,
    }

    def theirs(given_now):
        x, gate = given_now.x, given_now.gate.reshape(rows, width)
        if norm_class is None:
            return x * torch.nn.functional.silu(gate)
        norm = norm_class(len(weight), eps=eps, **given).to(DEVICE, dtype)
        norm.weight.copy_(weight)
        shape = (-1, size) if name == "qwen" else (rows, 1, width)
        return norm(x.reshape(shape), gate.reshape(shape))

    judge(gated_norm, theirs, reference.gated_norm, arguments, None, eps=eps, size=size, gate_first=gate_first)


def test_what_kernels_cannot_take_is_said():
    state, ones = torch.zeros(1, 2, 4, 4, device=DEVICE), torch.ones(2, device=DEVICE)
    x, dt = torch.zeros(1, 24, device=DEVICE), torch.zeros(1, 2, device=DEVICE)
    good = {"x": x, "dt": dt, "a_log": ones, "dt_bias": ones, "d": ones}
    state_space(**good, state=state, groups=2)
    for name, wrong, said in (
        ("x", torch.zeros(1, 25), r"x is \[1, 25\]: want \[1, 24\]"),
        ("dt", torch.zeros(1, 2, dtype=torch.float16), r"dt is torch.float16"),
        ("x", torch.zeros(24, 1).T.expand(1, 24)[:, ::1].double(), "x is torch.float64"),
        ("d", torch.ones(3), r"d is torch.float32 \[3\]: want contiguous \[2\]"),
        ("state", torch.zeros(1, 2, 4, 8)[..., ::2], "state is"),
    ):
        with pytest.raises(ValueError, match=said):
            state_space(**{**good, "state": state, name: wrong}, groups=2)
    with pytest.raises(ValueError, match="groups=3"):
        state_space(**good, state=state, groups=3)
    with pytest.raises(ValueError, match="key_heads=3"):
        delta_rule(torch.zeros(1, 1), ones[None], ones[None], ones, ones, state, key_heads=3)
    with pytest.raises(ValueError, match="gate is"):
        gated_norm(torch.zeros(1, 8), torch.zeros(1, 8), None, size=4)
    with pytest.raises(ValueError, match="x is"):
        gated_norm(torch.zeros(1, 8), torch.zeros(1, 1, 8), None, size=3)
