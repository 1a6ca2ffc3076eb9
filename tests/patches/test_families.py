"""Models of many families: served on pages through transformers' attention interface, or left with a reason."""

from __future__ import annotations

import inspect
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from served import SERVED, build, generate

import pkv_hf
from pkv_hf import PagedCache
from pkv_hf.cache.layer import PagedLayer
from pkv_hf.compat import CACHE, decoder_of
from pkv_hf.replaced import STATE
from pkv_hf.routes.base import Bounds
from pkv_hf.routes.registry import ROUTES
from pkv_hf.runtime import choice, forward
from pkv_hf.runtime.captured.static import run_decoder
from pkv_hf.runtime.step import Step
from tiny import COMMON, assert_on_pages, left_padded, randomized, tiny

pytestmark = pytest.mark.contract

LEFT: dict[str, tuple[str, str, dict, str]] = {
    "doge": ("DogeConfig", "DogeForCausalLM", {}, "Doge"),
    "diffllama": ("DiffLlamaConfig", "DiffLlamaForCausalLM", {}, "other keys and values than its cache"),
}
"""Models whose layers want more of attention than pages give."""

MODES: dict[str, tuple[tuple[int, ...], dict]] = {
    "one row": ((17,), {}),
    "ragged": ((30, 21, 3), {}),
    "beams": ((17, 9), {"num_beams": 2}),
}


@pytest.fixture
def attended(monkeypatch) -> Counter:
    """How often each layer attended to pages; "dense" counts dense K and V."""
    counts: Counter = Counter()
    attend, update = Step.attend, PagedLayer.update

    def counted(self, q, k, v, layer_idx, *rest):
        counts[layer_idx] += 1
        return attend(self, q, k, v, layer_idx, *rest)

    def dense(self, *states):
        counts["dense"] += 1
        return update(self, *states)

    monkeypatch.setattr(Step, "attend", counted)
    monkeypatch.setattr(PagedLayer, "update", dense)
    return counts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SERVED)
def test_tokens_are_identical_and_pages_are_read(name, mode, attended):
    lengths, settings = MODES[mode]
    model, inputs = build(*SERVED[name]), left_padded(*lengths)
    expected = generate(model, inputs, **settings)
    assert len(set(expected.sequences[0, -40:].tolist())) > 3  # tokens wander, so that a wrong one shows
    with pkv_hf.patched(model):
        output = generate(model, inputs, **settings)
        report = pkv_hf.report(model)
        assert_on_pages(model)
    assert torch.equal(output.sequences, expected.sequences)
    assert isinstance(output[CACHE], PagedCache)
    assert attended == dict.fromkeys(range(COMMON["num_hidden_layers"]), 40)
    assert report.family == model.config.model_type
    assert "transformers' own layers run" in str(report)


@pytest.mark.parametrize(
    ("name", "route"),
    [
        ("phi3", "split"),
        ("gemma3", "workqueue"),
        ("gemma2", "split"),
        ("gpt-oss", "workqueue"),
        ("mimo", "split"),
        ("llama4", "workqueue"),
    ],
)
def test_the_triton_routes_give_the_same_tokens(name, route, attended):
    pytest.importorskip("triton")
    model, inputs = build(*SERVED[name]), left_padded(20, 9)
    expected = generate(model, inputs, 3)
    with pkv_hf.patched(model, route=route):
        output = generate(model, inputs, 3)
        assert pkv_hf.report(model).route == route
        assert_on_pages(model)
    assert torch.equal(output.sequences, expected.sequences)


@pytest.mark.parametrize("name", ["gemma3", "qwen3-moe"])
def test_steps_on_static_buffers_give_the_same_tokens(name, monkeypatch):
    """The steps that a GPU captures of transformers' own layers, here run as they are."""
    pytest.importorskip("triton")

    class Never(set):
        def __contains__(self, _):
            return False

    model, inputs = build(*SERVED[name]), left_padded(20, 9)
    expected = generate(model, inputs, 3)
    for module in (choice, forward):
        monkeypatch.setattr(module, "uncaptured", lambda *_: "")
    with pkv_hf.patched(model, route="split", fuse=False):
        getattr(model, STATE).compiled = Never()
        output = generate(model, inputs, 3)
        assert output[CACHE].static_steps
        assert_on_pages(model)
    assert torch.equal(output.sequences, expected.sequences)


