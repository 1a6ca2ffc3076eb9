"""One object, both lives: a patched model trains as transformers alone does, and generates between and after steps."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments

import pkv_hf
from pkv_hf import PagedCache
from pkv_hf.compat import CACHE
from pkv_hf.replaced import STATE
from pkv_hf.runtime.captured.watch import Watch
from tiny import COMMON, assert_on_pages, left_padded, tiny

peft = pytest.importorskip("peft")

PROMPT = left_padded(20)
STEPS = 3


def adapted(model, name="default", seed=3, **settings):
    """The model with adapters that change its tokens, and that use the random generator in training."""
    torch.manual_seed(seed)
    settings = {"target_modules": ["q_proj", "o_proj", "down_proj"], "lora_dropout": 0.1, **settings}
    config = peft.LoraConfig(r=4, init_lora_weights=False, **settings)
    if not isinstance(model, peft.PeftModel):
        return peft.get_peft_model(model, config, adapter_name=name)
    model.add_adapter(name, config)
    return model


def generate(model, **settings):
    return model.generate(**PROMPT, **{"max_new_tokens": 8, "do_sample": False, **settings})


def blocks(count: int, vocab_size: int = COMMON["vocab_size"], length: int = 16) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(2, vocab_size, (count, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


class Samples(TrainerCallback):
    """Generates after every step, with the model as it is."""

    def __init__(self) -> None:
        self.caches: list[object] = []
        self.tokens: list[torch.Tensor] = []

    def on_step_end(self, args, state, control, model=None, **_):
        training = model.training
        model.eval()
        output = generate(model, return_dict_in_generate=True)
        model.train(training)
        self.caches.append(output[CACHE])
        self.tokens.append(output.sequences)


def train(model, folder, samples=None, data=None, trainer=Trainer, arguments=TrainingArguments, **settings):
    """Losses of every step and of the evaluations between them, from transformers' Trainer."""
    settings = {"per_device_train_batch_size": 2, "max_steps": STEPS, "eval_steps": 2, **settings}
    arguments = arguments(
        output_dir=str(folder), logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        eval_strategy="steps", learning_rate=1e-2, seed=7, **settings,
    )  # fmt: skip
    data = data or blocks(12)
    callbacks = [samples] if samples else []
    run = trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:2], callbacks=callbacks)
    run.train()
    return [log[key] for log in run.state.log_history for key in ("loss", "grad_norm", "eval_loss") if key in log]


WAYS = {
    "before": lambda: adapted(pkv_hf.patch(tiny("llama"))),
    "after": lambda: pkv_hf.patch(adapted(tiny("llama"))),
    "all weights": lambda: pkv_hf.patch(tiny("llama")),
}


@pytest.mark.parametrize(
    ("way", "checkpointing"), [("before", True), ("after", False), ("after", True), ("all weights", False)]
)
def test_training_with_samples_between_is_transformers_own_to_the_bit(way, checkpointing, tmp_path):
    plain = tiny("llama") if way == "all weights" else adapted(tiny("llama"))
    expected = train(plain, tmp_path, gradient_checkpointing=checkpointing)
    model, samples = WAYS[way](), Samples()
    assert train(model, tmp_path, samples, gradient_checkpointing=checkpointing) == expected
    assert len(expected) == 2 * STEPS + 2
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(isinstance(cache, PagedCache) for cache in samples.caches)
    assert len({tuple(tokens[0].tolist()) for tokens in samples.tokens}) > 1  # each sees the weights of its step
    expected_tokens = generate(plain.eval())
    assert torch.equal(samples.tokens[-1], expected_tokens)
    assert torch.equal(generate(model.eval()), expected_tokens)


