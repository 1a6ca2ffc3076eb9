"""Published shapes by name, and the floor of their decode steps: against numbers worked out by hand."""

from __future__ import annotations

import json
import weakref

import pytest
import torch

from jsonl import records
from pkv_hf.bench import benchmark
from pkv_hf.bench.floor import Floor
from pkv_hf.bench.inputs.shapes import SHAPES, Drawn
from pkv_hf.bench.inputs.weights import quantised
from tiny import tiny

BILLIONS = {
    "llama-3.1-8b": 8.03, "llama-3.2-1b": 1.24, "gemma-3-4b": 4.30, "glm-4-9b": 9.40, "phi-4-14b": 14.66,
    "olmo-2-7b": 7.30, "smollm3-3b": 3.08, "qwen2.5-7b": 7.62, "qwen3-4b": 4.02, "qwen2.5-vl-7b": 8.29,
    "mistral-small-24b": 24.01, "qwen3.5-4b": 4.21, "qwen3-30b-a3b": 30.53,
    "gpt-oss-20b": 20.91, "mixtral-8x7b": 23.48,
}  # fmt: skip
"""Parameters as the model cards count them, vision towers too where the class has one; half of Mixtral's layers."""


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_parameters_of_their_model_card(name):
    model = SHAPES[name].build(torch.bfloat16, "meta")
    assert round(model.num_parameters() / 1e9, 2) == BILLIONS[name]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.generation_config.eos_token_id is None


@pytest.mark.parametrize("name", ["gemma-3-4b", "qwen2.5-vl-7b", "mistral-small-24b", "qwen3.5-4b"])
def test_small_shapes_run_on_texts_of_random_tokens(name):
    model = SHAPES[name].build(torch.float32, "cpu", small=True)
    inputs = benchmark.prompts(name, model, [300, 9])
    assert not torch.isin(inputs["input_ids"], benchmark.media_tokens(model.config)).any()
    first = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert first.shape == (2, 303)
    assert len({tuple(p.flatten()[:4].tolist()) for p in model.parameters() if p.ndim == 1 and p.numel() > 3}) > 8


@torch.no_grad()
def test_a_shape_is_quantised_without_ever_being_whole(monkeypatch):
    pytest.importorskip("bitsandbytes")
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    draw = Drawn.__getitem__

    def noted(self, key):
        assert len(alive) <= 1, "what was drawn before is still there"
        tensor = draw(self, key)
        if "proj" in self.name:
            alive.add(tensor)
        return tensor

    monkeypatch.setattr(Drawn, "__getitem__", noted)
    model, state = SHAPES["llama-3.1-8b"].drawn(torch.bfloat16, "cpu", small=True)
    made = quantised(model, "nf4", "cpu", state)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert {type(module).__name__ for name, module in made.named_modules() if "proj" in name} == {"Linear4bit"}
    alike = SHAPES["llama-3.1-8b"].build(torch.bfloat16, "cpu", small=True).state_dict()
    for name, tensor in made.state_dict().items():
        if name in alike and tensor.is_floating_point():
            assert tensor.dtype == torch.bfloat16
            for part in (torch.mean, torch.std):
                assert float(part(tensor.float())) == pytest.approx(float(part(alike[name].float())), abs=0.05), name
    logits = made(torch.arange(1, 10)[None]).logits  # 0 is padding
    assert float(logits.std(dim=-1).min()) > 0


def test_a_step_reads_its_weights_and_the_live_kv():
    model = tiny("llama-tied")
    token = 2 * 3 * 2 * 16 * 4
    assert Floor.of(model, [40, 7], 10) == Floor(4 * model.num_parameters(), token * (47 + 10), 0)
    assert Floor.of(model, [40, 7], 11, beams=3).kv == token * (47 + 33)
    model = tiny("llama")  # the embedding is not the head: a step reads a few rows of it
    assert Floor.of(model, [40], 10).total == 4 * (model.num_parameters() - 128 * 64) + token * (40 + 5)


@pytest.mark.parametrize(("lengths", "new_tokens", "beams", "live"), [
    ([40, 7], 10, 1, 24 + 12),  # the first row is longer than the window of 24, the second is not
    ([40], 10, 3, 19 + 15),  # beams share what their window shows of the prompt
    ([40], 80, 3, 72),  # and nothing once it shows their own tokens alone
])  # fmt: skip
def test_windows_count_as_windows(lengths, new_tokens, beams, live):
    model = tiny("mistral")
    assert Floor.of(model, lengths, new_tokens, beams).kv == 2 * 3 * 2 * 16 * 4 * live


