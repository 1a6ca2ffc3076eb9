"""TRL's SFTTrainer on a patched model: its losses to the bit, and samples on pages between its steps."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

import pkv_hf
from pkv_hf import PagedCache
from pkv_hf.compat import CACHE
from tiny import byte_tokenizer, tiny

pytest.importorskip("trl")  # not for Python 3.10
peft = pytest.importorskip("peft")

TEXTS = [f"Row {i}: the sum of {i} and {i} is {2 * i}." for i in range(12)]


class Samples(TrainerCallback):
    def __init__(self, prompt) -> None:
        self.prompt = prompt
        self.caches: list[object] = []
        self.tokens: list[torch.Tensor] = []

    def on_step_end(self, args, state, control, model, **_):
        model.eval()
        output = model.generate(**self.prompt, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        model.train()
        self.caches.append(output[CACHE])
        self.tokens.append(output.sequences)


def test_losses_are_to_the_bit_and_samples_use_pages(tmp_path):
    from trl import SFTConfig, SFTTrainer

    tokenizer = byte_tokenizer(pad_token="<pad>", eos_token="<eos>")
    prompt = tokenizer("Row 7", return_tensors="pt")
    logs, samples = [], []
    for patch in (False, True):
        model = tiny("llama", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
        if patch:
            pkv_hf.patch(model)
        samples.append(Samples(prompt))
        arguments = SFTConfig(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
            max_length=64, save_strategy="no", report_to=[], use_cpu=True, bf16=False,
            disable_tqdm=True, seed=7,
        )  # fmt: skip
        torch.manual_seed(0)
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_dict({"text": TEXTS}), processing_class=tokenizer,
            peft_config=peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1), callbacks=[samples[-1]],
        )  # fmt: skip
        trainer.train()
        keys = ("loss", "grad_norm", "mean_token_accuracy")
        logs.append([log[key] for log in trainer.state.log_history if "loss" in log for key in keys])
    assert len(logs[0]) == 6
    assert logs[0] == logs[1]
    assert all(torch.equal(*pair) for pair in zip(*(callback.tokens for callback in samples)))
    assert not any(isinstance(cache, PagedCache) for cache in samples[0].caches)
    assert len(samples[1].caches) == 2
    assert all(isinstance(cache, PagedCache) for cache in samples[1].caches)
