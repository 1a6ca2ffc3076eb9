"""Decode steps over static buffers through the fused layers, in Triton's interpreter."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import pkv_hf
from pkv_hf.compat import CACHE
from pkv_hf.runtime.captured.watch import Watch
from tiny import assert_on_pages, decode_logits, left_padded, tiny


@torch.no_grad()
def test_blocks_longer_than_a_decode_step_are_appended_and_attended():
    def blocks(cache):
        first = model(**inputs, **{CACHE: cache})
        mask, cache, logits = inputs["attention_mask"], first[CACHE], []
        for block in turn.split(9, dim=1):  # a decode step takes 8
            mask = torch.cat([mask, torch.ones_like(block)], dim=1)
            logits.append(model(input_ids=block, attention_mask=mask, **{CACHE: cache}).logits)
        return torch.cat(logits, dim=1)

    model, inputs = tiny("qwen2-windows"), left_padded(40, 11)
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1.5
    turn = torch.randint(2, 128, (2, 18))
    expected = blocks(None)
    with pkv_hf.patched(model, route="split"):
        torch.testing.assert_close(blocks(pkv_hf.PagedCache(model.config)), expected, atol=1e-4, rtol=1e-4)


def generate(model, inputs, **settings):
    return model.generate(**inputs, **{"max_new_tokens": 6, "do_sample": False, **settings})


@pytest.mark.parametrize("route", ["split", "workqueue"])
def test_speculative_steps_of_several_tokens(route):
    model, inputs = tiny("llama"), left_padded(16)
    inputs["input_ids"][0, 8:] = inputs["input_ids"][0, :8]  # something to look up
    expected = generate(model, inputs, prompt_lookup_num_tokens=4)
    with pkv_hf.patched(model, route=route):
        assert torch.equal(generate(model, inputs, prompt_lookup_num_tokens=4), expected)


def test_hooks_keep_running_at_every_step():
    model, inputs, calls = tiny("llama"), left_padded(9), []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    with pkv_hf.patched(model, route="split"):
        generate(model, inputs)
        assert len(calls) == 6
        assert any("hooks" in reason for reason in pkv_hf.report(model).left)
        handle.remove()
        generate(model, inputs)
        assert len(calls) == 6


def test_the_hook_of_fine_tuning_leaves_steps_as_they_are():
    model, inputs, calls = tiny("llama"), left_padded(9), []
    model.enable_input_require_grads()
    expected = generate(model, inputs)

    def make_inputs_require_grads(module, args, output):
        calls.append(1)
        output.requires_grad_(True)

    with pkv_hf.patched(model, route="split"):
        assert torch.equal(generate(model, inputs), expected)
        assert_on_pages(model)
        model.get_input_embeddings().register_forward_hook(make_inputs_require_grads)  # that does more
        assert torch.equal(generate(model, inputs), expected)
        assert len(calls) == 6
        assert any("hooks" in reason for reason in pkv_hf.report(model).left)


def test_a_forward_of_the_callers_own_keeps_running_at_every_step():
    model, inputs, calls = tiny("llama"), left_padded(9), []
    forward = model.forward
    model.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    with pkv_hf.patched(model, route="split"):
        generate(model, inputs)
        assert any("forward of its own" in reason for reason in pkv_hf.report(model).left)
    assert len(calls) == 6


@torch.no_grad()
def test_pages_filled_under_autocast_are_read_without_it():
    model, inputs = tiny("llama"), left_padded(9)
    for settings in ({}, {"run_ahead": False}):
        with pkv_hf.patched(model, **settings):
            cache = pkv_hf.PagedCache(model.config)
            with torch.autocast("cpu", torch.bfloat16):
                model(**inputs, **{CACHE: cache})
            assert torch.bfloat16 in cache.dtypes
            ids = torch.cat([inputs["input_ids"], torch.tensor([[5, 6]])], dim=1)
            out = model.generate(ids, **{CACHE: cache}, max_new_tokens=3, do_sample=False)
            assert out.shape == (1, 14)


def test_rope_that_follows_the_length_runs_transformers_layers():
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    model, inputs = tiny("llama", rope_parameters=rope, max_position_embeddings=12), left_padded(9)
    expected = generate(model, inputs)
    with pkv_hf.patched(model, route="split"):
        assert torch.equal(generate(model, inputs), expected)
        assert any("rope_type 'dynamic'" in reason for reason in pkv_hf.report(model).left)


def test_a_cache_is_copied_without_its_static_steps():
    model, inputs = tiny("llama"), left_padded(9)
    with pkv_hf.patched(model, route="split"):
        first = generate(model, inputs, return_dict_in_generate=True)
        twin = copy.deepcopy(first[CACHE])
        assert first[CACHE].static_steps
        assert not twin.static_steps
        ids = torch.cat([first.sequences, torch.tensor([[7, 8]])], dim=1)
        one = model.generate(ids, **{CACHE: twin}, max_new_tokens=4, do_sample=False)
        other = model.generate(ids, **{CACHE: first[CACHE]}, max_new_tokens=4, do_sample=False)
    assert torch.equal(one, other)


def test_adapters_go_through_their_own_forward():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(target_modules=["q_proj", "gate_proj", "down_proj"], init_lora_weights=False)
    model, inputs = peft.get_peft_model(tiny("llama"), settings).eval(), left_padded(9, 5)
    expected = generate(model, inputs)
    with model.disable_adapter():
        bare = generate(model, inputs)
    assert not torch.equal(expected, bare)
    with pkv_hf.patched(model, route="split"):
        assert torch.equal(generate(model, inputs), expected)
        with model.disable_adapter():
            assert torch.equal(generate(model, inputs), bare)
        assert torch.equal(generate(model, inputs), expected)


@torch.no_grad()
def test_a_step_without_position_ids_counts_from_the_past():
    model, inputs, logits = tiny("llama"), left_padded(9, 4), []
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 2, dtype=torch.long)], dim=1)
    for patch in (False, True):
        if patch:
            pkv_hf.patch(model, route="split")
        cache = pkv_hf.PagedCache(model.config)
        model(**inputs, **{CACHE: cache})
        token, positions = torch.full((2, 1), 5), mask[:, :10].sum(dim=1, keepdim=True) - 1
        model(token, attention_mask=mask[:, :10], position_ids=positions, **{CACHE: cache})
        logits.append(model(token, attention_mask=mask, **{CACHE: cache}).logits)
    torch.testing.assert_close(*logits)


class Interrupt(TorchDispatchMode):
    """Ctrl-C after a number of torch's operations."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after, self.count = after, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.count += 1
        if self.count == self.after:
            raise KeyboardInterrupt
        return output


