"""The policy on a GPU: a calibration of it, and FlashInfer's routes where that is installed."""

from __future__ import annotations

import copy
import time

import numpy as np
import pytest
import torch

import pkv_hf
from pkv_hf.bench import calibrate
from pkv_hf.bench.attention_steps import AttentionShape, AttentionStep
from pkv_hf.bench.trace_benchmark import check
from pkv_hf.policy.calibration import constants_for, save
from pkv_hf.policy.choose import choose
from pkv_hf.routes.base import installed
from pkv_hf.routes.costs import from_properties
from tiny import decode_logits, left_padded, tiny

pytestmark = pytest.mark.gpu

FLASHINFER = ("flashinfer", "flashinfer_tc", "flashinfer_xqa")
needs_flashinfer = pytest.mark.skipif(not installed("flashinfer"), reason="flashinfer is not installed")


def test_the_devices_properties_tell_its_bandwidth():
    (of_route,) = from_properties(torch.device("cuda")).routes["graph"].values()
    assert 0.2e12 < of_route["split"].bandwidth < 20e12
    assert of_route["split"].bandwidth != 0.9 * 0.5e12  # which stands in where a driver does not say


def test_a_calibration_is_quick_fits_and_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv("PKV_HF_CACHE", str(tmp_path))
    constants_for.cache_clear()
    device = torch.device("cuda")
    triton_alone = ("split", "workqueue")  # FlashInfer compiles for minutes first

    def measure(shape, lengths):
        step = AttentionStep(shape, lengths, np.random.default_rng(0))
        return {route: step.time(route, 3) for route in triton_alone}

    started = time.perf_counter()
    known, quality = calibrate.calibrate(device, measure)
    assert time.perf_counter() - started < 60
    save(device, known, quality)
    decision = choose("auto", AttentionShape(8, 4, 128, 16, torch.float16, device).step([8192] * 4, captured=True))
    assert "measured on" in decision.source
    assert decision.route.name in triton_alone
    constants_for.cache_clear()


@needs_flashinfer
@pytest.mark.parametrize("group", [1, 4, 8])
def test_flashinfer_is_right_on_our_pages(group):
    shape = AttentionShape(4, group, 128, 16, torch.float16, torch.device("cuda"), holes=0.5)
    step = AttentionStep(shape, [3000, 17, 16, 5000], np.random.default_rng())
    routes = [route for route in FLASHINFER if step.accepts(route)]
    exact = step.reference()
    for route in routes:
        runner = step.runner(route, captured=False)
        runner.plan()
        torch.testing.assert_close(runner.run(1).double(), exact, atol=2e-3, rtol=2e-3)
    long = AttentionStep(shape, [3000, 9000], np.random.default_rng())
    check(long, [*routes, "split", "workqueue"])


@torch.no_grad()
@needs_flashinfer
@pytest.mark.parametrize("route", FLASHINFER)
def test_models_decode_by_flashinfer(route):
    model = tiny("llama", head_dim=64).half().cuda()
    inputs = {name: tensor.cuda() for name, tensor in left_padded(50, 50).items()}
    exact = decode_logits(copy.deepcopy(model).double(), inputs, 6)
    theirs = decode_logits(model, inputs, 6)
    with pkv_hf.patched(model, route=route, cuda_graphs=route == "flashinfer_xqa"):
        for _ in range(2):  # a second call replays a graph of the route that can be captured
            ours = decode_logits(model, inputs, 6)
        assert pkv_hf.explain(model).route.name == route
        tokens = model.generate(**inputs, max_new_tokens=20)
    assert tokens.shape == (2, 70)
    assert (ours - exact).square().mean().sqrt() <= 2 * (theirs - exact).square().mean().sqrt()


@needs_flashinfer
def test_a_planned_route_cannot_be_captured():
    model = tiny("llama", head_dim=64).half().cuda()
    with pkv_hf.patched(model, route="flashinfer"), pytest.raises(pkv_hf.RouteError, match="cuda_graphs=False"):
        model.generate(torch.ones(1, 30, dtype=torch.long, device="cuda"), max_new_tokens=4)
