"""What patching touches, what it undoes, and what is left to transformers and said."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import pkv_hf
from pkv_hf import PagedCache
from pkv_hf.compat import CACHE
from pkv_hf.errors import RouteError
from tiny import COMMON, assert_on_pages, left_padded, tiny

pytestmark = pytest.mark.contract


def attributes(model) -> dict:
    return {(name, key): id(value) for name, module in model.named_modules() for key, value in vars(module).items()}


def left(model) -> str:
    return " | ".join(pkv_hf.report(model).left)


def test_unpatch_restores_every_attribute():
    model = tiny("llama")
    before = attributes(model)
    pkv_hf.patch(model)
    assert attributes(model) != before
    assert pkv_hf.unpatch(model) is model
    assert attributes(model) == before
    pkv_hf.unpatch(model)
    assert attributes(model) == before


def test_patching_again_only_changes_the_settings():
    model = tiny("llama")
    before = attributes(model)
    assert pkv_hf.patch(pkv_hf.patch(model)) is model
    assert pkv_hf.report(pkv_hf.patch(model, page_size=64)).page_size == 64
    with pkv_hf.patched(model, page_size=32):
        assert pkv_hf.report(model).page_size == 32
    assert pkv_hf.report(model).page_size == 64
    assert attributes(pkv_hf.unpatch(model)) == before


def test_other_instances_are_not_touched_even_with_the_same_configuration():
    model = tiny("llama")
    other = LlamaForCausalLM(model.config).eval()
    forward, config = LlamaForCausalLM.forward, copy.deepcopy(model.config.to_dict())
    before = attributes(other)
    pkv_hf.patch(model)
    assert attributes(other) == before
    assert LlamaForCausalLM.forward is forward
    assert model.config.to_dict() == config
    assert not isinstance(other.generate(**left_padded(9), return_dict_in_generate=True)[CACHE], PagedCache)


def test_patched_is_undone_after_an_exception():
    model = tiny("llama")
    before = attributes(model)
    with pytest.raises(KeyError), pkv_hf.patched(model):
        raise KeyError
    assert attributes(model) == before


def test_a_deep_copy_of_a_patched_model_stands_alone():
    model, inputs = pkv_hf.patch(tiny("llama")), left_padded(20)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    expected = tiny("llama").generate(**inputs, max_new_tokens=10)
    assert torch.equal(twin.generate(**inputs, max_new_tokens=10), expected)
    assert isinstance(twin.generate(**inputs, max_new_tokens=10, return_dict_in_generate=True)[CACHE], PagedCache)


def test_a_saved_model_is_as_without_the_patch(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "before")
    keys = list(model.state_dict())
    pkv_hf.patch(model).save_pretrained(tmp_path / "after")
    assert list(model.state_dict()) == keys
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_training_is_transformers_own_to_the_bit():
    inputs = left_padded(20, 20)
    results = []
    for patched in (False, True):
        model = tiny("llama").train()
        if patched:
            pkv_hf.patch(model)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        results.append((loss.detach(), [parameter.grad for parameter in model.parameters()]))
    assert not left(model)
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))


def reason_and_match(model, call) -> str:
    """Runs a call unpatched and patched, compares its logits, and returns what was said."""
    expected = call(model)
    pkv_hf.patch(model)
    torch.testing.assert_close(call(model), expected, atol=1e-5, rtol=1e-5)
    return left(model)


def test_gradients_go_to_transformers():
    inputs = left_padded(20, 11)
    reason = reason_and_match(tiny("llama"), lambda m: m(**inputs, **{CACHE: PagedCache(m.config)}).logits[:, -1])
    assert "gradients" in reason


def test_a_mask_with_holes_goes_to_transformers_on_every_step():
    inputs = left_padded(20, 20)
    mask = inputs["attention_mask"].clone()
    mask[1, 15:] = 0  # padded on the right: the hole stays in every later mask
    assert_tokens_and_reason(tiny("llama"), {**inputs, "attention_mask": mask}, "holes")


def test_padding_inside_a_second_turn_goes_to_transformers():
    model = tiny("llama")
    inputs, turn = left_padded(20, 11), left_padded(7, 3, seed=1)
    ids = torch.cat([inputs["input_ids"], turn["input_ids"]], dim=1)
    mask = torch.cat([inputs["attention_mask"], turn["attention_mask"]], dim=1)

    @torch.no_grad()
    def call(m):
        cache = PagedCache(m.config)
        m(**inputs, **{CACHE: cache})
        return m.generate(ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=10).float()

    assert "holes" in reason_and_match(model, call)


def assert_tokens_and_reason(model, inputs, reason, **settings):
    expected = model.generate(**inputs, max_new_tokens=20, **settings)
    pkv_hf.patch(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=20, **settings), expected)
    assert reason in left(model)


def test_output_attentions_gives_weights():
    model, inputs = tiny("llama"), left_padded(20, 11)
    model.set_attn_implementation("eager")
    settings = {"max_new_tokens": 5, "output_attentions": True, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **settings)
    output = pkv_hf.patch(model).generate(**inputs, **settings)
    assert torch.equal(output.sequences, expected.sequences)
    for ours, theirs in zip(output.attentions, expected.attentions):
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b)
    assert "output_attentions" in left(model)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_foreign_cache_goes_to_transformers(implementation):
    from transformers import DynamicCache

    model = tiny("mistral")
    model.set_attn_implementation(implementation)
    inputs = left_padded(40, 11)
    reason = reason_and_match(
        model, lambda m: m.generate(**inputs, **{CACHE: DynamicCache(config=m.config)}, max_new_tokens=9).float()
    )
    assert "DynamicCache" in reason


def test_a_static_cache_that_was_asked_for_stays_transformers_own():
    settings = {"cache_implementation": "static", "disable_compile": True}
    assert_tokens_and_reason(tiny("llama"), left_padded(20), "cache_implementation='static'", **settings)


def test_a_reason_is_said_once(caplog):
    model, inputs = pkv_hf.patch(tiny("llama")), left_padded(20)
    with caplog.at_level(logging.WARNING, logger="pkv_hf"):
        for _ in range(3):
            model(**inputs, **{CACHE: PagedCache(model.config)})
    assert [record.getMessage() for record in caplog.records] == [
        "pkv_hf: left to transformers' own path: gradients are being computed: use torch.no_grad() or "
        "torch.inference_mode()"
    ]


def test_an_attention_implementation_set_later_is_what_a_left_call_runs_by():
    model, inputs = pkv_hf.patch(tiny("llama")), left_padded(20)
    expected = tiny("llama").generate(**inputs, max_new_tokens=9)
    model.set_attn_implementation("eager")
    assert torch.equal(model.generate(**inputs, max_new_tokens=9), expected)
    assert_on_pages(model)
    assert model(**inputs, output_attentions=True).attentions[0] is not None
    assert model.model.config._attn_implementation == "eager"


def test_positional_arguments():
    model, inputs = tiny("llama"), left_padded(20)
    with torch.no_grad():
        expected = model.model(inputs["input_ids"], inputs["attention_mask"])[0]
        pkv_hf.patch(model)
        cache = PagedCache(model.config)
        torch.testing.assert_close(model.model(inputs["input_ids"], None, None, cache)[0], expected)
    assert cache.get_seq_length() == 20


def test_models_that_cannot_be_served_are_named_with_the_reason():
    bloom = BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=32, n_head=2, vocab_size=64))
    with pytest.raises(pkv_hf.UnsupportedModelError, match="no module of its BloomModel goes through"):
        pkv_hf.patch(bloom)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16))
    with pytest.raises(pkv_hf.UnsupportedModelError, match="encoder-decoder"):
        pkv_hf.patch(t5)
    with pytest.raises(pkv_hf.UnsupportedModelError, match="Linear"):
        pkv_hf.patch(torch.nn.Linear(2, 2))
    assert not hasattr(bloom, "_pkv_hf_state")


@pytest.mark.parametrize(
    ("layer_types", "says"),
    [
        (["full_attention", "chunked_attention", "full_attention"], "attention_chunk_size"),
        (["linear_attention"] * 3, "every layer of Qwen2Config keeps a LinearAttentionLayer: pages would hold nothing"),
    ],
)
def test_layers_that_cannot_be_held_are_refused(layer_types, says):
    model = tiny("qwen2")  # which has no size of chunks
    model.config.layer_types = layer_types
    before = attributes(model)
    with pytest.raises(pkv_hf.UnsupportedModelError, match=says):
        pkv_hf.patch(model)
    assert attributes(model) == before
    with pytest.raises(ValueError, match=says):
        PagedCache(model.config)


def test_bad_settings_are_named_and_change_nothing():
    model = tiny("llama")
    before = attributes(model)
    with pytest.raises(ValueError, match="route='fast'"):
        pkv_hf.patch(model, route="fast")
    with pytest.raises(ValueError, match="page_size=17"):
        pkv_hf.patch(model, page_size=17)
    assert attributes(model) == before
    with pytest.raises(ValueError, match="not patched"):
        pkv_hf.report(model)


def test_a_named_route_that_cannot_serve_raises_with_all_reasons(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model, inputs = pkv_hf.patch(tiny("llama"), route="split"), left_padded(20)
    for held in ((20, 2), (0, 0)):  # the first prompt shows what the layers are
        cache = PagedCache(model.config)
        with pytest.raises(RouteError, match=r"route='split' cannot serve .*split: .*GPU"):
            model.generate(**inputs, **{CACHE: cache}, max_new_tokens=5)
        assert (cache.get_seq_length(), cache.memory().pages_in_use) == held
    expected = tiny("llama").generate(**inputs, max_new_tokens=5)
    assert torch.equal(pkv_hf.patch(model).generate(**inputs, max_new_tokens=5), expected)


def test_two_models_and_their_caches_do_not_meet():
    first, second = pkv_hf.patch(tiny("llama", seed=1)), pkv_hf.patch(tiny("llama", seed=2), page_size=32)
    inputs = left_padded(30, 9)
    expected = [tiny("llama", seed=seed).generate(**inputs, max_new_tokens=15) for seed in (1, 2)]
    for _ in range(2):
        assert torch.equal(first.generate(**inputs, max_new_tokens=15), expected[0])
        assert torch.equal(second.generate(**inputs, max_new_tokens=15), expected[1])


def test_assisted_generation_between_patched_models():
    model, draft = tiny("llama", seed=1), tiny("llama", seed=2)
    inputs = left_padded(30)
    settings = {"max_new_tokens": 20, "assistant_model": draft, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    pkv_hf.patch(model), pkv_hf.patch(draft)
    assert torch.equal(model.generate(**inputs, **settings), expected)


def test_the_report_reads_as_text(capsys):
    model = pkv_hf.patch(tiny("qwen3"))
    model.generate(**left_padded(9), max_new_tokens=3)
    report = pkv_hf.report(model)
    assert not capsys.readouterr().out  # or a notebook would show it twice
    assert repr(report) == str(report)
    assert (report.family, report.layers, report.route) == ("qwen3", COMMON["num_hidden_layers"], "sdpa")
    for words in ("qwen3, 3 attention layers", "pages of 16", "last step: sdpa", "split: Triton kernels need a GPU"):
        assert words in repr(report)


def test_a_peft_model_is_unwrapped():
    peft = pytest.importorskip("peft")
    inputs = left_padded(30, 9)

    def adapted():
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(tiny("llama"), config).eval()

    expected = adapted().generate(**inputs, max_new_tokens=20)
    assert not torch.equal(expected, tiny("llama").generate(**inputs, max_new_tokens=20))  # the adapter does something
    model = adapted()
    before = attributes(model)
    pkv_hf.patch(model)
    output = model.generate(**inputs, max_new_tokens=20, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert isinstance(output[CACHE], PagedCache)
    assert not left(model)
    assert attributes(pkv_hf.unpatch(model)) == before


def test_a_chat_begun_in_inference_mode_goes_on_outside():
    model, inputs = tiny("llama"), left_padded(20)
    expected = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    with pkv_hf.patched(model):
        with torch.inference_mode():
            first = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        ids = first.sequences.clone()
        assert torch.equal(model.generate(ids, **{CACHE: first[CACHE]}, max_new_tokens=8, do_sample=False), expected)
