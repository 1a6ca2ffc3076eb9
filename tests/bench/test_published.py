"""Which records a table compares, and the tables: of small records made here, and those of the committed pages."""

from __future__ import annotations

import json

import pytest

from pkv_hf.bench.results import published
from pkv_hf.bench.results.published import NO_GPU_RUN, of_every_gpu, of_one_run
from pkv_hf.errors import UsageError

PLACE = {"gpu": "NVIDIA X", "torch": "2", "transformers": "5", "commit": "abc"}


def measured(engine: str, **fields) -> dict:
    return {**PLACE, "case": 1, "engine": engine, **fields}


def times_of(records: list[dict], *needs: tuple[str, ...]) -> list[dict[str, int]]:
    """Of each case what was chosen: the place of each engine's record among all."""
    numbered = [{**record, "place": place} for place, record in enumerate(records)]
    return [{r["engine"]: r["place"] for r in run} for run in of_one_run(numbered, ("case",), *needs)]


BOTH = ("base", "ours")


@pytest.mark.parametrize("field", ["commit", "torch", "transformers", "gpu"])
def test_a_comparison_is_of_one_run(field):
    old = [measured("base"), measured("ours")]
    assert times_of([*old, measured("ours", **{field: "other"})], BOTH) == [{"base": 0, "ours": 1}]
    whole = [*old, measured("ours", **{field: "other"}), measured("base", **{field: "other"})]
    newer = {"ours": 2, "base": 3}
    assert times_of(whole, BOTH) == ([{"base": 0, "ours": 1}, newer] if field == "gpu" else [newer])


def test_the_run_with_every_peer_is_preferred_to_a_newer_one():
    records = [*map(measured, ("base", "peer", "ours")), *(measured(engine, commit="new") for engine in BOTH)]
    assert times_of(records, ("base", "peer", "ours"), BOTH) == [{"base": 0, "peer": 1, "ours": 2}]
    assert times_of(records, BOTH) == [{"base": 3, "ours": 4}]
    assert times_of(records[3:], ("base", "peer", "ours"), BOTH) == [{"base": 0, "ours": 1}]
    assert times_of(records, ("base", "nobody")) == []


def test_a_run_that_goes_on_is_the_newest():
    records = [measured("base"), measured("base", commit="b"), measured("ours", commit="b"), measured("ours")]
    assert times_of(records, BOTH) == [{"base": 0, "ours": 3}]


def test_of_a_case_that_a_run_measures_again_the_last_whole_time_counts():
    records = list(map(measured, ("base", "ours", "base", "ours", "base", "peer")))
    assert times_of(records, BOTH) == [{"base": 2, "ours": 3}]
    assert times_of(records, ("base", "peer", "ours")) == [{"base": 4, "ours": 3, "peer": 5}]


def test_cases_and_parts_stay_apart():
    records = [measured(engine, case=case, seed=seed) for case in (1, 2) for engine in BOTH for seed in (5, 6)]
    assert [len(run) for run in of_one_run(records, ("case",), BOTH, parts=("seed",))] == [4, 4]
    assert [len(run) for run in of_one_run(records, ("case",), (5, 6), engine="seed")] == [2, 2]


def test_a_table_is_of_one_gpu():
    records = [measured("base", gpu=gpu) for gpu in ("Y", "X", "Y")]
    assert of_every_gpu(records, lambda found: f"{[r['gpu'] for r in found]}") == "['Y', 'Y']\n['X']"
    assert of_every_gpu(records, lambda found: "") == of_every_gpu([], str) == NO_GPU_RUN


def test_a_table_says_what_it_was_measured_on_and_leaves_out_what_no_row_has():
    rows = [measured("base"), measured("ours", transformers="6", commit="def"), measured("ours", commit="bcd")]
    columns = {"engine": lambda r: r["engine"], "none": lambda r: "-", "some": lambda r: "-" if r is rows[0] else "1"}
    assert published.table(columns, rows, rows) == (
        "| engine | some |\n| --- | ---: |\n| base | - |\n| ours | 1 |\n| ours | 1 |\n"
        "\nMeasured on: NVIDIA X; torch 2, transformers 5, commits abc, bcd; torch 2, transformers 6, commit def.\n"
    )
    assert published.table(columns, [], []) == ""