@torch.no_grad()
@pytest.mark.parametrize("name", SERVED)
def test_a_captured_step_depends_on_no_length_of_the_host(name):
    """What a graph would keep: the length that the model asks its cache for. OPT and Llama 4 do."""
    model = pkv_hf.patch(build(*SERVED[name]))
    decoder, cache = decoder_of(model), PagedCache(model.config)
    decoder(torch.tensor([[5, 6, 7]]), **{CACHE: cache})
    step = Step(cache, Bounds(np.zeros(1, dtype=np.int64), 3, 1), ROUTES["sdpa"], decoder.config, captured=True)
    call = (decoder, torch.tensor([[8]]), torch.tensor([[3]]), step, None)
    if name in ("opt", "llama4"):
        with pytest.raises(RuntimeError, match="length of its cache"), step:
            run_decoder(*call)
        assert cache.get_seq_length() == 3
    else:
        with step:
            hidden = run_decoder(*call)
        expected = decoder_of(pkv_hf.unpatch(model))(torch.tensor([[5, 6, 7, 8]])).last_hidden_state
        torch.testing.assert_close(hidden, expected[:, -1:], atol=1e-4, rtol=1e-4)


OTHER_NAMES = {  # configurations without num_key_value_heads or intermediate_size
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 64, "n_head": 4, "n_layer": 3}),
    "falcon": ("FalconConfig", "FalconForCausalLM", {"multi_query": True}),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
}


@pytest.mark.parametrize("name", [*SERVED, *OTHER_NAMES])
def test_a_plan_counts_the_pages_that_a_model_holds(name):
    model, inputs = build(*{**SERVED, **OTHER_NAMES}[name]), left_padded(30, 30)
    settings = {"prompt_tokens": 30, "batch": 2, "max_new_tokens": 5, "gpu_memory": "1GiB"}
    planned = pkv_hf.plan(model.config, **settings)
    pkv_hf.patch(model)
    assert pkv_hf.plan(model, **settings) == planned
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert output[CACHE].memory().held_bytes == planned.pages


@pytest.mark.parametrize("name", LEFT)
def test_layers_that_want_more_are_left_to_transformers(name, attended):
    *built, reason = LEFT[name]
    model, inputs = build(*built), left_padded(30, 9)
    expected = generate(model, inputs).sequences
    pkv_hf.patch(model)
    for cache in (PagedCache, transformers.DynamicCache):
        output = generate(model, inputs)
        assert torch.equal(output.sequences, expected)
        assert type(output[CACHE]) is cache  # once it is known, transformers' own cache is the faster
    (left,) = pkv_hf.report(model).left
    assert reason in left
    assert list(attended) == ["dense"]


@torch.no_grad()
@pytest.mark.parametrize("model_name", ["phi3", "llama"])
@pytest.mark.parametrize(
    "asked",
    [{"position_bias": torch.linspace(-9, 9, 12 * 12).view(1, 1, 12, 12)}, {"is_causal": False}],
    ids=["bias", "causal"],
)
def test_what_a_caller_asks_of_attention_is_not_ignored(model_name, asked, attended):
    known = {**SERVED, "llama": ("LlamaConfig", "LlamaForCausalLM", {})}
    model, ids = build(*known[model_name]), left_padded(12)["input_ids"]
    plain, expected = model(ids).logits, model(ids, **asked).logits
    assert not torch.allclose(plain, expected, atol=1e-2)
    pkv_hf.patch(model)
    torch.testing.assert_close(model(ids, **{CACHE: PagedCache(model.config)}, **asked).logits, expected)
    (reason,) = pkv_hf.report(model).left
    assert reason.endswith(("asks attention for position_bias=a Tensor", "asks attention for is_causal=False"))
    attended.clear()
    cache = PagedCache(model.config)
    torch.testing.assert_close(model(ids, **{CACHE: cache}).logits, plain, atol=1e-4, rtol=1e-4)
    assert attended == dict.fromkeys(range(COMMON["num_hidden_layers"]), 1)  # the next call is served


