"""Prompts that begin alike, with and without a prefix cache: questions on a document, a chat, a few-shot task.

The engines are a patched model as it is, and with `prefix_cache`. Both are asked the same prompts in the same order,
each as a script asks: by `generate()`, one at a time, or through lm-eval in batches. A chat's prompts have the answers
that the first engine gave. Tokens are compared: in float32 a difference is an error, and nothing is recorded.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pkv_hf.arguments import count, memory_size, needs
from pkv_hf.bench.compare import check_patchable
from pkv_hf.bench.inputs import models, texts
from pkv_hf.bench.measure import run_generate
from pkv_hf.bench.results.records import OUT_FOLDER, append_record, environment, output
from pkv_hf.errors import UsageError, status
from pkv_hf.patching import patched
from pkv_hf.prefixes import clear_prefix_cache
from pkv_hf.reporting import report
from pkv_hf.tables import mebibytes, table

ENGINES = ("patched", "prefix-cache")
CASES = ("document", "chat", "few-shot")

CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Japan Tokyo, Norway Oslo, Cuba Havana, Austria Vienna, Egypt Cairo, "
    "Greece Athens, Hungary Budapest, India Delhi, Iran Tehran, Iraq Baghdad, Ireland Dublin, Kenya Nairobi, "
    "Lebanon Beirut, Peru Lima, Poland Warsaw, Portugal Lisbon, Russia Moscow, Sweden Stockholm, Syria Damascus, "
    "Thailand Bangkok, Turkey Ankara, Germany Berlin, Finland Helsinki, Denmark Copenhagen, China Beijing"
)
TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
fewshot_split: test
fewshot_config: {{sampler: first_n}}
output_type: generate_until
doc_to_text: "Question: which city is the capital of {{{{land}}}}?\\nAnswer:"
doc_to_target: "{{{{city}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, regexes_to_ignore: ["^ "]}}]
"""


class Asked:
    """Prompts, and what a model made of them, one after another."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.answers: list[list[int]] = []
        self.first_token_s = self.seconds = 0.0

    def ask(self, model: Any, prompt: list[int], new_tokens: int) -> list[int]:
        ids = torch.tensor([prompt], device=model.device)
        run = run_generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, new_tokens)
        self.prompts.append(prompt)
        self.answers.append(run.sequences[0, len(prompt) :].tolist())
        self.first_token_s += run.first_token_s
        self.seconds += run.first_token_s + sum(run.step_s)
        return self.answers[-1]

    def figures(self) -> dict[str, Any]:
        return {"first_token_s": self.first_token_s, "seconds": self.seconds, "answers": self.answers}


def questions(arguments: argparse.Namespace, model: Any, tokenizer: Any, before: Asked | None, asked: Asked) -> None:
    """Questions of 24 tokens, each after one document."""
    text = _text(arguments, tokenizer, arguments.document + 24 * arguments.questions)
    for n in tqdm(range(arguments.questions), "questions"):
        begin = arguments.document + 24 * n
        asked.ask(model, text[: arguments.document] + text[begin : begin + 24], arguments.new_tokens)


def chat(arguments: argparse.Namespace, model: Any, tokenizer: Any, before: Asked | None, asked: Asked) -> None:
    """Turns that each say something after all that was said and answered before."""
    text, so_far = _text(arguments, tokenizer, arguments.turns * arguments.turn), list[int]()
    for n in tqdm(range(arguments.turns), "turns"):
        prompt = so_far + text[n * arguments.turn : (n + 1) * arguments.turn]
        answer = asked.ask(model, prompt, arguments.new_tokens)
        so_far = prompt + (answer if before is None else before.answers[n])


def _text(arguments: argparse.Namespace, tokenizer: Any, needed: int) -> list[int]:
    found = texts.token_ids(tokenizer, texts.load_texts(arguments), needed).tolist()
    if len(found) < needed:
        raise UsageError(f"the texts have {len(found)} tokens, of which {needed} are needed: pass longer ones, or less "
                         "of --document, --questions, --turns")  # fmt: skip
    return found


def few_shot(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    """A task of lm-eval, by its own loop: whole seconds, and what was answered."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "capitals.jsonl"
        lines = [dict(zip(("land", "city"), line.split())) for line in CAPITALS.split(", ")]
        file.write_text("\n".join(map(json.dumps, lines)))
        (Path(folder) / "capitals.yaml").write_text(TASK.format(file=file))
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
        manager = TaskManager(include_path=folder, include_defaults=False)
        begin = time.perf_counter()
        found = lm_eval.simple_evaluate(
            wrapped, tasks=["capitals"], task_manager=manager, num_fewshot=arguments.shots, bootstrap_iters=0,
        )  # fmt: skip
    return {
        "first_token_s": None,
        "seconds": time.perf_counter() - begin,
        "answers": [sample["resps"] for sample in found["samples"]["capitals"]],
        "score": found["results"]["capitals"]["exact_match,none"],
    }


