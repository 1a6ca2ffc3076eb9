"""The short figures of README.md, of one GPU."""

from __future__ import annotations

from collections.abc import Callable

import pages
from pages import GPU, performance, quality
from pkv_hf.bench.results.published import NO_GPU_RUN, Record

PAGE = pages.ROOT / "README.md"
SHAPE = {"model": "llama-3.1-8b", "dtype": "bfloat16", "weight_bits": None}
CONTEXTS = (8192, 32_768)


def greedy_runs() -> list[dict[str, Record]]:
    """Runs of the 8B shape that have both of our peers, by engine."""
    records = [
        r
        for r in performance.generate_records("greedy")
        if r["gpu"] == GPU and all(r.get(key) == value for key, value in SHAPE.items())
    ]
    return [run for run in performance.compared(records) if all(peer in run for peer in performance.PEERS)]


def sentence(run: dict[str, Record]) -> str:
    ours = run["patched"]
    default, compiled = (run[peer]["step_ms_p50"] / ours["step_ms_p50"] for peer in performance.PEERS)
    return (
        f"At 1 x {ours['lengths'][0]:,} tokens a decode step takes {ours['step_ms_p50']:.2f} ms, "
        f"{ours['percent_of_floor']:.0f} % of the memory floor: **{compiled:.1f} times as fast** as transformers' "
        f"static cache with `torch.compile`, {default:.1f} times as fast as its default cache.\n"
    )


def headline() -> str:
    by_lengths = {tuple(run["patched"]["lengths"]): run for run in greedy_runs()}
    runs = [by_lengths[context,] for context in CONTEXTS if (context,) in by_lengths]
    if not runs:
        return NO_GPU_RUN
    return (
        f"Llama-3.1-8B's shape in bfloat16 on an {GPU}:\n\n"
        + "".join(f"- {sentence(run)}" for run in runs)
        + "\nThe factor over the default cache depends on the host, which issues its steps one kernel at a time.\n"
    )


def quality_short() -> str:
    """Chunk mode scores enough tokens to tell; contexts beyond the model's own are on the page."""
    found = [
        r
        for r in quality.perplexity_records()
        if r["gpu"] == GPU and r["mode"] == "chunk" and not r["rope_scaling"] and "difference_error_percent" in r
    ]
    lines = [
        f"- {r['kv_dtype'] or r['dtype']} pages: {r['difference_percent']:+.3f} ± {r['difference_error_percent']:.3f} %"
        f" ({r['model']}, {r['windows']} x {r['context']:,} tokens)\n"
        for r in found
    ]
    return "".join(lines) or NO_GPU_RUN


def finetune_short() -> str:
    lines = [
        f"- {performance.training(r)}: perplexity of held-out text {r['perplexity_before']:.2f} to "
        f"{r['perplexity_after']:.2f}, then served at {r['step_ms_p50']:.2f} ms a step where transformers takes "
        f"{r['step_ms_p50_unpatched']:.2f}\n"
        for r in performance.finetune_records()
        if r["gpu"] == GPU
    ]
    return "".join(lines) or NO_GPU_RUN


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline,
    "quality-short": quality_short,
    "finetune-short": finetune_short,
}
