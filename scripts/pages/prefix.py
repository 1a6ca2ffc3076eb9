"""The table of docs/performance.md about prompts that begin alike."""

from __future__ import annotations

from collections.abc import Callable

import pages
from pkv_hf.bench.results.published import Record, of_every_gpu, of_one_run, table

CASE = ("case", "model", "dtype", "document", "questions", "turns", "turn", "shots", "new_tokens")
WORDS: dict[str, Callable[[Record], str]] = {
    "document": lambda r: f"{r['questions']} questions on {r['document']:,} tokens",
    "chat": lambda r: f"a chat of {r['turns']} turns",
    "few-shot": lambda r: f"lm-eval, {r['questions']} questions after {r['shots']} examples",
}

Pair = dict[str, Record]
"""Records of one run, by engine."""

COLUMNS: dict[str, Callable[[Pair], str]] = {
    "case": lambda pair: f"{pair['patched']['model']} {pair['patched']['dtype']}, {words(pair)}",
    "first tokens, s, without": lambda pair: seconds(pair["patched"]["first_token_s"]),
    "with": lambda pair: seconds(pair["prefix-cache"]["first_token_s"]),
    "sooner": lambda pair: times(pair, "first_token_s"),
    "all, s, without": lambda pair: seconds(pair["patched"]["seconds"]),
    "all, with": lambda pair: seconds(pair["prefix-cache"]["seconds"]),
    "faster": lambda pair: times(pair, "seconds"),
    "tokens saved": lambda pair: f"{pair['prefix-cache']['tokens_saved']:,}",
    "held, MiB": lambda pair: f"{pair['prefix-cache']['held_bytes'] / 2**20:,.0f}",
    "same answers": lambda pair: f"{pair['prefix-cache']['same_answers']:.0%}",
}


def words(pair: Pair) -> str:
    return WORDS[pair["patched"]["case"]](pair["patched"])


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def times(pair: Pair, name: str) -> str:
    before, after = pair["patched"][name], pair["prefix-cache"][name]
    return "-" if before is None else f"{before / after:.1f}x"


def prefix_table(records: list[Record]) -> str:
    runs = of_one_run(records, CASE, ("patched", "prefix-cache"))
    return table(COLUMNS, [{r["engine"]: r for r in run} for run in runs], [r for run in runs for r in run])


TABLES: dict[str, Callable[[], str]] = {"prefix": lambda: of_every_gpu(pages.read("prefix.jsonl"), prefix_table)}
