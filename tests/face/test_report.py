"""What `report` says of how decode steps run, and why not better: each reason, as it was when the step ran."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import LlavaConfig, LlavaForConditionalGeneration

import pkv_hf
from pkv_hf import reporting
from pkv_hf.runtime import choice, forward
from pkv_hf.runtime.admission import _asks_more, extra_arguments
from pkv_hf.runtime.captured.graphs import CaptureError
from pkv_hf.runtime.captured.static import StaticStep
from tiny import COMMON, left_padded, randomized, tiny

ON_A_CPU = "a CUDA graph needs a GPU, the step is on cpu"
NOT_READ = "1 layers: what its modules give is not added to the residual stream alone"


def small():
    return tiny("llama", num_hidden_layers=1)


def olmo2():
    return randomized(transformers.Olmo2ForCausalLM, transformers.Olmo2Config(**{**COMMON, "num_hidden_layers": 1}))


def granite():
    """With a multiplier that no setting is."""
    model = randomized(
        transformers.GraniteForCausalLM, transformers.GraniteConfig(**{**COMMON, "num_hidden_layers": 1})
    )
    model.model.layers[0].residual_multiplier = torch.tensor(0.5)
    return model


def wrapper():
    """A Llama that a model for images calls with embeddings."""
    text = transformers.LlamaConfig(**{**COMMON, "num_hidden_layers": 1})
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    return randomized(
        LlavaForConditionalGeneration, LlavaConfig(vision_config=vision, text_config=text, image_token_index=127)
    )


def generated(model, new_tokens=3, **settings) -> reporting.Report:
    model.generate(**left_padded(7), max_new_tokens=new_tokens, do_sample=False, **settings)
    return pkv_hf.report(model)


def hooked(model):
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    return model


STEPS = {
    "fused": (small, {"route": "split"}, {}, "static", "", ON_A_CPU),
    "hooks": (
        lambda: hooked(small()), {"route": "split"}, {}, "eager", "modules have forward hooks", "modules have",
    ),
    "not fused": (small, {"route": "split", "fuse": False}, {}, "eager", "called with fuse=False", ON_A_CPU),
    "torch": (small, {}, {}, "eager", "the route sdpa runs between transformers' layers", "the route sdpa runs"),
    "hidden states": (
        small, {"route": "split", "run_ahead": False}, {"output_hidden_states": True, "return_dict_in_generate": True},
        "eager", "output_hidden_states=True asks for those of all layers", "output_hidden_states=True",
    ),
    "other norms": (olmo2, {"route": "split"}, {}, "static", "", ON_A_CPU),
    "not read": (granite, {"route": "split"}, {}, "eager", NOT_READ, ON_A_CPU),
    "wrapper": (wrapper, {"route": "split"}, {}, "static", "", ON_A_CPU),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_a_report_says_how_the_last_step_ran_and_why_not_better(name):
    build, settings, asked, how, not_fused, not_captured = STEPS[name]
    if "route" in settings:
        pytest.importorskip("triton")
    found = generated(pkv_hf.patch(build(), **settings), **asked)
    assert vars(found.steps) == {"captured": 0, "static": 0, "eager": 0} | {how: 2}
    assert found.last_step == how
    assert not_fused in found.not_fused
    assert bool(found.not_fused) == bool(not_fused)
    assert not_captured in found.not_captured
    assert found.runs == f"{how}, " + ("transformers' own layers run" if not_fused else "our kernels run 1 layers")
    lines = str(found).splitlines()
    assert f"last step {found.runs}" in lines
    if found.not_fused == found.not_captured:
        assert f"not fused or captured: {found.not_fused}" in lines
    else:
        assert f"not captured: {found.not_captured}" in lines
        assert (f"not fused: {found.not_fused}" in lines) == bool(not_fused)


def test_before_the_first_step_a_report_says_what_forbids_a_better_one(monkeypatch):
    found = pkv_hf.report(pkv_hf.patch(small()))
    assert (found.last_step, found.not_fused, found.not_captured) == (None, "", ON_A_CPU)
    assert "last step none yet" in str(found).splitlines()
    monkeypatch.setattr(reporting, "uncaptured", lambda *_: "")  # as on a GPU
    found = pkv_hf.report(pkv_hf.patch(hooked(small())))
    assert found.not_fused == found.not_captured == "modules have forward hooks"


def fails(message):
    def replay(*_):
        raise CaptureError(message)

    return replay


@pytest.mark.parametrize("build", [small, granite])
def test_what_keeps_a_step_from_being_captured_on_a_gpu(build, monkeypatch):
    pytest.importorskip("triton")
    uncaptured = choice.uncaptured
    for module in (choice, forward):
        monkeypatch.setattr(module, "uncaptured", lambda state, _: uncaptured(state, torch.device("cuda")))
    not_fused = "" if build is small else NOT_READ
    without = generated(pkv_hf.patch(build(), route="split", cuda_graphs=False))
    assert without.not_captured == "patch() was called with cuda_graphs=False"
    # no graph needs static buffers for transformers' layers
    assert (without.last_step, without.not_fused) == ("eager" if not_fused else "static", not_fused)
    model = pkv_hf.patch(build(), route="split")
    monkeypatch.setattr(StaticStep, "_replay", fails("CUDA error: out of memory"))
    first = generated(model, 2)
    assert (first.last_step, first.not_fused) == ("static", not_fused)
    assert first.not_captured == "the first step of its shape compiles kernels"
    assert generated(model, 4).not_captured == "memory ran out when it was to be captured"
    monkeypatch.setattr(StaticStep, "_replay", fails("operation not permitted"))
    assert generated(model).not_captured == "operation not permitted"
    assert generated(model).last_step == ("eager" if not_fused else "static")


def test_a_step_is_captured_where_its_graph_is_replayed(monkeypatch):
    pytest.importorskip("triton")
    for module in (choice, forward):
        monkeypatch.setattr(module, "uncaptured", lambda *_: "")
    monkeypatch.setattr(StaticStep, "_replay", lambda self, cache, begin, _: self._body(cache, begin))
    found = generated(pkv_hf.patch(small(), route="split"), 4)  # the loop's own step begins with the second token
    assert vars(found.steps) == {"captured": 1, "static": 2, "eager": 0}
    assert (found.runs, found.not_fused, found.not_captured) == ("captured, our kernels run 1 layers", "", "")
    assert "not captured" not in str(found)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"position_ids": torch.zeros(3, 1, 1), "visual_pos_masks": None, "deepstack_visual_embeds": []}, ""),
        ({"inputs_embeds": torch.zeros(2, 1, 8), "logits_to_keep": 1}, ""),
        ({"inputs_embeds": torch.zeros(2, 5, 8), "logits_to_keep": 1}, "its decoder is given logits_to_keep"),
        ({"token_type_ids": torch.zeros(1, 1), "labels": 1}, "its decoder is given token_type_ids, labels"),
        ({"input_ids": torch.zeros(2, 5), "logits_to_keep": 1}, "its decoder is given logits_to_keep"),
        ({"input_ids": torch.zeros(2, 1), "logits_to_keep": 1}, ""),
        ({"input_ids": torch.zeros(2, 1), "logits_to_keep": torch.zeros(1)}, "its decoder is given logits_to_keep"),
        ({"return_dict": False}, "return_dict=False asks for a tuple"),
        ({"use_cache": False}, "use_cache=False, with a cache"),
        ({"position_ids": torch.zeros(1, 1), "use_cache": True, "output_hidden_states": False}, ""),
    ],
)
def test_what_a_call_asks_for_beyond_hidden_states(call, says):
    assert _asks_more(transformers.LlamaConfig(), call, extra_arguments(call)) == says
