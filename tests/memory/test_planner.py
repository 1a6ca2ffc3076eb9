"""The planner's sums against what caches hold, what was measured on a GPU, and against bad input."""

from __future__ import annotations

import pytest
import torch
import transformers
from hybrid import HYBRIDS, hybrid
from transformers import BloomConfig, LlamaConfig

import pkv_hf
from families.models import family_model
from pkv_hf.bench.inputs.shapes import SHAPES
from pkv_hf.bench.results.records import read_records
from pkv_hf.compat import CACHE
from places import ROOT
from tiny import FAMILIES, left_padded, tiny

GENERATE = ROOT / "benchmarks" / "results" / "generate.jsonl"
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
EIGHT_B = SHAPES["llama-3.1-8b"].config()
BITS = {None: None, "nf4": 4, "int8": 8}
"""What the planner is asked for, by the names of weights that it knows."""
LLAMAS = {name: shape.text for name, shape in SHAPES.items() if shape.model_class == "LlamaForCausalLM"}


def measured() -> list[dict]:
    """Every committed record of a patched model's greedy decoding on a GPU, on pages of the model's own dtype."""
    records = read_records(GENERATE, GENERATE.name)
    return [r for r in records if r["engine"].startswith("patched") and not r["gpu"].startswith("none")
            and r.get("weights") in BITS and not r.get("adapter")
            and r["model"] in {*LLAMAS, "smollm2"} and r.get("mode", "greedy") == "greedy"]  # fmt: skip


def test_peaks_and_pages_of_every_committed_gpu_record():
    records = measured()
    assert len(records) >= 14
    for r in records:
        plan = pkv_hf.plan(
            LlamaConfig(**{"smollm2": SMOLLM2, **LLAMAS}[r["model"]]),
            prompt_tokens=r["lengths"],
            max_new_tokens=r["new_tokens"],
            gpu_memory="80GiB",
            dtype=getattr(torch, r["dtype"]),
            weight_bits=BITS[r.get("weights")],
        )
        assert plan.pages == r["kv_bytes"]
        assert plan.allocated / 2**30 == pytest.approx(r["peak_gib"], rel=0.1), r


@pytest.mark.parametrize("kv_dtype", [None, torch.bfloat16, "int8"])
@pytest.mark.parametrize("lengths", [(40,), (70, 9, 33)])
@pytest.mark.parametrize("family", FAMILIES)
def test_pages_and_weights_are_what_a_model_holds(family, lengths, kv_dtype):
    model = tiny(family)
    settings = {"kv_dtype": kv_dtype, "page_size": 32}
    plan = pkv_hf.plan(model, prompt_tokens=lengths, max_new_tokens=6, gpu_memory="1GiB", **settings)
    assert plan.weights == model.num_parameters() * 4  # a tied head once
    assert pkv_hf.plan(model.config, prompt_tokens=lengths, gpu_memory="1GiB").weights == plan.weights
    with pkv_hf.patched(model, **settings):
        output = model.generate(**left_padded(*lengths), max_new_tokens=6, return_dict_in_generate=True)
    assert output[CACHE].memory().held_bytes == plan.pages


@pytest.mark.parametrize("name", HYBRIDS)
def test_states_and_layers_that_differ_count(name):
    model = hybrid(name)
    plan = pkv_hf.plan(model, prompt_tokens=(40, 9), max_new_tokens=6, gpu_memory="1GiB")
    with pkv_hf.patched(model):
        output = model.generate(**left_padded(40, 9), max_new_tokens=6, return_dict_in_generate=True)
    assert plan.pages == output[CACHE].memory().held_bytes
    half = pkv_hf.plan(model.config, prompt_tokens=(40, 9), max_new_tokens=6, gpu_memory="1GiB", dtype=torch.bfloat16)
    assert plan.pages / 2 <= half.pages < plan.pages  # recurrent states may be float32 whatever the model is


