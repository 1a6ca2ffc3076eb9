"""The short figures of README.md, of one GPU, and what it needs."""

from __future__ import annotations

import configparser
import re
from collections.abc import Callable

import pages
from pages import GPU, models, performance, quality
from pkv_hf import compat
from pkv_hf.bench.results.published import NO_GPU_RUN, Record, markdown

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


def memory() -> str:
    runs = [run for run in greedy_runs() if tuple(run["patched"]["lengths"]) in [(context,) for context in CONTEXTS]]
    if not runs:
        return NO_GPU_RUN
    rows = [
        [f"1 x {run['patched']['lengths'][0]:,} tokens", *(performance.GREEDY[column](performance.Row(run[name], run))
         for column in ("KV, MiB", "peak, GiB") for name in ("dynamic", "patched"))]
        for run in runs
    ]  # fmt: skip
    header = ["Llama-3.1-8B's shape", "K and V, default cache, MiB", "on pages", "peak, default cache, GiB", "on pages"]
    return f"As much as the default cache, on an {GPU}:\n\n" + markdown(header, rows) + "\n"


def requirements() -> str:
    """What setup.cfg asks for, and the versions that the pinned environment and the GPU tests have."""
    setup = configparser.ConfigParser()
    setup.read(pages.ROOT / "setup.cfg")
    least = dict(re.findall(r"^(\w+)>=(\S+)$", setup["options"]["install_requires"], re.MULTILINE))
    pinned = dict(re.findall(r"^(\w+)==(\S+)$", (pages.ROOT / "constraints.txt").read_text(), re.MULTILINE))
    tested = [
        r for r in pages.read("tests.jsonl") if r["transformers"] == pages.read("tests.jsonl")[-1]["transformers"]
    ]
    versions = {
        name: ", ".join(sorted({*(r[name].split("+")[0] for r in tested), pinned[name]}))
        for name in ("torch", "triton")
    }
    rows = [
        ["Python", setup["options"]["python_requires"].lstrip(">="), "3.11, 3.12"],
        ["transformers", least["transformers"], f"{compat.OLDEST_TRANSFORMERS} to {compat.NEWEST_TRANSFORMERS}"],
        ["torch", least["torch"], versions["torch"]],
        ["Triton, which comes with torch on Linux", "", versions["triton"]],
        ["a GPU for speed", "NVIDIA, sm_75 (T4)", ", ".join(sorted({r["gpu"] for r in tested}))],
    ]
    return models.texts(["", "from", "tested with"], rows)


def models_short() -> str:
    run = [r for r in models.newest_run() if not r["variant"]]
    on_pages = [r for r in run if r["status"] == "pages"]
    fused = sorted({r["class"].removesuffix("ForCausalLM") for r in on_pages if not r["own_layers"]})
    return (
        f"Of {len(run)} models that transformers {run[0]['transformers']} has, {len(on_pages)} run on pages. "
        f"{', '.join(fused[:-1])} and {fused[-1]} have fused layers: they gain most.\n"
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
    "requirements": requirements,
    "models-short": models_short,
    "memory": memory,
    "quality-short": quality_short,
    "finetune-short": finetune_short,
}
