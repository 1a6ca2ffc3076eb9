"""scripts/benchmark_experts.py on a small model and no GPU: nothing is timed."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from pkv_hf.bench.inputs.shapes import SHAPES
from pkv_hf.compat import decoder_of
from pkv_hf.kernels.experts import experts as kernels
from pkv_hf.kernels.experts.blocks import Block
from pkv_hf.patches.experts.described import holds_experts, stacked
from pkv_hf.patches.experts.served import Believed


@pytest.fixture
def script(run, monkeypatch):
    script = run.load("benchmark_experts")
    monkeypatch.setattr(script, "DRAWS", 2)
    monkeypatch.setattr(script, "times_us", lambda calls: [call() for call in calls] and (1.0, 2.0, 3.0))
    monkeypatch.setattr(script, "candidates", lambda *_: [Block(32, 64, 2)])
    return script


def case(script, rows):
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 48}
    model = SHAPES["gpt-oss-20b"].build(torch.bfloat16, "cpu", small=True, **sizes)
    module = next(each for each in decoder_of(model).modules() if holds_experts(each))
    of = stacked(module, Believed()(decoder_of(model)).forms[module])
    return module, of, script.draws(rows, 2, of)


def test_every_way_is_compared_and_recorded(script):
    module, of, calls = case(script, 2)
    records = script.measured("gpt-oss-20b", module, of, calls, sweep=True)
    engines = ["pkv_hf", "pkv_hf, up 32x64x2", "pkv_hf, down 32x64x2", "batched_mm", "grouped_mm"]
    assert [record["engine"] for record in records] == engines
    chosen = sum(len(set(index.flatten().tolist())) for _, index, _ in calls)
    nbytes = 2 * (3 * 64 * 48 + 2 * 48 + 64) * chosen / len(calls)
    for record in records:
        assert record["bytes"] == nbytes
        assert record["gb_s"] == nbytes / 2.0 / 1e3
        assert 0 < record["relative_error"] < script.ERROR


def test_a_wrong_kernel_ends_it(script, monkeypatch, capsys):
    module, of, calls = case(script, 1)
    plain = kernels.experts
    monkeypatch.setattr(kernels, "experts", lambda *call, **settings: plain(*call, **settings) + 1)
    assert script.measured("gpt-oss-20b", module, of, calls, sweep=False) is None
    assert "gpt-oss-20b on 1 rows by pkv_hf is off by" in capsys.readouterr().out


def test_what_cannot_be_captured_is_said_and_left_out(script, monkeypatch, capsys):
    module, of, calls = case(script, 1)

    def own(module, name, *call):
        raise RuntimeError("it waits for the device")

    monkeypatch.setattr(script, "own", own)
    assert len(script.measured("gpt-oss-20b", module, of, calls, sweep=False)) == 1
    assert capsys.readouterr().out.count("RuntimeError: it waits for the device") == 2