@torch.no_grad()
def test_a_step_that_is_interrupted_after_its_work_was_queued_goes_nowhere():
    def run(after):
        model = pkv_hf.patch(tiny("llama", num_hidden_layers=1), route="split")
        cache, logits, interrupt = pkv_hf.PagedCache(model.config, max_length=64), [], Interrupt(after)
        model(inputs["input_ids"], **{CACHE: cache})
        for t in range(4):
            token = torch.tensor([[5 + t]])
            if t == 2:
                with contextlib.suppress(KeyboardInterrupt), interrupt:
                    model(token, **{CACHE: cache})
                cache.crop(11 - cache.get_seq_length())  # where the step had ended
            logits.append(model(token, **{CACHE: cache}).logits[0, -1])
        assert pkv_hf.report(model).steps.eager == 0
        return torch.stack(logits), interrupt.count

    inputs = left_padded(9)
    expected, operations = run(0)
    for after in [operations // 2, *range(operations - 7, operations + 1)]:
        assert torch.equal(run(after)[0], expected), after


class HalvedWeight(torch.Tensor):
    """A weight kept in another form, in a plain layer, as torchao's are: it names a dtype that it is not stored in."""

    @staticmethod
    def __new__(cls, stored: torch.Tensor, dtype: torch.dtype):
        return torch.Tensor._make_wrapper_subclass(cls, stored.shape, dtype=dtype)

    def __init__(self, stored: torch.Tensor, dtype: torch.dtype) -> None:
        self.stored = stored

    def __tensor_flatten__(self):
        return ["stored"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].stored, args[0].dtype)
        plain = [2 * arg.stored.to(arg.dtype) if isinstance(arg, cls) else arg for arg in args]
        return function(*plain, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_only_look_plain_go_through_their_own_forward(dtype):
    from pkv_hf.patches.projections.module import Own
    from pkv_hf.patches.projections.registry import Kinds

    model, inputs = tiny("llama").to(dtype), left_padded(9)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
            stored = module.weight.detach() / 2
            module.weight = torch.nn.Parameter(HalvedWeight(stored, dtype), requires_grad=False)
    linear = model.model.layers[0].mlp.gate_proj
    assert type(linear) is torch.nn.Linear
    kinds, x = Kinds(), torch.zeros(1, 64, dtype=dtype)
    assert type(kinds((linear,), x)) is Own
    assert "a Linear keeps its weight as a HalvedWeight" in kinds.why_own((linear,), x)
    expected = decode_logits(model, inputs)
    with pkv_hf.patched(model, route="split"):
        torch.testing.assert_close(
            decode_logits(model, inputs), expected, atol=0.1 if dtype != torch.float32 else 1e-4, rtol=1e-3
        )
    watch = Watch(model, model.config)
    assert watch.unchanged()
    linear.weight = torch.nn.Parameter(HalvedWeight(linear.weight.stored.clone(), dtype), requires_grad=False)
    assert not watch.unchanged()


CHANGES = {
    "data": lambda layer: setattr(layer.mlp.up_proj.weight, "data", layer.mlp.up_proj.weight.data.clone()),
    "parameter": lambda layer: setattr(layer.input_layernorm, "weight", torch.nn.Parameter(torch.ones(64))),
    "bias": lambda layer: setattr(layer.mlp.up_proj, "bias", torch.nn.Parameter(torch.ones(96))),
    "module": lambda layer: setattr(layer.mlp, "up_proj", torch.nn.Linear(64, 96, bias=False)),
    "more modules": lambda layer: setattr(layer.mlp, "more", torch.nn.Linear(64, 96)),
    "dtype": lambda layer: layer.to(torch.bfloat16),
    "hook": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    "forward": lambda layer: setattr(layer.mlp, "forward", lambda x: x),
    "more buffers": lambda layer: layer.register_buffer("more", torch.ones(1)),
    "scaling": lambda layer: setattr(layer.self_attn, "scaling", 2.0),
}


class TestWatch:
    def test_nothing_changed(self):
        model = tiny("llama")
        watch = Watch(model, model.config)
        model(**left_padded(9))
        with torch.no_grad():
            model.lm_head.weight.mul_(2)  # in place: a graph reads the new values
        assert watch.unchanged()
        assert not watch.reason

    @pytest.mark.parametrize("change", CHANGES)
    def test_changes(self, change):
        model = tiny("llama")
        watch = Watch(model, model.config)
        CHANGES[change](model.model.layers[0])
        assert not watch.unchanged()

    def test_another_buffer(self):
        model = tiny("llama")
        watch = Watch(model, model.config)
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.clone()
        assert not watch.unchanged()

    def test_tensors_in_the_place_of_settings(self):
        for value in (torch.ones(2), [torch.ones(2)]):
            model = tiny("llama")
            model.model.layers[0].self_attn.some = [1.0]
            watch = Watch(model, model.config)
            assert watch.unchanged()
            model.model.layers[0].self_attn.some = value
            assert not watch.unchanged()

    def test_adapters(self):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"]))
        watch = Watch(model.get_base_model(), model.config)
        assert watch.unchanged()
        with model.disable_adapter():
            assert not watch.unchanged()
        assert watch.unchanged()
        model.get_base_model().model.layers[0].self_attn.q_proj.scaling["default"] *= 2
        assert not watch.unchanged()
        watch = Watch(model.get_base_model(), model.config)
        model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))
        assert not watch.unchanged()
        watch = Watch(model.get_base_model(), model.config)
        model.set_adapter("other")
        assert not watch.unchanged()
        watch = Watch(model.get_base_model(), model.config)
        model.merge_adapter()
        assert not watch.unchanged()