def run_case(arguments: argparse.Namespace, case: str, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """A case by both engines, as records."""
    results: dict[str, dict[str, Any]] = {}
    before: Asked | None = None
    for engine in ENGINES:
        with patched(model, prefix_cache=arguments.prefix_cache if engine == "prefix-cache" else None):
            Asked().ask(model, list(range(5, 69)), 4)  # whatever a first call has to do
            clear_prefix_cache(model)
            if case == "few-shot":
                results[engine] = few_shot(arguments, model, tokenizer)
            else:
                asked = Asked()
                (questions if case == "document" else chat)(arguments, model, tokenizer, before, asked)
                before = before or asked
                results[engine] = asked.figures()
            ran = report(model)
        results[engine] |= {"route": ran.route, "left": list(ran.left)}
        if use := ran.prefix_cache:
            results[engine] |= {
                "hits": use.hits, "tokens_saved": use.tokens_saved, "held_bytes": use.nbytes,
                "not_cached": list(use.not_cached),
            }  # fmt: skip
    answers = [results[engine].pop("answers") for engine in ENGINES]
    same = sum(a == b for a, b in zip(*answers)) / len(answers[0])
    if same < 1 and arguments.dtype == "float32":
        raise SystemExit(f"error: {1 - same:.1%} of the answers are others with the prefix cache")
    shape: dict[str, Any] = {
        "document": {"document": arguments.document, "questions": arguments.questions},
        "chat": {"turns": arguments.turns, "turn": arguments.turn},
        "few-shot": {"shots": arguments.shots, "questions": len(answers[0])},
    }[case]
    common = {"bench": "prefix", "case": case, "model": arguments.model, "dtype": arguments.dtype,
              "rope_scaling": arguments.rope_scaling, "new_tokens": arguments.new_tokens,
              "prefix_cache": arguments.prefix_cache, **shape, "same_answers": same}  # fmt: skip
    return [{**common, "engine": engine, **results[engine], **environment()} for engine in ENGINES]


def measure(arguments: argparse.Namespace) -> None:
    if "few-shot" in arguments.cases:
        needs("lm_eval")
    try:
        memory_size("prefix_cache", arguments.prefix_cache, "2GiB")
    except ValueError as error:
        raise UsageError(f"--prefix-cache: {error}") from error
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = models.load(arguments.model, models.DTYPES[arguments.dtype], device, arguments.rope_scaling)
    if "document" in arguments.cases:
        longest = arguments.document + 24 + arguments.new_tokens
        models.check_positions(model, longest, f"--document {arguments.document}, with a question and its answer,")
    if "chat" in arguments.cases:
        longest = arguments.turns * (arguments.turn + arguments.new_tokens)
        models.check_positions(model, longest, f"--turns {arguments.turns}, with their answers,")
    check_patchable(model)
    records = []
    for case in arguments.cases:
        found = run_case(arguments, case, model, tokenizer)
        for record in found:
            append_record(arguments.out, record)
        records += found
    show(records)


def show(records: list[dict[str, Any]]) -> None:
    rows = [
        (r["case"], r["engine"], "-" if r["first_token_s"] is None else f"{r['first_token_s']:.2f}",
         f"{r['seconds']:.2f}", r.get("tokens_saved", "-"), mebibytes(r.get("held_bytes", 0)))
        for r in records
    ]  # fmt: skip
    print(table(("case", "engine", "first tokens s", "all s", "tokens saved", "held"), rows), end="\n\n")
    print(json.dumps({"records": len(records), "same_answers": min(r["same_answers"] for r in records)}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_arguments(parser)
    texts.add_arguments(parser)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--document", type=count, default=2048, metavar="N", help="tokens of the document")
    parser.add_argument("--questions", type=count, default=32, metavar="N", help="on it")
    parser.add_argument("--turns", type=count, default=20, metavar="N", help="of the chat")
    parser.add_argument("--turn", type=count, default=64, metavar="N", help="tokens that each of them says")
    parser.add_argument("--shots", type=count, default=8, metavar="N", help="examples before each question of the task")
    parser.add_argument("--new-tokens", type=lambda text: count(text, 2), default=16, metavar="N", help="of an answer")
    parser.add_argument("--prefix-cache", default="2GiB", metavar="SIZE")
    parser.add_argument("--out", type=output, default=f"{OUT_FOLDER}/prefix.jsonl")
    arguments = parser.parse_args()
    return status("benchmark_prefix", lambda: measure(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
