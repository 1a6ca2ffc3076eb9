"""Mixtures on a GPU: steps whose experts are chosen on the device are captured, whatever transformers' experts do."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from served import SERVED, build, generate

import pkv_hf
from pkv_hf.kernels.experts import experts as module
from pkv_hf.replaced import STATE
from tiny import assert_on_pages, on_gpu

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("lengths", [(50,), (20, 9, 3)])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", ["qwen2-moe", "qwen3-moe", "mixtral", "gpt-oss"])
def test_steps_are_captured_and_tokens_are_transformers_own(name, implementation, lengths):
    model, inputs = build(*SERVED[name]).cuda(), on_gpu(*lengths)
    model.set_experts_implementation(implementation)
    expected = generate(model, inputs).sequences
    with pkv_hf.patched(model):
        for _ in range(2):  # the first call compiles and runs a step without its graph
            assert torch.equal(generate(model, inputs).sequences, expected)
        report = pkv_hf.report(model)
        assert_on_pages(model)
    assert (report.last_step, report.experts, report.routers, report.not_experts) == ("captured", 3, 3, {})


def test_no_step_waits_for_the_device():
    model, inputs = build(*SERVED["qwen3-moe"]).cuda().bfloat16(), on_gpu(20, 9)
    with pkv_hf.patched(model):
        generate(model, inputs)
        mixtures = next(iter(getattr(model, STATE).known.look().fusions.values())).mixtures
        (each, form), *_ = mixtures.forms.items()
        down = each.down_proj
        x = torch.randn(2, down.shape[1], device="cuda", dtype=torch.bfloat16)
        index, weights = torch.zeros(2, 2, device="cuda", dtype=torch.long), torch.ones(2, 2, device="cuda")
        torch.cuda.synchronize()
        with torch.no_grad():
            torch.cuda.set_sync_debug_mode("error")
            try:
                module.experts(x, index, weights, module.Stacked(each.gate_up_proj, down, None, None, form))
            finally:
                torch.cuda.set_sync_debug_mode("default")