def test_the_largest_prompt_and_batch_fit_and_one_more_does_not():
    plan = pkv_hf.plan(EIGHT_B, prompt_tokens=4096, batch=2, gpu_memory="24GiB", dtype=torch.bfloat16)
    assert plan.fits
    for more, fits in ((0, True), (1, False)):
        settings = {"gpu_memory": "24GiB", "dtype": torch.bfloat16}
        longer = pkv_hf.plan(EIGHT_B, prompt_tokens=plan.max_prompt_tokens + more, batch=2, **settings)
        wider = pkv_hf.plan(EIGHT_B, prompt_tokens=4096, batch=plan.max_batch + more, **settings)
        assert (longer.fits, wider.fits) == (fits, fits)
    assert plan.total == sum(
        (plan.weights, plan.pages, plan.prefill, plan.workspace, plan.graphs, plan.context)
    )  # fmt: skip
    assert "2 x 4,096 tokens and 256 new ones fit" in repr(plan) == str(plan)
    small = pkv_hf.plan(EIGHT_B, prompt_tokens=10, gpu_memory="15GiB", dtype=torch.float16)
    assert (small.fits, small.max_prompt_tokens, small.max_batch) == (False, 0, 0)
    assert "do not fit" in str(small)


def test_fewer_bits_chunks_and_windows_take_less():
    def plan(config=EIGHT_B, **settings):
        return pkv_hf.plan(
            config, gpu_memory="15GiB", **{"prompt_tokens": 16384, "dtype": torch.float16, **settings}
        )  # fmt: skip

    linears = sum(p.numel() for n, p in _empty(EIGHT_B).named_parameters() if p.ndim == 2 and "layers" in n)
    whole = plan()
    assert plan(weight_bits=4).weights == whole.weights - int(linears * (16 - 4.5) / 8)
    assert plan(weight_bits=8).weights == whole.weights - linears
    assert plan(prefill_chunk_size=1024).prefill * 16 == whole.prefill
    assert plan(prefill_chunk_size=16384) == whole
    assert plan(weight_bits=4, kv_dtype="int8", prefill_chunk_size=1024).fits
    windows = tiny("mistral").config
    pages = [plan(windows, prompt_tokens=n, dtype=torch.float32).pages for n in (500, 5000)]
    assert pages[0] == pages[1]


def _empty(config):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def test_bad_input_is_named(monkeypatch):
    good = {"prompt_tokens": 100, "gpu_memory": "15GiB"}
    for settings, says in (
        ({"prompt_tokens": 0}, "prompt_tokens=0"),
        ({"prompt_tokens": []}, "prompt_tokens=0"),
        ({"prompt_tokens": 1.5}, "prompt_tokens=1.5"),
        ({"prompt_tokens": [3, -1]}, "prompt_tokens=-1"),
        ({"prompt_tokens": [3, 4], "batch": 3}, "batch=3"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"batch": 0}, "batch=0"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size=0"),
        ({"page_size": 17}, "page_size=17"),
        ({"kv_dtype": "int3"}, "kv_dtype='int3'"),
        ({"weight_bits": 3}, "weight_bits=3"),
        ({"gpu_memory": "much"}, "gpu_memory='much'"),
        ({"gpu_memory": -1}, "gpu_memory=-1"),
        ({"gpu_memory": 16}, "gpu_memory=16 is 16 bytes: pass '16GiB' say"),
        ({"gpu_memory": (1 << 26) - 1}, "gpu_memory=67108863 is 67,108,863 bytes"),
    ):
        with pytest.raises(ValueError, match=says):
            pkv_hf.plan(tiny("llama").config, **{**good, **settings})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="gpu_memory=None"):
        pkv_hf.plan(tiny("llama"), prompt_tokens=100)
    with pytest.raises(ValueError, match="weights count as they are"):
        pkv_hf.plan(tiny("llama"), **good, weight_bits=4)
    for wrong in ("llama", BloomConfig(n_layer=1, hidden_size=32, n_head=2, vocab_size=64)):
        with pytest.raises(pkv_hf.UnsupportedModelError):
            pkv_hf.plan(wrong, **good)


@pytest.mark.parametrize("family", ["qwen3-vl", "falcon-h1", "gemma4-e2b"])
def test_a_model_around_a_text_decoder_states_and_shared_layers(family):
    model = family_model(family)
    plan = pkv_hf.plan(model, prompt_tokens=(20, 9), max_new_tokens=3, gpu_memory="1GiB")
    of_config = pkv_hf.plan(model.config, prompt_tokens=(20, 9), max_new_tokens=3, gpu_memory="1GiB")
    assert (of_config.weights, of_config.pages) == (plan.weights, plan.pages)
    with pkv_hf.patched(model):
        output = model.generate(**left_padded(20, 9), max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    assert output[CACHE].memory().held_bytes == plan.pages
