"""What rows have in common is prefilled once and held once: beams, sequences of one prompt, forks, prefixes."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BatchEncoding,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

import pkv_hf
from pkv_hf import PagedCache
from pkv_hf.compat import CACHE
from pkv_hf.runtime.step import Step
from tiny import COMMON, assert_on_pages, left_padded, randomized, tiny

pytestmark = pytest.mark.contract

FAMILIES = ("llama", "mistral", "qwen2-windows")


def generate(model, inputs, new_tokens=10, **settings):
    return model.generate(
        **inputs, max_new_tokens=new_tokens, return_dict_in_generate=True, **{"do_sample": False, **settings}
    )


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny(request.param)


@pytest.fixture
def forwards(monkeypatch) -> list[tuple[int, ...]]:
    """Collects the rows and tokens of what the first layer keeps. A spy in the model would keep rows apart."""
    seen, update = [], Step.update

    def spy(step, k, v, layer_idx):
        if not layer_idx:
            seen.append((len(k), k.shape[2]))
        return update(step, k, v, layer_idx)

    monkeypatch.setattr(Step, "update", spy)
    return seen


@pytest.mark.parametrize("settings", [{"num_beams": 4}, {"num_return_sequences": 4, "do_sample": True}], ids=str)
def test_a_prompt_goes_through_the_model_once(settings, forwards):
    generate(pkv_hf.patch(tiny("llama")), left_padded(40, 40), 3, **settings)
    assert forwards == [(2, 40), (8, 1), (8, 1)]


def test_rows_that_differ_are_not_taken_for_one():
    """A custom loop may change the rows that generate() repeated."""
    model = tiny("llama")

    def loop(model, input_ids, generation_config, **kwargs):
        input_ids = input_ids.clone()
        input_ids[1, -1] += 1
        kwargs = {name: kwargs[name] for name in (CACHE, "position_ids", "use_cache") if name in kwargs}
        return model._prefill(input_ids, generation_config, kwargs).logits

    def call():
        return model.generate(**left_padded(20), num_return_sequences=2, do_sample=True, custom_generate=loop)

    expected = call()
    assert not torch.equal(*expected)
    with pkv_hf.patched(model):
        torch.testing.assert_close(call(), expected)


def test_positions_that_all_rows_share():
    """They are no row's own: the prompt goes through the model as it is."""
    model = tiny("llama")

    def loop(model, input_ids, generation_config, **kwargs):
        positions = 3 * torch.arange(input_ids.shape[1])[None]
        kwargs = {"position_ids": positions, CACHE: kwargs[CACHE], "use_cache": True}
        return model._prefill(input_ids, generation_config, kwargs).logits

    def call():
        return model.generate(**left_padded(20), num_return_sequences=2, do_sample=True, custom_generate=loop)

    expected = call()
    with pkv_hf.patched(model):
        torch.testing.assert_close(call(), expected)


@torch.no_grad()
def test_beams_go_on_from_a_cache_that_holds_a_row_for_each():
    model, inputs = tiny("llama"), left_padded(20, 20)
    head = inputs["input_ids"][:, :15].repeat_interleave(2, dim=0)

    def call(cache):
        model(head, **{CACHE: cache})
        return generate(model, inputs, num_beams=2, **{CACHE: cache}).sequences

    expected = call(DynamicCache(config=model.config))
    with pkv_hf.patched(model):
        assert torch.equal(call(PagedCache(model.config)), expected)
        assert_on_pages(model)


def test_hooks_see_every_row():
    model = tiny("llama")
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))
    with pkv_hf.patched(model):
        generate(model, left_padded(20, 11), 2, num_beams=2)
    assert seen == [(4, 20), (4, 1)]


def test_adapters_of_their_own_for_each_row():
    """PEFT's mixed batches: a hook tells every layer which row takes which adapter."""
    peft = pytest.importorskip("peft")

    def config():
        return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    torch.manual_seed(3)
    model = peft.get_peft_model(tiny("llama"), config(), adapter_name="a")
    model.add_adapter("b", config())
    model.eval()
    for settings in ({}, {"num_beams": 2}):
        expected = generate(model, left_padded(20, 11), adapter_names=["a", "b"], **settings).sequences
        with pkv_hf.patched(model):
            output = generate(model, left_padded(20, 11), adapter_names=["a", "b"], **settings).sequences
        assert torch.equal(output, expected)


