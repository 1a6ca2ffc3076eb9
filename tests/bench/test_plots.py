"""Pictures: of the committed records, and what the scripts draw of small ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from pkv_hf.bench.results import charts
from places import ROOT

IMAGES = ROOT / "docs" / "images"
PLACE = {"gpu": "NVIDIA X", "torch": "2", "transformers": "5", "commit": "abc"}
MOST_PIXELS, MOST_BYTES = 1200, 100_000


def pixels(path: Path) -> int:
    """The width of a PNG."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">I", data[16:20])[0]


def drawn(run, script: str, *arguments) -> list[Path]:
    status, lines = run(script, *arguments)
    assert status == 0
    return [Path(name) for name in json.loads(lines[-1])["plots"]]


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps({**PLACE, **record}) for record in records))
    return path


def test_the_committed_pictures_are_those_that_the_scripts_draw(run, tmp_path):
    scripts = ("plot_results", "plot_attention", "plot_quality")
    made = [path for script in scripts for path in drawn(run, script, "--out", tmp_path)]
    committed = sorted(IMAGES.iterdir())
    assert [path.name for path in committed] == sorted(path.name for path in made)
    for path in committed:
        assert np.array_equal(imread(path), imread(tmp_path / path.name)), f"{path.name} is stale: run make readme"
        assert pixels(path) <= MOST_PIXELS
        assert path.stat().st_size < MOST_BYTES


@pytest.fixture
def panels(monkeypatch):
    """What is drawn: the axes of every picture by its name, kept from being closed."""
    found = {}

    def keep(figure, path):
        found[path.stem] = figure.axes
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)

    monkeypatch.setattr(charts, "write", keep)
    yield found
    charts.pyplot().close("all")


def decoded(length: list[int], **ms: float) -> list[dict]:
    return [
        {"model": "llama-3.1-8b", "dtype": "bfloat16", "lengths": length, "engine": engine, "step_ms_p50": step,
         "floor_ms": 5.0} for engine, step in ms.items()
    ]  # fmt: skip


def test_decode_steps_are_of_one_gpu_and_one_run(run, tmp_path, panels):
    lines = [
        *decoded([512], dynamic=20.0, patched=6.0),
        *decoded([8192], dynamic=25.0, patched=7.0),
        *decoded([8192] * 2, dynamic=40.0, patched=8.0),
        *({**r, "gpu": "NVIDIA Y"} for r in decoded([8192], dynamic=1.0, patched=1.0)),
        *({**r, "commit": "later"} for r in decoded([8192], dynamic=1.0)),
        *({**r, "mode": "beams"} for r in decoded([8192], dynamic=1.0, patched=1.0)),
    ]
    results = write(tmp_path / "generate.jsonl", lines)
    files = drawn(run, "plot_results", "--results", results, "--gpu", "NVIDIA X", "--out", tmp_path)
    assert [path.name for path in files] == ["decode.png", "batches.png"]
    (axes,) = panels["decode"]
    lines = {line.get_color(): list(line.get_xydata().ravel()) for line in axes.lines}
    assert lines == {
        charts.COLOURS["dynamic"]: [512, 20, 8192, 25],
        charts.COLOURS["patched"]: [512, 6, 8192, 7],
        charts.LIMIT: [512, 5, 8192, 5],
    }
    (axes,) = panels["batches"]
    assert [bar.get_width() for bar in axes.patches] == [40, 8]


def test_attention_is_drawn_of_one_page_size_and_dtype(run, tmp_path, panels):
    plain = {"query_heads": 32, "group": 4, "head_dim": 128, "page_size": 16, "holes": 0.0, "dtype": "float16",
             "kv_dtype": "same", "splits": 0, "gpu_us": 20.0}  # fmt: skip
    others = ({}, {"page_size": 32}, {"dtype": "bfloat16"}, {"gpu": "NVIDIA Y"}, {"order": "consecutive"})
    lines = [
        {**plain, "rows": rows, "length": length, "engine": engine, "percent_of_read": 50.0 + 20 * (not other), **other}
        for other in others for rows in (1, 8) for length in (8192, 32_768)
        for engine in ("split", "workqueue", "flashinfer_tc")
    ]  # fmt: skip
    write(tmp_path / "attention.jsonl", lines)
    files = drawn(run, "plot_attention", "--results", tmp_path, "--gpu", "NVIDIA X", "--out", tmp_path)
    assert [path.name for path in files] == ["attention.png"]
    one_row, four_rows, *_ = panels["attention"]
    points = {line.get_label(): list(line.get_xydata().ravel()) for line in one_row.lines if len(line.get_xdata())}
    assert points.keys() == {"split", "workqueue", "FlashInfer tensor cores"}
    assert all(line == [8192, 70, 32_768, 70] for line in points.values())
    assert not any(len(line.get_xdata()) for line in four_rows.lines)