@pytest.fixture
def tables(run, tmp_path, monkeypatch):
    """The tables by name, of records that `tables.write` has written."""
    module = run.load("make_pages")
    monkeypatch.setattr("pages.RESULTS", tmp_path)

    def made(name):
        return module.TABLES[name]()

    def write(name, lines):
        (tmp_path / name).write_text("\n".join(json.dumps({**PLACE, **line}) for line in lines))

    made.write = write
    return made


def test_pages_show_the_committed_results(run):
    assert run("make_pages", "--check") == (0, [])


def test_every_table_is_on_a_page(run):
    module = run.load("make_pages")
    asked = {name for page in module.PAGES for _, name, _ in published.MARKS.findall(page.read_text())}
    assert asked == set(module.TABLES)


def test_a_mark_that_nothing_fills_is_named(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- generated: nothing -->\n<!-- end -->")
    with pytest.raises(UsageError, match=r"page\.md asks for nothing"):
        published.write({}, [page], check=True)


TIMES = {"step_ms_p20": 9.0, "step_ms_p80": 99.0, "percent_of_floor": 50.0, "first_token_ms": 1e3, "peak_gib": 2.0,
         "floor_ms": 5.0, "read_gb_s": 3000.0}  # fmt: skip
GREEDY = {"model": "m", "dtype": "bfloat16", "lengths": [64], "kv_bytes": 2**20, "tokens_match": True, **TIMES}


def decoded(speeds: dict[str, float], **fields) -> list[dict]:
    return [
        {**GREEDY, **fields, "engine": engine, "route": "split" if engine == "patched" else None, "step_ms_p50": ms}
        for engine, ms in speeds.items()
    ]


def cells(made: str, line: int) -> dict[str, str]:
    """A row of a table by the columns' names."""
    header, _, *rows = [line.strip("| ").split(" | ") for line in made.splitlines() if line.startswith("|")]
    return dict(zip(header, rows[line]))


def test_tables_of_modes_and_of_greedy_decoding_stay_apart(tables):
    assert tables("generate-modes") == NO_GPU_RUN
    beams, assisted = {"mode": "beams", "num_beams": 4}, {"mode": "assisted", "assistant": "d"}
    assisted |= {"draft_tokens": 5, "tokens_per_step": 1.5}
    tables.write("generate.jsonl", [
        *decoded({"dynamic": 20.0, "static-compile": 15.0, "patched": 10.0}, logit_error=0.0123),
        *decoded({"dynamic": 40.0, "patched": 10.0}, **beams),
        *decoded({"dynamic": 90.0, "patched": 15.0}, **assisted),
    ])  # fmt: skip
    ours = cells(tables("generate-gpu"), 2)
    assert (ours["case"], ours["engine"], ours["over `dynamic`"]) == ("m bfloat16, 1 x 64", "patched (split)", "2.00x")
    assert (ours["over `static-compile`"], ours["logit error"]) == ("1.50x", "1.2e-02")
    assert ours["GB/s (of the floor)"] == "1,500 (50 %)"
    of_beams, of_drafts = (cells(tables("generate-modes"), line) for line in (1, 3))
    assert of_beams["case"] == "m bfloat16, 1 x 64, 4 beams"
    assert (of_beams["over `dynamic`"], of_beams["tokens a step"]) == ("4.00x", "1.00")
    assert "5 tokens a round from d" in of_drafts["case"]
    assert (of_drafts["over `dynamic`"], of_drafts["tokens a step"]) == ("6.00x", "1.50")


def test_gpus_and_runs_are_not_compared_with_each_other(tables):
    speeds = {"dynamic": 20.0, "static-compile": 15.0, "patched": 10.0}
    tables.write("generate.jsonl", [
        *decoded(speeds),
        *decoded({"dynamic": 60.0, "patched": 10.0}, gpu="NVIDIA Y"),
        *decoded({"dynamic": 80.0}, commit="later"),
    ])  # fmt: skip
    first, second = tables("generate-gpu").split("\n\n| ")
    assert "Measured on: NVIDIA X" in first
    assert cells(first, 2)["over `dynamic`"] == "2.00x"
    assert "Measured on: NVIDIA Y" in second
    assert cells(f"| {second}", 1)["over `dynamic`"] == "6.00x"
    assert "static-compile" not in second


def test_the_headline_is_of_one_run_with_both_peers(tables):
    assert tables("headline") == NO_GPU_RUN
    shape = {"model": "llama-3.1-8b", "gpu": "NVIDIA H100 80GB HBM3", "lengths": [8192]}
    three = {"dynamic": 30.0, "static-compile": 15.0, "patched": 6.0}
    two = {"dynamic": 60.0, "patched": 6.0}
    tables.write("generate.jsonl", [
        *decoded(three, **shape),
        *decoded(two, **shape, commit="later"),
        *decoded(three, **{**shape, "gpu": "NVIDIA Y", "lengths": [32_768]}),
    ])  # fmt: skip
    says, *rows = tables("headline").splitlines()
    assert "Tokens come 2.5 times as fast as with transformers' static cache" in says
    assert "at 8,192 tokens of context. " in says
    assert "this is 50 % of that speed. Against the default cache it is 5 to 10 times at 8,192 tokens." in says
    assert "| 8,192 tokens: ms a token after the first | 30.00 | 15.00 | 6.00 |" in rows
    assert rows[-1] == "Measured on: NVIDIA H100 80GB HBM3; torch 2, transformers 5, commit abc."


def test_the_table_of_quantised_pages_compares_with_the_same_route_unquantised(tables):
    assert tables("quantised") == NO_GPU_RUN
    from pages import performance

    case = {**performance.QUANTISED, "query_heads": 32, "gb_s": 2e3, "percent_of_read": 70.0}
    times = (
        ("split", "same", 200.0),
        ("workqueue", "same", 150.0),
        ("split", "int8", 100.0),
        ("workqueue", "fp8", 100.0),
    )
    lines = [{**case, "engine": engine, "kv_dtype": pages, "gpu_us": us} for engine, pages, us in times]
    elsewhere = ({"length": 8192}, {"gpu": "NVIDIA Y", "kv_dtype": "same"}, {"commit": "later", "kv_dtype": "same"})
    tables.write("attention.jsonl", [*lines, *({**lines[2], "gpu_us": 1.0, **other} for other in elsewhere)])
    rows = tables("quantised").splitlines()[2:]
    assert [row.split(" | ")[-1] for row in rows[:4]] == ["1.00x |", "1.00x |", "2.00x |", "1.50x |"]
    assert rows[4:] == ["", "Measured on: NVIDIA X; torch 2, transformers 5, commit abc."]


def test_the_table_of_fine_tuning_shows_what_serving_gained(tables):
    assert tables("finetune") == NO_GPU_RUN
    case = {"model": "m", "dtype": "bfloat16", "rank": 8, "steps": 60, "batch": 8, "block": 512, "prompts": 4}
    case |= {"new_tokens": 64, "perplexity_before": 9.5, "perplexity_after": 7.25}
    times = {"step_ms_p20": 4.0, "step_ms_p50": 5.0, "step_ms_p80": 6.0}
    times |= {f"{name}_unpatched": 10 * ms for name, ms in times.items()}
    case |= {"tokens_identical": False, **times}
    stored = ({"weight_bits": None}, {"weight_bits": 4}, {"weights": None}, {"weights": "nf4"}, {"weights": "int8"})
    tables.write("finetune.jsonl", [{**case, **fields} for fields in stored])
    plain, four_bits, int8, *rest = tables("finetune").splitlines()[2:]  # fields of before name the same weights
    assert (len(rest), "m bfloat16, int8 weights, rank 8" in int8) == (2, True)
    assert "| 9.50 to 7.25 | 4 x 64 | 50.00 (40.00 to 60.00) | 5.00 (4.00 to 6.00) | 10.00x | no |" in plain
    assert "m bfloat16, NF4 weights, rank 8, 60 steps of 8 x 512" in four_bits


def test_weights_and_adapters_are_cases_of_their_own(tables):
    case = {"model": "m", "dtype": "bfloat16", "lengths": [8], "tokens_match": True, "kv_bytes": 0, "peak_gib": 1.0}
    case |= {"percent_of_floor": 50, "read_gb_s": 1000, "floor_ms": 1, "first_token_ms": 1, "route": None}
    stored = ({"weight_bits": None}, {"weight_bits": 4}, {"weights": None, "adapter": "lora-r4"}, {"weights": "nf4"})
    engines = {"dynamic": 4.0, "patched-no-fuse": 2.0, "patched": 1.0}
    made = [
        {**case, **fields, "engine": engine, **{f"step_ms_{name}": ms + i for name in ("p20", "p50", "p80")}}
        for i, fields in enumerate(stored) for engine, ms in engines.items()
    ]  # fmt: skip
    tables.write("generate.jsonl", made)
    found = [row.split(" | ")[:3] for row in tables("generate-gpu").splitlines()[2:-2]]
    assert [(name.strip("| "), engine, ms[:4]) for name, engine, ms in found] == [
        ("m bfloat16, 1 x 8", "dynamic", "4.00"), ("m bfloat16, 1 x 8", "patched", "1.00"),
        *[("m bfloat16, LoRA of rank 4, 1 x 8", engine, f"{ms + 2:.2f}") for engine, ms in engines.items()],
        *[("m bfloat16, NF4 weights, 1 x 8", engine, f"{ms + 3:.2f}") for engine, ms in engines.items()],
    ]  # fmt: skip


def test_perplexity_says_whether_its_target_is_met(run):
    run.load("make_pages")
    from pages import quality

    found = [
        quality.target(
            {"dtype": "bfloat16", "kv_dtype": pages, "difference_percent": percent, "difference_error_percent": error}
        )
        for pages, percent, error in ((None, 0.04, 0.01), (None, -0.06, 0.001), (None, 0.06, 0.02), ("int8", 0.6, 0.01))
    ]
    assert found == ["0.05 %: met", "0.05 %: missed", "0.05 %: too few tokens to tell", "0.5 %: missed"]


def test_the_tables_of_layers_are_of_the_shapes_that_have_a_name(tables):
    assert tables("shapes") == tables("layers-checked") == tables("self-check") == NO_GPU_RUN
    step = {"step_ms_p20": 1, "step_ms_p80": 1, "dtype": "bfloat16", "weight_bits": None, "route": "split"}
    made = []
    for model, length, ms in (
        ("glm-4-9b", 512, 4.0),
        ("glm-4-9b", 8192, 5.0),
        ("gemma-3-4b", 8192, 2.0),
        ("gemma-3-4b", 16_384, 3.0),
        ("llama-3.1-8b", 8192, 6.0),
        ("mine", 8192, 1.0),
    ):
        case = {**step, "model": model, "lengths": [length]}
        made += [
            {**case, "engine": "dynamic", "step_ms_p50": 4 * ms, "percent_of_floor": 22.0, "logit_error": 0.04},
            {**case, "engine": "patched", "step_ms_p50": ms, "percent_of_floor": 88.0, "logit_error": 0.05},
        ]
    tables.write("generate.jsonl", made)
    assert tables("shapes").splitlines()[2:4] == [
        "| gemma-3-4b | google/gemma-3-4b-it | 8,192 | 2.00 | 88 % | 8.00 | 22 % | 1.25 |",
        "| glm-4-9b | zai-org/GLM-4-9B-0414 | 8,192 | 5.00 | 88 % | 20.00 | 22 % | 1.25 |",
    ]
    errors = {"fused": 3, "layers": 4, "logit_error": 3e-3, "own_logit_error": 2e-3, "tokens_equal": True}
    both = {"right": True, "float32": errors, "bfloat16": errors}
    check = {"fused": 40, "layers": 40, "first_s": 9.0, "compiled_s": 1.25, "dtype": "bfloat16"}
    tables.write("layers.jsonl", [
        {"part": "models", "name": "glm-4-9b", **both}, {"part": "altered", "name": "bias", "model": "m", **both},
        {"part": "models", "name": "failed", "error": "E: e"},
        {"part": "self-check", "name": "big", **check, "peak_bytes": 3 << 20, "layer_float32_bytes": 2 << 20},
    ])  # fmt: skip
    assert tables("layers-checked").splitlines()[2:4] == [
        "| glm-4-9b | 3 of 4 | yes | 3.0e-03 | 1.50 |", "| m, altered: bias | 3 of 4 | yes | 3.0e-03 | 1.50 |",
    ]  # fmt: skip
    assert tables("self-check").splitlines()[2] == "| big bfloat16 | 40 of 40 | 9.0 | 1.25 | 3 | 2 |"