@pytest.mark.parametrize("length", [64, 75])
@pytest.mark.parametrize("settings", [{"num_beams": 4}, {"num_return_sequences": 4, "do_sample": True}], ids=str)
def test_just_the_pages_of_the_prompt_and_of_each_rows_own_tokens_are_reserved(length, settings):
    model = pkv_hf.patch(tiny("llama"))
    memory = generate(model, left_padded(length), 40, **settings)[CACHE].memory()
    own = -(-(length + 39) // 16) - length // 16
    assert memory.pages_in_use + memory.pages_free == length // 16 + 4 * own


@pytest.mark.parametrize("fails", [False, True], ids=["", "that fail"])
def test_a_cache_expects_no_copies_after_beams(fails, monkeypatch):
    """It is the caller's own: the next prompt may be of other rows."""
    model, cache = tiny("llama"), PagedCache(tiny("llama").config, max_length=75)
    with pkv_hf.patched(model):
        if fails:
            monkeypatch.setattr(model.lm_head, "forward", lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                generate(model, left_padded(40), num_beams=4, **{CACHE: cache})
            monkeypatch.undo()
        else:
            generate(model, left_padded(40), num_beams=4, **{CACHE: cache})
        cache.reset()
        memory = generate(model, left_padded(40), **{CACHE: cache})[CACHE].memory()
    assert memory.pages_in_use == -(-75 // 16)


def test_eight_beams_hold_little_more_than_one_row(smollm2, pydoc_ids):
    """Over SmolLM2's first layers: pages are counted once for all of them."""
    settings = {**smollm2.config.to_dict(), "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    model.load_state_dict(smollm2.state_dict(), strict=False)
    with pkv_hf.patched(model):
        memory = generate(model, {"input_ids": pydoc_ids[:, :2048]}, 32, num_beams=8)[CACHE].memory()
    row = -(-(2048 + 32) // 16)
    assert memory.pages_in_use < 1.3 * row
    assert memory.held_bytes < 1.3 * row * 16 * 3 * 2 * 3 * 64 * 4  # a token: 3 layers, K and V, 3 heads of 64, float32


def test_a_reorder_asks_the_device_once(monkeypatch):
    """Tables are on the host and beams on the device: one transfer for all kinds of layers is what it takes."""
    cache = PagedCache(tiny("qwen2-windows").config)
    for layer in range(3):
        cache.update(torch.randn(4, 2, 20, 16), torch.randn(4, 2, 20, 16), layer)
    transfers = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: transfers.append(tensor.shape) or cpu(tensor))
    pointers = [storage.k.data_ptr() for table in cache.tables.values() for storage in table.pool.storage.values()]
    cache.reorder_cache(torch.tensor([3, 3, 0, 1]))
    assert transfers == [(4,)]
    assert pointers == [s.k.data_ptr() for table in cache.tables.values() for s in table.pool.storage.values()]


def test_a_page_is_copied_by_those_that_write_into_it(model):
    prefix = pkv_hf.prefix(pkv_hf.patch(model), left_padded(40)["input_ids"])
    before = prefix.cache().memory().pages_in_use
    outputs = [generate(model, prefix.inputs([5 + i, 6, 7]), 2) for i in range(2)]
    pkv_hf.unpatch(model)
    caches = [output[CACHE] for output in outputs]
    for window, table in caches[0].tables.items():
        other, base = caches[1].tables[window], prefix._cache.tables[window]
        whole = 40 // 16
        assert (table.pages[:, :whole] == other.pages[:, :whole]).all()
        assert (table.pages[:, :whole] == base.pages[:, :whole])[table.pages[:, :whole] > 0].all()
        assert len({int(t.pages[0, whole]) for t in (table, other, base)}) == 3
    assert prefix.cache().memory().pages_in_use == before


@pytest.mark.parametrize("patch", [True, False], ids=["patched", "unpatched"])
def test_a_prefix_is_continued_as_if_it_were_part_of_the_prompt(model, patch):
    ids, turns = left_padded(40)["input_ids"], left_padded(5, 5, 5, seed=1)["input_ids"]
    whole = {"input_ids": torch.cat([ids.expand(3, -1), turns], dim=1), "attention_mask": torch.ones(3, 45).long()}
    expected, one = generate(model, whole), generate(model, {name: value[:1] for name, value in whole.items()})
    try:
        prefix = pkv_hf.prefix(pkv_hf.patch(model) if patch else model, ids)
        for _ in range(2):
            assert torch.equal(generate(model, prefix.inputs(turns)).sequences, expected.sequences)
            assert torch.equal(generate(model, prefix.inputs(turns[0].tolist())).sequences, one.sequences)
        if patch:
            assert_on_pages(model)
    finally:
        pkv_hf.unpatch(model)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}], ids=str)
def test_beams_and_samples_go_on_from_a_prefix(model, settings):
    ids, turns = left_padded(40)["input_ids"], left_padded(5, 5, seed=1)["input_ids"]
    whole = {"input_ids": torch.cat([ids.expand(2, -1), turns], dim=1), "attention_mask": torch.ones(2, 45).long()}
    torch.manual_seed(2)
    expected = generate(model, whole, **settings)
    with pkv_hf.patched(model):
        prefix = pkv_hf.prefix(model, ids)
        torch.manual_seed(2)
        assert torch.equal(generate(model, prefix.inputs(turns), **settings).sequences, expected.sequences)
        assert_on_pages(model)


def test_a_conversation_goes_on_from_a_prefix(model):
    ids, turn = left_padded(40)["input_ids"], left_padded(5, seed=1)["input_ids"]
    with pkv_hf.patched(model):
        first = generate(model, pkv_hf.prefix(model, ids).inputs(turn))
        ids = torch.cat([first.sequences, turn], dim=1)
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}  # the padding's token may come up as another
        second = generate(model, whole, **{CACHE: first[CACHE]})
    assert torch.equal(second.sequences, generate(model, whole).sequences)