def test_traces_are_drawn_beside_the_fastest_of_flashinfer(run, tmp_path, panels):
    speeds = {"split": 900, "workqueue": 900, "flashinfer": 500, "flashinfer_tc": 800, "flashinfer_xqa": 600}
    lines = [
        {"trace": "bimodal", "seed": seed, "max_active": 8, "group": 4, "head_dim": 128, "page_size": 16, "holes": 0.0,
         "dtype": "float16", "layers": layers, "graph": graph, "engine": engine, "tokens_per_s_wall": speed}
        for seed in (5, 6) for graph in (False, True) for layers in (1, 32)
        for engine, speed in (*speeds.items(), ("policy", (1000 if seed == 5 else 1400) if graph else 1))
    ]  # fmt: skip
    write(tmp_path / "traces.jsonl", lines)
    files = drawn(run, "plot_attention", "--results", tmp_path, "--gpu", "NVIDIA X", "--out", tmp_path)
    assert [path.name for path in files] == ["traces.png", "traces-model.png"]
    (axes,) = panels["traces"]
    assert [bar.get_width() for bar in axes.patches] == [1.5]
    assert [text.get_text() for text in axes.texts] == ["1.50 (FlashInfer tensor cores)"]


def test_the_difference_of_perplexity_is_drawn_with_its_error(run, tmp_path, panels):
    case = {"model": "m", "dtype": "bfloat16", "text": "t", "mode": "chunk", "context": 64, "windows": 2}
    lines = [
        {**case, "kv_dtype": "int8", "difference_percent": 0.2, "difference_error_percent": 0.05},
        {**case, "kv_dtype": None, "difference_percent": 9.0, "commit": "before"},
        {**case, "kv_dtype": None, "difference_percent": -0.1},
        {**case, "kv_dtype": "int8", "context": 128, "rope_scaling": "yarn:2", "difference_percent": 0.3},
        {**case, "mode": "decode", "kv_dtype": None, "difference_percent": 5.0},
    ]
    results = write(tmp_path / "perplexity.jsonl", lines)
    drawn(run, "plot_quality", "--results", results, "--gpu", "NVIDIA X", "--out", tmp_path)
    (axes,) = panels["perplexity"]
    assert [text.get_text() for text in axes.texts] == ["+0.300 %", "+0.200 ± 0.050 %", "-0.100 %"]  # from below
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["int8 pages, chunk, 2 x 128, yarn:2", "int8 pages, chunk, 2 x 64", "bfloat16 pages, chunk, 2 x 64"]
    bounds = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "|" and len(line.get_xdata()) == 2]
    assert [-0.05, 0.05] in bounds
    assert [-0.5, 0.5] in bounds


def test_labels_at_the_ends_of_lines_stay_apart():
    figure, axes = charts.panel(3, "")
    axes.set(xlim=(0, 1), ylim=(0, 100))
    figure.draw_without_rendering()
    charts.end_labels(axes, {"a": (1, 50, "k"), "b": (1, 51, "k"), "c": (1, 90, "k")}, apart=14)
    points = 72 / figure.dpi
    heights = {t.get_text(): axes.transData.transform(t.xy)[1] * points + t.xyann[1] for t in axes.texts}
    assert heights["b"] - heights["a"] == pytest.approx(14)
    assert next(text.xyann[1] for text in axes.texts if text.get_text() == "c") == 0
    charts.pyplot().close(figure)


def test_an_engine_has_a_colour_of_its_own_and_a_name():
    assert charts.COLOURS.keys() == charts.NAMES.keys()
    own = {
        engine: colour for engine, colour in charts.COLOURS.items() if engine != "policy"
    }  # which is what is patched
    assert len(set(own.values())) == len(own)
