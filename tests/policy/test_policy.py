"""Which route a step takes, and what is said about it."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

import pkv_hf
from pkv_hf.errors import RouteError
from pkv_hf.kernels import launch
from pkv_hf.kernels.launch import splits_for
from pkv_hf.policy.choose import HYSTERESIS, choose
from pkv_hf.replaced import STATE
from pkv_hf.routes.base import Rejected, StepShape
from pkv_hf.routes.costs import MODES, Constants, RouteConstants, Work, from_properties, predict
from pkv_hf.routes.registry import ROUTES
from tiny import tiny

pytest.importorskip("triton")

CPU = torch.device("cpu")


def shape_of(lengths, **changes) -> StepShape:
    """A step that the interpreter takes; its device is a made-up GPU of four multiprocessors."""
    shape = StepShape(
        device=CPU, dtype=torch.float16, kv_dtype=torch.float16, q_len=1, group=4, kv_heads=8, head_dim=128,
        page_size=16, layers=32, rows=len(lengths), tokens=sum(lengths), longest=max(lengths), padded=False,
        windowed=False, autocast=False, captured=True, named=True,
    )  # fmt: skip
    return dataclasses.replace(shape, **changes)


def constants(**routes: RouteConstants) -> Constants:
    return Constants({mode: {4: routes} for mode in MODES}, "a test")


EQUAL = RouteConstants(bandwidth=1e12, min_parallel=1.0, launch_s=4e-6)


def test_the_model_is_the_papers():
    work = Work(kv_bytes=3_000_000, parallel=0.5, launches=2, merge_bytes=100_000)
    found = predict(work, RouteConstants(1e12, 1.5, 4e-6, plan_s=32e-6), layers=16)
    assert found == pytest.approx(3e-6 * 3 + 2 * 4e-6 + 0.1e-6 + 2e-6)
    enough = dataclasses.replace(work, parallel=7.0)
    assert predict(enough, RouteConstants(1e12, 1.5, 4e-6)) == pytest.approx(3e-6 + 8e-6 + 0.1e-6)


@pytest.mark.parametrize("lengths", [[4096], [4096] * 3, [30_000, 500, 500, 9000], [100], [1, 1], [70_000] + [64] * 20])
@pytest.mark.parametrize("name", ["split", "workqueue"])
def test_work_is_what_the_launches_do(name, lengths):
    """Parallelism by counting the tiles of every program, as the kernels cut them."""
    shape = shape_of(lengths)
    tile, processors = shape.tile.tokens, shape.processors
    tiles = [-(-length // tile) for length in lengths]
    if name == "split":
        splits = max(1, min(-(-max(lengths) // tile) + 1, 2 * processors // (len(lengths) * 8)))
        programs = [(s + 1) * t // splits - s * t // splits for t in tiles for s in range(splits)] * 8
    else:
        total = 8 * sum(tiles)
        count = min(2 * processors, total)
        programs = [(c + 1) * total // count - c * total // count for c in range(count)]
    exact = 8 * sum(lengths) / (max(programs) * tile * processors)
    work = ROUTES[name].work(shape)
    assert work.kv_bytes == sum(lengths) * 8 * 128 * 2 * 2
    # a tile more or less for rows that end inside one: exact for rows of many tiles
    slack = 2 * (1 + len(lengths)) / max(programs)
    assert work.parallel == pytest.approx(exact, rel=max(0.05, slack))


def test_equal_rows_are_split_and_ragged_rows_queued_by_the_devices_properties():
    assert choose("auto", shape_of([32_768])).route.name == "split"
    assert choose("auto", shape_of([8192] * 4)).route.name == "split"
    assert choose("auto", shape_of([65_536] + [2000] * 7, kv_heads=1)).route.name == "workqueue"


@pytest.mark.parametrize(
    ("items", "tiles", "parts"), [(8, 128, 32), (8, 129, 32), (4, 1000, 64), (64, 128, 4), (8, 3, 3), (1000, 50, 1)]
)
def test_rows_are_cut_to_fill_the_device_and_no_merge_goes_around_for_a_few_parts(items, tiles, parts):
    assert splits_for(items, tiles, processors=132) == parts


def test_the_fastest_by_prediction_is_taken():
    slow = dataclasses.replace(EQUAL, bandwidth=0.2e12)
    assert choose("auto", shape_of([8192]), constants=constants(split=slow, workqueue=EQUAL)).route.name == "workqueue"
    assert choose("auto", shape_of([8192]), constants=constants(split=EQUAL, workqueue=slow)).route.name == "split"


def test_an_append_that_is_no_part_of_attention_counts_as_a_launch():
    for lengths, name in itertools.product(([8192], [4096] * 3), ("split", "workqueue", "flashinfer_xqa")):
        alone, fused = (ROUTES[name].work(shape_of(lengths, fused=fused)).launches for fused in (False, True))
        assert fused - alone == (name != "split")
        alone, fused = (ROUTES[name].work(shape_of(lengths, q_len=2, fused=fused)).launches for fused in (False, True))
        assert fused - alone == 1
    known = constants(split=dataclasses.replace(EQUAL, launch_s=9e-6), workqueue=EQUAL)
    assert choose("auto", shape_of([33_000] * 2), constants=known).route.name == "workqueue"
    assert choose("auto", shape_of([33_000] * 2, fused=True), constants=known).route.name == "split"


@pytest.mark.parametrize("fuse", [True, False])
def test_steps_are_decided_on_as_layers_are_to_run(fuse):
    with pkv_hf.patched(tiny("llama"), fuse=fuse) as model:
        model.generate(torch.randint(1, 100, (1, 9)), max_new_tokens=3, do_sample=False)
        assert getattr(model, STATE).decision.shape.fused == fuse


def test_layers_of_several_kinds_take_one_route():
    slow = dataclasses.replace(EQUAL, bandwidth=0.2e12)
    known = Constants({"graph": {1: {"split": EQUAL, "workqueue": slow}, 8: {"split": slow, "workqueue": EQUAL}}}, "")
    few, many = shape_of([8192], group=1, layers=2), shape_of([8192], group=8, layers=30)
    assert choose("auto", few, constants=known, others=(many,)).route.name == "workqueue"
    more = dataclasses.replace(few, layers=200)
    decision = choose("auto", more, constants=known, others=(many,))
    assert decision.route.name == "split"
    by_kind = [choose("auto", shape, constants=known).seconds["split"] for shape in (more, many)]
    assert decision.seconds["split"] == pytest.approx((200 * by_kind[0] + 30 * by_kind[1]) / 230)
    assert repr(decision).count("KV heads of 128") == 2


def test_a_route_serves_layers_of_every_kind_or_none():
    plain, odd = shape_of([8192]), shape_of([8192], head_dim=72)
    decision = choose("auto", plain)
    again = choose("auto", plain, others=(odd,), before=decision)
    assert (decision.route.name, again.route.name) == ("split", "sdpa")
    assert again.rejected["split"] == "head_dim 72 is not a multiple of 16 up to 512"
    assert choose("auto", plain, before=again).route.name == "split"


def test_constants_of_the_nearest_group_and_of_the_mode_count():
    slow = dataclasses.replace(EQUAL, bandwidth=0.2e12)
    split_best, queue_best = {"split": EQUAL, "workqueue": slow}, {"split": slow, "workqueue": EQUAL}
    known = Constants({"graph": {1: split_best, 8: queue_best}, "eager": {4: split_best}}, "a test")
    taken = {
        group: choose("auto", shape_of([8192], group=group), constants=known).route.name for group in (1, 2, 3, 7, 16)
    }
    assert taken == {1: "split", 2: "split", 3: "workqueue", 7: "workqueue", 16: "workqueue"}
    eager = shape_of([8192], group=8, captured=False)
    assert choose("auto", eager, constants=known).route.name == "split"


def test_a_cache_keeps_its_route_until_another_is_clearly_faster():
    def taken(gain, last):
        faster = dataclasses.replace(EQUAL, bandwidth=1e12 * (1 + gain), launch_s=0.0)
        slower = dataclasses.replace(EQUAL, launch_s=0.0)
        shape = shape_of([80_000] * 4)
        return choose("auto", shape, last, constants(split=slower, workqueue=faster)).route.name

    assert taken(HYSTERESIS / 2, None) == "workqueue"
    assert taken(HYSTERESIS / 2, "split") == "split"
    assert taken(4 * HYSTERESIS, "split") == "workqueue"
    assert taken(HYSTERESIS / 2, "sdpa") == "workqueue"  # no prediction holds it there


def test_what_routes_answered_holds_for_other_rows_alone(monkeypatch):
    before = choose("auto", shape_of([8192]))
    monkeypatch.setattr(ROUTES["workqueue"], "supports", lambda shape: Rejected("asked again"))
    longer = shape_of([65_536] + [2000] * 7)
    assert "workqueue" not in choose("auto", longer, before=before).rejected
    assert choose("auto", longer).rejected["workqueue"] == "asked again"
    other = dataclasses.replace(longer, head_dim=64)
    assert choose("auto", other, before=before).rejected["workqueue"] == "asked again"


def test_every_route_has_a_prediction_or_a_reason():
    decision = choose("auto", shape_of([8192], captured=False))
    assert [candidate.route for candidate in decision.candidates] == list(ROUTES)
    for candidate in decision.candidates:
        known = candidate.seconds is not None
        assert known != (candidate.rejected is not None) or candidate.route == "sdpa"
    assert decision.rejected["flashinfer"] == "flashinfer is not installed"


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "version", "reason"),
    [
        (torch.bfloat16, torch.bfloat16, (7, 5), "bfloat16 needs sm_80 or newer, this is sm_75"),
        (torch.bfloat16, torch.bfloat16, (8, 0), None),
        (torch.float16, torch.float8_e4m3fn, (8, 6), "fp8 pages need sm_89 or newer, this is sm_86: use int8"),
        (torch.float16, torch.float8_e4m3fn, (8, 9), None),
        (torch.float16, torch.int8, (7, 5), None),
    ],
)
def test_older_gpus_serve_the_dtypes_that_they_have(monkeypatch, dtype, kv_dtype, version, reason):
    pytest.importorskip("triton")
    monkeypatch.setattr(launch, "_properties", lambda _: (4, 64 * 1024, version))
    shape = shape_of([100], device=torch.device("cuda", 0), dtype=dtype, kv_dtype=kv_dtype)
    answers = [ROUTES[name].supports(shape) for name in ("split", "workqueue")]
    assert [getattr(answer, "reason", None) for answer in answers] == [reason] * 2


@pytest.mark.parametrize(
    ("changes", "route", "reason"),
    [
        ({"autocast": True}, "split", "under autocast"),
        ({"kv_dtype": torch.float32}, "workqueue", r"queries are torch.float16, pages torch.float32"),
        ({"dtype": torch.float64, "kv_dtype": torch.float64}, "split", r"torch.float64 is not one of"),
        ({"head_dim": 72}, "split", "head_dim 72 is not a multiple of 16"),
        ({"group": 17}, "workqueue", "17 query heads a KV head"),
    ],
)
def test_what_no_kernel_takes_goes_to_torch_and_raises_where_it_was_named(changes, route, reason):
    shape = shape_of([100], **changes)
    decision = choose("auto", shape)
    assert decision.route.name == "sdpa"
    with pytest.raises(RouteError, match=reason):
        choose(route, shape)
    assert choose("sdpa", shape).route.name == "sdpa"


@pytest.mark.parametrize(
    ("changes", "route", "reason"),
    [
        ({"q_len": 3}, "flashinfer_xqa", "3 queries a row"),
        ({"dtype": torch.float32}, "flashinfer_tc", "torch.float32 is not one of"),
        ({"head_dim": 80}, "flashinfer_xqa", "head_dim 80 is not one of"),
        ({"padded": True}, "flashinfer_xqa", "left padding"),
        ({"windowed": True}, "flashinfer_tc", "sliding window"),
        ({"group": 7}, "flashinfer", "7 query heads a KV head"),
        ({"value_head_dim": 64}, "flashinfer_tc", "keys have head_dim 128, values 64"),
        ({"sinks": True}, "flashinfer_xqa", "no sinks"),
        ({"softcap": 30.0}, "flashinfer_tc", "no soft-cap"),
        ({"chunked": True}, "flashinfer_xqa", "no chunks"),
        ({"captured": True}, "flashinfer_tc", "cuda_graphs=False"),
        ({"page_size": 256}, "flashinfer_xqa", "page_size 256"),
    ],
)
def test_what_flashinfer_does_not_take(changes, route, reason, monkeypatch):
    monkeypatch.setattr("pkv_hf.routes.flashinfer.installed", lambda name: True)
    answer = ROUTES[route].supports(shape_of([100], **{"captured": False, **changes}))
    assert reason in answer.reason


def test_a_route_without_constants_is_no_candidate_of_auto():
    decision = choose("auto", shape_of([8192]), constants=constants(split=EQUAL))
    assert "pkv-hf calibrate" in decision.rejected["workqueue"]
    assert choose("workqueue", shape_of([8192]), constants=constants(split=EQUAL)).route.name == "workqueue"


def test_explain_says_what_a_model_took_and_why(capsys):
    model = pkv_hf.patch(tiny("llama"), route="workqueue")
    with pytest.raises(ValueError, match="has run no step yet"):
        pkv_hf.explain(model)
    model.generate(torch.arange(2, 42)[None], max_new_tokens=3)
    decision = pkv_hf.explain(model)
    assert not capsys.readouterr().out  # or a notebook would show it twice
    out = repr(decision)
    assert out == str(decision)
    assert decision.route.name == "workqueue"
    assert "over 42 tokens" in out
    assert [line for line in out.splitlines() if line.startswith("workqueue") and line.endswith("taken")]
    assert [line for line in out.splitlines() if line.startswith("flashinfer ") and "not installed" in line]
    with pytest.raises(ValueError, match="not patched"):
        pkv_hf.explain(tiny("llama"))


def test_explain_takes_a_step_that_never_ran():
    decision = pkv_hf.explain(shape_of([65_536] + [2000] * 7, kv_heads=1))
    assert decision.route.name == "workqueue"
    assert "8 x 1 queries over 79,536 tokens, 65,536 at most" in str(decision)


def test_lengths_are_what_rows_attend_to():
    """Padding does not count, nor what lies behind a window that all layers have."""
    tokens = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :33] = 0
    for family, expected in (("llama", (42 + 9, 42)), ("mistral", (24 + 9, 24))):
        model = pkv_hf.patch(tiny(family))
        model.generate(tokens, attention_mask=mask, max_new_tokens=3)
        shape = model._pkv_hf_state.decision.shape
        assert (shape.tokens, shape.longest) == expected
        assert shape.padded
        assert shape.windowed == (family == "mistral")


def test_sane_constants_stand_in_for_a_calibration():
    known = from_properties(CPU)
    for mode, group in itertools.product(MODES, (1, 5, 16)):
        assert set(known.of(mode, group)) == {"split", "workqueue"}
    assert "pkv-hf calibrate" in known.source


def test_random_steps_are_decided():
    rng = np.random.default_rng()
    for _ in range(200):
        lengths = rng.integers(1, 100_000, rng.integers(1, 65)).tolist()
        shape = shape_of(lengths, group=int(rng.integers(1, 17)), q_len=int(rng.integers(1, 9)), captured=True)
        assert choose("auto", shape).route.name in ROUTES