class Generating(Seq2SeqTrainer):
    """For decoders the labels are no part of the prompt."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.generated = []

    def prediction_step(self, model, inputs, *args, **kwargs):
        step = super().prediction_step(model, {"input_ids": inputs["input_ids"]}, *args, **kwargs)
        self.generated.append(step[1])
        return step


@pytest.mark.parametrize("inside_training", [False, True])
def test_predict_with_generate_uses_pages(inside_training, tmp_path):
    evaluated = {"eval_strategy": "steps", "eval_steps": 1} if inside_training else {}
    predicted = []
    for model in (adapted(tiny("llama")), pkv_hf.patch(adapted(tiny("llama")))):
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(tmp_path), predict_with_generate=True, report_to=[], use_cpu=True, disable_tqdm=True, seed=7,
            generation_max_length=24, learning_rate=1e-2, max_steps=2, save_strategy="no", **evaluated,
        )  # fmt: skip
        trainer = Generating(
            model=model, args=arguments, train_dataset=blocks(4), eval_dataset=blocks(2), compute_metrics=lambda _: {}
        )
        if inside_training:
            trainer.train()
        else:
            trainer.predict(blocks(2))
        predicted.append(trainer.generated)
    assert len(predicted[0]) == 1 + inside_training
    for theirs, ours in zip(*predicted, strict=True):
        assert theirs.shape == (2, 24)
        assert torch.equal(theirs, ours)
    assert not torch.equal(predicted[0][0], predicted[0][-1]) or not inside_training  # of other weights
    assert pkv_hf.report(model).route == "sdpa"


def saved_for_backward(model) -> int:
    """Bytes that autograd keeps of a training step."""
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**PROMPT, labels=PROMPT["input_ids"]).loss
    loss.backward()
    return sum(kept.values())


def test_training_keeps_no_more_memory_and_no_pages():
    plain, model = adapted(tiny("llama")).train(), pkv_hf.patch(adapted(tiny("llama"))).train()
    assert saved_for_backward(model) == saved_for_backward(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in plain.named_buffers()]


def test_generate_in_training_mode_is_transformers_own():
    outputs = []
    for model in (adapted(tiny("llama")), pkv_hf.patch(adapted(tiny("llama")))):
        torch.manual_seed(0)  # dropout is on
        outputs.append(generate(model.train()))
    assert torch.equal(*outputs)
    assert "training mode" in " ".join(pkv_hf.report(model).left)


@torch.no_grad()
@pytest.mark.parametrize("route", ["auto", "split"])
def test_rollouts_in_training_mode_use_pages_where_nothing_drops_out(route):
    """As reinforcement learning makes them, of a model that is not taken to eval mode."""
    if route == "split":
        pytest.importorskip("triton")
    model = tiny("llama")
    expected = generate(model)
    pkv_hf.patch(model.train(), route=route)
    assert torch.equal(generate(model), expected)
    assert_on_pages(model)
    if route == "split":
        assert pkv_hf.report(model).steps.static == 7
    model.gradient_checkpointing_enable()
    assert torch.equal(generate(model), expected)
    assert "checkpointed" in " ".join(pkv_hf.report(model).left)


@torch.no_grad()
def test_what_drops_out_in_one_layer_is_transformers_own():
    outputs = []
    for patched in (False, True):
        model = tiny("llama")
        if patched:
            pkv_hf.patch(model)
        model.model.layers[1].self_attn.train().attention_dropout = 0.5
        torch.manual_seed(0)
        outputs.append(generate(model))
    assert torch.equal(*outputs)
    model.eval()
    before = pkv_hf.report(model).calls.transformers
    generate(model)
    assert pkv_hf.report(model).calls.transformers == before


def test_training_without_a_cache_has_nothing_to_say():
    model = pkv_hf.patch(tiny("llama")).train()
    model(**PROMPT, labels=PROMPT["input_ids"], use_cache=False)
    assert not pkv_hf.report(model).left


OPERATIONS = {
    "scaled": lambda m: m.base_model.model.model.layers[0].self_attn.q_proj.scale_layer(0.5),
    "switched": lambda m: m.set_adapter("other"),
    "deleted": lambda m: m.delete_adapter("default") or m.set_adapter("other"),
    "added": lambda m: adapted(m, "third", seed=5).set_adapter("third"),
    "disabled": lambda m: m.base_model.disable_adapter_layers(),
    "merged": lambda m: m.merge_adapter(),
    "unmerged": lambda m: m.merge_adapter() or m.unmerge_adapter(),
    "weighted": lambda m: (
        m.add_weighted_adapter(["default", "other"], [0.3, 0.7], "mix", combination_type="cat") or m.set_adapter("mix")
    ),
    "unloaded": lambda m: m.unload(),
    "merged and unloaded": lambda m: m.merge_and_unload(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_adapters_changed_between_calls_give_the_right_tokens(operation):
    pytest.importorskip("triton")
    tokens = []
    for patch in (False, True):
        model = adapted(adapted(tiny("llama")), "other", seed=4).eval()
        if patch:
            pkv_hf.patch(model, route="split")
        bare = model.get_base_model()
        before = generate(model, max_new_tokens=4)
        watch = Watch(bare, bare.config)
        OPERATIONS[operation](model)
        after = generate(bare, max_new_tokens=4)  # the same object whatever is left of the wrapper
        assert watch.unchanged() == (operation == "unmerged")  # else a graph captured before would be replayed
        tokens.append((before, after))
    assert torch.equal(tokens[0][0], tokens[1][0])
    assert torch.equal(tokens[0][1], tokens[1][1])
    assert torch.equal(*tokens[1]) == ("merged" in operation)  # merging is no change of the tokens


def test_weights_trained_in_place_are_what_the_next_call_reads():
    pytest.importorskip("triton")
    model = pkv_hf.patch(adapted(tiny("llama")), route="split").eval()
    cache = generate(model, return_dict_in_generate=True)[CACHE]  # alive, with its steps
    watch = Watch(model.get_base_model(), model.config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()(**PROMPT, labels=PROMPT["input_ids"]).loss.backward()
    optimizer.step()
    tokens = generate(model.eval())
    assert watch.unchanged()  # a graph reads the addresses, which stay
    assert cache.static_steps
    assert torch.equal(tokens, generate(pkv_hf.unpatch(model)))


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.contract
def test_saved_adapters_are_as_without_the_patch_and_load_onto_a_patched_model(tmp_path):
    plain, model = adapted(tiny("llama")), adapted(pkv_hf.patch(tiny("llama")))
    plain.save_pretrained(tmp_path / "plain")
    generate(model.eval())
    model.save_pretrained(tmp_path / "patched")
    assert files(tmp_path / "patched") == files(tmp_path / "plain")
    expected = generate(plain.eval())
    for patch_first in (True, False):
        base = tiny("llama")
        if patch_first:
            pkv_hf.patch(base)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "patched").eval()
        output = generate(pkv_hf.patch(loaded), return_dict_in_generate=True)
        assert torch.equal(output.sequences, expected)
        assert isinstance(output[CACHE], PagedCache)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    plain.merge_and_unload().save_pretrained(tmp_path / "plain-merged")
    assert files(tmp_path / "merged") == files(tmp_path / "plain-merged")
    assert isinstance(generate(merged, return_dict_in_generate=True)[CACHE], PagedCache)


def torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": torch_save,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.contract
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_patched_model_is_patched_and_stands_alone(way):
    pytest.importorskip("triton")
    model = pkv_hf.patch(adapted(tiny("llama")), route="split").eval()
    output = generate(model, return_dict_in_generate=True)  # its cache keeps steps, which hold addresses and graphs
    state = getattr(model.get_base_model(), STATE)
    twin = COPIES[way](model)
    copied = getattr(twin.get_base_model(), STATE)
    assert state.static_steps
    assert not copied.static_steps
    assert copied.known.last is None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    again = generate(twin, return_dict_in_generate=True)
    assert torch.equal(again.sequences, output.sequences)
    assert isinstance(again[CACHE], PagedCache)
    names = {name for module in tiny("llama").modules() for name in vars(module)}
    left = {name for module in pkv_hf.unpatch(twin.get_base_model()).modules() for name in vars(module)}
    assert not {name for name in left - names if "pkv_hf" in name or name in ("forward", "generate")}
    assert copied is not getattr(model.get_base_model(), STATE)


def test_a_pickled_model_generates_in_another_process(tmp_path):
    model = pkv_hf.patch(tiny("llama"))
    torch.save(model, tmp_path / "model.pt")
    torch.save(PROMPT, tmp_path / "prompt.pt")
    code = (
        "import torch; from pkv_hf.compat import CACHE\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        f"prompt = torch.load({str(tmp_path / 'prompt.pt')!r})\n"
        "output = model.generate(**prompt, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)\n"
        "print(type(output[CACHE]).__name__, output.sequences[0].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"PagedCache {generate(model)[0].tolist()}", done.stderr


def test_smollm2_trains_to_the_same_losses_and_serves(smollm2, tmp_path):
    data, losses, tokens = blocks(20, vocab_size=1000, length=8), [], []
    for patch in (False, True):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.05)
        model = peft.get_peft_model(copy.deepcopy(smollm2), config)
        if patch:
            pkv_hf.patch(model)
        settings = {"per_device_train_batch_size": 1, "max_steps": 20, "data": data}
        losses.append(train(model, tmp_path, **{**settings, "eval_steps": 20}))
        tokens.append(generate(model.eval()))
    assert losses[0] == losses[1]
    assert losses[0][0] > losses[0][-1]
    assert torch.equal(*tokens)
    assert pkv_hf.report(model).route == "sdpa"


def test_a_wrapper_that_mixed_precision_leaves_is_named_and_comes_off(tmp_path):
    pytest.importorskip("triton")
    model = pkv_hf.patch(tiny("llama"), route="split")
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, bf16=True, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=blocks(8))
    trainer.train()
    model.eval()
    with pytest.raises(pkv_hf.RouteError, match="autocast"):
        generate(model)
    del model.forward  # the class's own again
    cache = generate(model, return_dict_in_generate=True)[CACHE]
    assert cache.static_steps  # fused steps
    assert torch.equal(generate(model), generate(pkv_hf.unpatch(model)))