@torch.no_grad()
def test_a_bias_in_a_fused_decode_step_is_not_ignored():
    pytest.importorskip("triton")
    model, ids = build("LlamaConfig", "LlamaForCausalLM", {}), left_padded(12)["input_ids"]
    bias = torch.linspace(-9, 9, 12).view(1, 1, 1, 12)

    def last(cache):
        model(ids[:, :11], **{CACHE: cache})
        return model(ids[:, 11:], **{CACHE: cache}, position_bias=bias).logits

    expected = last(transformers.DynamicCache(config=model.config))
    with pkv_hf.patched(model, route="split"):
        torch.testing.assert_close(last(PagedCache(model.config)), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("name", "packs"), [("opt", False), ("olmo2", True)])
def test_padded_rows_whose_positions_the_decoder_counts_itself(name, packs, monkeypatch):
    """OPT counts from the first real token where it is given no positions, most count from the padding on."""
    packed, original = [], forward._packed_prompt
    monkeypatch.setattr(forward, "_packed_prompt", lambda *args: packed.append(args) or original(*args))
    model, inputs = build(*SERVED[name]), left_padded(12, 5)
    token = torch.full((2, 1), 7)

    def logits(cache):
        prompt = model(**inputs, **{CACHE: cache}).logits[:, -1]
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
        return torch.stack([prompt, model(token, attention_mask=mask, **{CACHE: cache}).logits[:, -1]])

    expected = logits(transformers.DynamicCache(config=model.config))
    with pkv_hf.patched(model, route="split"):
        torch.testing.assert_close(logits(PagedCache(model.config)), expected, atol=1e-4, rtol=1e-4)
    assert bool(packed) == packs


REFUSED: dict[str, tuple[str, str, dict, str]] = {
    "mamba": ("MambaConfig", "MambaForCausalLM", {}, "LinearAttentionLayer"),
    "latent attention": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32},
        "latent attention",
    ),
    "encoder alone": ("BertConfig", "BertModel", {}, "not the decoder of a causal LM"),
    "masked language model": ("BertConfig", "BertForMaskedLM", {}, "not a causal LM that generates"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_raises_at_patch(name):
    config, model, settings, reason = REFUSED[name]
    with torch.device("meta"):
        built = getattr(transformers, model)(getattr(transformers, config)(**{**COMMON, **settings}))
    with pytest.raises(pkv_hf.UnsupportedModelError, match=reason):
        pkv_hf.patch(built)
    assert not hasattr(built, STATE)


@pytest.mark.parametrize("length", [30, 40])
def test_pages_go_on_where_rope_switches(length):
    """Phi-3's generate() drops the cache where its RoPE becomes that of long prompts, and begins anew."""
    config = transformers.Phi3Config(**COMMON, original_max_position_embeddings=32)
    model = randomized(transformers.Phi3ForCausalLM, config)
    inputs = left_padded(length, length)
    expected = generate(model, inputs, 10).sequences
    pkv_hf.patch(model)
    output = generate(model, inputs, 10)
    assert torch.equal(output.sequences, expected)
    # Older releases go on with one token then, whose mask is of all: that call is their own.
    anew = "next_sequence_length" in inspect.getsource(transformers.Phi3ForCausalLM.prepare_inputs_for_generation)
    if anew or length > 32:
        assert_on_pages(model)
        assert type(output[CACHE]) is PagedCache
        assert output[CACHE].get_seq_length() == expected.shape[1] - 1


@torch.no_grad()
def test_a_decoder_alone_reads_its_pages():
    decoder, inputs = tiny("llama").model, left_padded(20)
    ids, cache = inputs["input_ids"], PagedCache(tiny("llama").config)
    expected = decoder(ids).last_hidden_state
    with pkv_hf.patched(decoder):
        found = [decoder(ids[:, :15], **{CACHE: cache}), decoder(ids[:, 15:], **{CACHE: cache})]
        assert_on_pages(decoder)
    hidden = torch.cat([each.last_hidden_state for each in found], dim=1)
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