def test_the_floor_of_gemma_3():
    """29 of 34 layers have a window of 1,024 tokens; the vision tower is not read."""
    model = SHAPES["gemma-3-4b"].build(torch.bfloat16, "meta")
    layer = 2560 * (2048 + 2 * 1024) + 2048 * 2560 + 3 * 2560 * 10240 + 4 * 2560 + 2 * 256
    token = 2 * 4 * 256 * 2
    kv = token * (5 * (8192 + 24) + 29 * 1024)
    assert Floor.of(model, [8192], 48) == Floor(2 * (34 * layer + 2560 + 262208 * 2560), kv, 0)


def test_the_floor_of_qwen3_5():
    """24 of 32 layers keep a float32 state of 2 MiB and four inputs of a convolution: read, and written."""
    model = SHAPES["qwen3.5-4b"].build(torch.bfloat16, "meta")
    attention = 2560 * (2 * 4096 + 2 * 1024) + 4096 * 2560 + 2 * 256
    delta = 2560 * (8192 + 4096 + 2 * 32) + 4096 * 2560 + 8192 * 4 + 2 * 32 + 128
    mlp = 3 * 2560 * 9216 + 2 * 2560
    weights = 2 * (8 * attention + 24 * delta + 32 * mlp + 2560 + 248320 * 2560)
    states = 2 * 24 * (32 * 128 * 128 * 4 + 8192 * 4 * 2)
    kv = 8 * 2 * 4 * 256 * 2 * (8192 + 24)
    assert Floor.of(model, [8192], 48) == Floor(weights, kv, states)
    assert Floor.of(model, [8192, 100], 48).states == 2 * states


@pytest.mark.parametrize(("name", "experts", "choices", "size"), [
    ("qwen3-30b-a3b", 128, 8, 3 * 2048 * 768), ("gpt-oss-20b", 32, 4, 3 * 2880 * 2880 + 3 * 2880),
    ("mixtral-8x7b", 8, 2, 3 * 4096 * 14336),
])  # fmt: skip
def test_experts_count_as_often_as_any_row_is_expected_to_choose_them(name, experts, choices, size):
    model = SHAPES[name].build(torch.bfloat16, "meta")
    layers = model.config.num_hidden_layers
    unread = model.get_input_embeddings().weight.numel() + layers * experts * size
    for lengths, beams in (([100], 1), ([100] * 8, 1), ([100] * 2, 4)):
        rows = len(lengths) * beams
        chosen = choices if rows == 1 else experts * (1 - (1 - choices / experts) ** 8)
        expected = 2 * (model.num_parameters() - unread + layers * chosen * size)
        assert Floor.of(model, lengths, 8, beams).weights == pytest.approx(expected, rel=1e-9)


def test_towers_are_not_read_and_heads_are():
    model = SHAPES["mistral-small-24b"].build(torch.bfloat16, "meta")
    layer = 5120 * (4096 + 2 * 1024) + 4096 * 5120 + 3 * 5120 * 32768 + 2 * 5120
    assert Floor.of(model, [8192], 48).weights == 2 * (40 * layer + 5120 + 131072 * 5120)


def generate(run, tmp_path, *arguments) -> tuple[int, list[dict]]:
    tiny("llama", num_hidden_layers=1).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    out = tmp_path / "generate.jsonl"
    named = ("--model", tmp_path / "model", "--dtype", "bfloat16", "--lengths", 20, "--new-tokens", 8, "--out", out)
    status, lines = run("benchmark_generate", *named, *arguments)
    assert json.loads(lines[-1])["records"] == len(records(out))
    return status, records(out)


def test_a_peer_that_raises_is_recorded_by_its_error(run, tmp_path, monkeypatch):
    measure = benchmark.measure

    def failing(model, inputs, new_tokens, engine, *rest, **mode):
        if engine == "static-compile":
            raise RuntimeError("no compiler\nwith details")
        return measure(model, inputs, new_tokens, engine, *rest, **mode)

    monkeypatch.setattr(benchmark, "measure", failing)
    status, (dynamic, static, ours) = generate(run, tmp_path, "--engines", "static-compile", "patched")
    assert status == 0
    assert (static["engine"], static["error"]) == ("static-compile", "RuntimeError: no compiler")
    assert "step_ms_p50" not in static
    assert dynamic["floor_bytes"] == ours["floor_bytes"] == static["floor_bytes"]
    assert sum(ours["floor_bytes"].values()) / ours["read_gb_s"] / 1e6 == pytest.approx(ours["floor_ms"])
    assert (ours["logits_right"], ours["last_step"], ours["left"]) == (True, "eager", [])


@pytest.mark.parametrize(("ours", "right"), [(0.0199, True), (0.0201, False)])
def test_logits_further_off_than_twice_transformers_are_an_error(run, tmp_path, monkeypatch, ours, right):
    errors = iter((0.01, ours))
    monkeypatch.setattr(benchmark.logits, "error", lambda *_: next(errors))
    status, (dynamic, patched) = generate(run, tmp_path)
    assert status == int(not right)
    assert (dynamic["logits_right"], patched["logits_right"]) == (None, right)
