"""Traces: the paper's families by their definitions, files, and the steps of a limited batch."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pkv_hf.bench.inputs.traces import (
    CALIBRATION_SEED,
    FAMILIES,
    HELD_OUT_SEEDS,
    Request,
    block_tables,
    decode_steps,
    load,
    synthetic,
)
from pkv_hf.bench.trace_benchmark import decisions_a_step
from pkv_hf.errors import TraceError

LIMITS = {
    "bucketed": ((8192, 65_536), (32, 96)),
    "homogeneous": ((32_768, 32_768), (32, 96)),
    "bimodal": ((2048, 65_536), (8, 128)),
    "uniform": ((4096, 32_768), (16, 96)),
    "zipf": ((2048 + 65_536 // 32**0.5 - 513, 2048 + 65_536 + 512), (8, 128)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_follow_their_definitions(family):
    requests = synthetic(family, 400, CALIBRATION_SEED)
    for values, (low, high) in zip(zip(*((r.prompt, r.decode) for r in requests)), LIMITS[family]):
        assert low <= min(values) <= max(values) <= high
    assert requests == synthetic(family, 400, CALIBRATION_SEED)
    assert requests != synthetic(family, 400, HELD_OUT_SEEDS[0])


def test_one_in_four_of_bimodal_is_long():
    prompts = [r.prompt for r in synthetic("bimodal", 400, 0)]
    assert sum(prompt >= 24_576 for prompt in prompts) == 100
    assert sum(prompt <= 12_288 for prompt in prompts) == 300


def test_buckets_cycle():
    assert [r.prompt for r in synthetic("bucketed", 5, 0)] == [8192, 16_384, 32_768, 65_536, 8192]


def test_bad_families_and_counts_are_named():
    with pytest.raises(ValueError, match="family='zap' is not one of"):
        synthetic("zap", 4, 0)
    with pytest.raises(ValueError, match="count=0"):
        synthetic("zipf", 0, 0)


def test_a_batch_is_refilled_as_rows_end():
    requests = [Request(10, 2), Request(20, 1), Request(5, 3)]
    assert list(decode_steps(requests, 2)) == [[11, 21], [12, 6], [7], [8]]
    assert list(decode_steps(requests, 9)) == [[11, 21, 6], [12, 7], [8]]
    assert sum(map(len, decode_steps(synthetic("zipf", 50, 1), 8))) == sum(r.decode for r in synthetic("zipf", 50, 1))
    with pytest.raises(ValueError, match="max_active=0"):
        next(decode_steps(requests, 0))


def test_files(tmp_path):
    expected = [Request(7, 2, 0.5), Request(30, 4, 3.0)]
    (tmp_path / "a.csv").write_text("arrival_s,prompt_len,decode_len\n3.0,30,4\n0.5,7,2\n")
    (tmp_path / "b.json").write_text(json.dumps([
        {"prompt": 30, "decode": 4, "arrival": 3}, {"prompt_len": 7, "decode_len": 2, "arrival_step": 0.5},
    ]))  # fmt: skip
    (tmp_path / "c.csv").write_text("prompt,decode\n7,2\n")
    assert load(tmp_path / "a.csv") == load(tmp_path / "b.json") == expected
    assert load(tmp_path / "c.csv") == [Request(7, 2)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "prompt_len,decode_len\n5,2\n-3,1\n", "line 3: prompt_len='-3' is not a positive whole number"),
        ("a.csv", "prompt_len,decode_len\n5,2.5\n", "line 2: decode_len='2.5' is not a positive whole"),
        ("a.csv", "prompt_len,decode_len\nfive,2\n", "line 2: prompt_len='five'"),
        ("a.csv", "prompt_len,decode_len\n5,\n", "line 2: no decode_len or decode"),
        ("a.csv", "prompt_len,decode_len,arrival_s\n5,2,inf\n", "line 2: arrival_s='inf' is not a finite number"),
        ("a.csv", "tokens\n5\n", "line 2: no prompt_len or prompt"),
        ("a.csv", "prompt_len,decode_len\n", "holds no requests"),
        ("a.json", '[{"prompt": 5, "decode": 0}]', "entry 0: decode=0 is not"),
        ("a.json", "[5]", "entry 0: 5 is not a request"),
        ("a.json", '{"prompt": 5}', "holds a dict"),
        ("a.json", "[", "cannot be read as a trace"),
    ],
)
def test_bad_files_are_named_by_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(TraceError, match=message):
        load(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TraceError, match=r"none\.csv cannot be read"):
        load(tmp_path / "none.csv")


@pytest.mark.parametrize("holes", [0.0, 0.5, 0.9])
def test_block_tables(holes):
    lengths = [33, 16, 1, 100]
    tables, pages = block_tables(lengths, 16, holes, np.random.default_rng(0))
    held = tables[tables > 0]
    assert len(held) == len(set(held)) == 3 + 1 + 1 + 7
    assert held.max() < pages
    assert pages - 1 == pytest.approx(12 / (1 - holes), abs=1)
    assert [(row > 0).sum() for row in tables] == [3, 1, 1, 7]
    with pytest.raises(ValueError, match=r"holes=1\.0"):
        block_tables(lengths, 16, 1.0, np.random.default_rng(0))


def test_a_loop_asks_the_policy_when_rows_change_and_now_and_then():
    alone = list(decode_steps([Request(100, 130)], 1))
    assert decisions_a_step(alone) == pytest.approx(3 / 130)  # at the first step and 64 and 128 after it
    changing = [[10, 20], [11, 21], [12], [13, 5], [14, 6]]
    assert decisions_a_step(changing) == pytest.approx(3 / 5)