def test_texts(smollm2, smollm2_tokenizer):
    prefix, texts = "The capital of France is Paris.", [" The capital of Italy is", " The river"]
    with pkv_hf.patched(smollm2):
        shared = pkv_hf.prefix(smollm2, prefix, smollm2_tokenizer)
        for text in texts:
            inputs = smollm2_tokenizer(prefix + text, return_tensors="pt")
            output = generate(smollm2, shared.inputs(text), 4).sequences
            assert torch.equal(output, generate(smollm2, inputs, 4).sequences)
        assert len(shared.inputs([texts[0], " The capital of Spain is"])["input_ids"]) == 2


def test_what_is_no_prefix_is_named():
    model = tiny("llama")
    for given, says in (
        ("text", "text_or_ids is text, which needs a tokenizer"),
        ([], "text_or_ids has a row without a token"),
        (torch.zeros(1, 0, dtype=torch.long), "text_or_ids has a row without a token"),
        ([[1, 2], [3, 4]], "text_or_ids has 2 rows"),
    ):
        with pytest.raises(ValueError, match=says):
            pkv_hf.prefix(model, given)
    prefix = pkv_hf.prefix(model, [3, 4, 5])
    assert len(prefix) == 3
    with pytest.raises(ValueError, match="continuations is text"):
        prefix.inputs(["text"])
    with pytest.raises(ValueError, match="continuations has a row without a token"):
        prefix.inputs([[1], []])
    with pytest.raises(ValueError, match="rows=0"):
        prefix.cache(0)


@pytest.mark.parametrize("as_tensors", [True, False])
def test_what_a_chat_template_returns_is_a_prefix(as_tensors):
    model, ids = pkv_hf.patch(tiny("llama")), left_padded(40)["input_ids"]
    rows = ids if as_tensors else ids[0].tolist()
    mask = torch.ones_like(ids) if as_tensors else [1] * 40
    shared = pkv_hf.prefix(model, BatchEncoding({"input_ids": rows, "attention_mask": mask}))
    assert torch.equal(shared.ids, ids)
    inputs = shared.inputs(BatchEncoding({"input_ids": [[7, 8, 9]], "attention_mask": [[1, 1, 1]]}))
    tokens = generate(model, inputs).sequences
    whole = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    assert torch.equal(tokens, generate(pkv_hf.unpatch(model), whole).sequences)


@pytest.mark.parametrize(
    ("encoding", "reason"),
    [
        ({"input_ids": [5, 6], "attention_mask": [0, 1]}, "text_or_ids is padded"),
        ({"input_ids": [[5], [6, 7]], "attention_mask": [[1], [1, 0]]}, "text_or_ids is padded"),
        ({"pixel_values": [1]}, r"text_or_ids has \['pixel_values'\] and no input_ids"),
    ],
)
def test_what_a_tokenizer_returns_may_not_be_padded(encoding, reason):
    with pytest.raises(ValueError, match=reason):
        pkv_hf.prefix(tiny("llama"), BatchEncoding(encoding))


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_prompts_with_images_go_through_the_model_as_transformers_repeats_them(settings):
    """generate() hands encoded images on, repeated, beside the prompts: which of them is whose, nothing says."""
    text = {**COMMON, "model_type": "llama", "vocab_size": 256, "num_hidden_layers": 2}
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {"image_size": 56, "patch_size": 14}
    config = SmolVLMConfig(image_token_id=255, pad_token_id=0, text_config=text, vision_config={**vision, **sizes})
    model = randomized(SmolVLMForConditionalGeneration, config)
    ids = torch.tensor([[5, 9, *[255] * 4, 21, 33]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 1, 3, 56, 56)}

    def call():
        torch.manual_seed(1)
        return generate(model, inputs, 6, pad_token_id=0, **settings).sequences

    expected = call()
    with pkv_hf.patched(model):
        assert torch.equal(call(), expected)
        assert_on_pages(model)
