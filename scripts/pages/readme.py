"""The short figures of README.md, of one GPU, and what it needs."""

from __future__ import annotations

import configparser
import json
import re
from collections.abc import Callable

import pages
from pages import GPU, models, performance, quality
from pkv_hf import compat
from pkv_hf.bench.results.published import NO_GPU_RUN, Record, markdown, measured_on

PAGE = pages.ROOT / "README.md"
SHAPE = {"model": "llama-3.1-8b", "dtype": "bfloat16", "weights": None, "adapter": None}
CONTEXTS = (8192, 32_768)


def greedy_runs() -> list[dict[str, Record]]:
    """Runs of the 8B shape that have both of our peers, by engine."""
    records = [
        r
        for r in performance.generate_records("greedy")
        if r["gpu"] == GPU and all(r.get(key) == value for key, value in SHAPE.items())
    ]
    return [run for run in performance.compared(records) if all(peer in run for peer in performance.PEERS)]


NEW_TOKENS = 500
"""Of the call whose time is told."""


def in_context() -> list[dict[str, Record]]:
    return [run for run in greedy_runs() if tuple(run["patched"]["lengths"]) in [(context,) for context in CONTEXTS]]


def call_s(r: Record) -> float:
    """Seconds of a call: its first token, then steps."""
    return (r["first_token_ms"] + (NEW_TOKENS - 1) * r["step_ms_p50"]) / 1e3


def factors(runs: list[dict[str, Record]], peer: str, seconds: Callable[[Record], float]) -> str:
    return " and ".join(f"{seconds(run[peer]) / seconds(run['patched']):.1f}" for run in runs)


def unpatched_ms() -> tuple[float, float]:
    """The least and the most that a step with the default cache took at the first of the contexts, over all runs."""
    found = [
        r["step_ms_p50"]
        for r in performance.generate_records("greedy")
        if r["gpu"] == GPU and r["engine"] == "dynamic" and r["lengths"] == [CONTEXTS[0]]
        and all(r.get(key) == value for key, value in SHAPE.items())
    ]  # fmt: skip
    return min(found), max(found)


def headline() -> str:
    runs = in_context()
    if not runs:
        return NO_GPU_RUN
    engines = [*performance.PEERS, "patched"]
    rows = []
    for run in runs:
        tokens = f"{run['patched']['lengths'][0]:,} tokens"
        rows += [
            [f"{tokens}: ms a token after the first", *(f"{run[e]['step_ms_p50']:.2f}" for e in engines)],
            [f"{tokens}: the first token, s", *(f"{run[e]['first_token_ms'] / 1e3:.2f}" for e in engines)],
            [f"{tokens}: a call of {NEW_TOKENS} new tokens, s", *(f"{call_s(run[e]):.1f}" for e in engines)],
        ]
    header = ["one prompt of", "default cache", "static cache + `torch.compile`", "patched"]
    contexts = " and ".join(f"{run['patched']['lengths'][0]:,}" for run in runs)
    floors = " and ".join(f"{run['patched']['percent_of_floor']:.0f}" for run in runs)
    step = factors(runs, "static-compile", lambda r: r["step_ms_p50"])
    least, most = unpatched_ms()
    ours = runs[0]["patched"]["step_ms_p50"]
    return (
        f"**Tokens come {step} times as fast as with transformers' static cache and `torch.compile`**, at {contexts} "
        "tokens of context. No step can be faster than reading weights and cache once (the memory floor); this is "
        f"{floors} % of that speed. Against the default cache it is {least / ours:.0f} to {most / ours:.0f} times at "
        f"{CONTEXTS[0]:,} tokens. That depends on your CPU, for which the GPU then waits: such a step took "
        f"{least:.0f} to {most:.0f} ms in our runs. The table is of one of them.\n\n"
        + markdown(header, rows)
        + f"\nLlama-3.1-8B's dimensions with random weights, bfloat16. A call's time is its first token and "
        f"{NEW_TOKENS - 1} median steps.\n" + measured_on([r for run in runs for r in run.values()])
    )


def report() -> str:
    """What the notebook's call printed on a GPU."""
    cells = json.loads((pages.ROOT / "notebooks" / "colab.ipynb").read_text())["cells"]
    printed = ["".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", [])]
    (text, *_) = [
        found[0] for found in (re.search(r"^family .*?^steps .*?$", text, re.M | re.S) for text in printed) if found
    ]
    return f"```\n{text}\n```\n"


def memory() -> str:
    runs = in_context()
    if not runs:
        return NO_GPU_RUN
    rows = [
        [f"1 x {run['patched']['lengths'][0]:,} tokens", *(performance.GREEDY[column](performance.Row(run[name], run))
         for column in ("KV, MiB", "peak, GiB") for name in ("dynamic", "patched"))]
        for run in runs
    ]  # fmt: skip
    header = ["Llama-3.1-8B's shape", "K and V, default cache, MiB", "on pages", "peak, default cache, GiB", "on pages"]
    return f"As much as the default cache. On an {GPU}:\n\n" + markdown(header, rows)


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
    if not run:
        return models.NO_RUN
    on_pages = [r for r in run if r["status"] == "pages"]
    among = [name for name in models.WELL_KNOWN if name in {r["model_type"] for r in on_pages}]
    ways = [models.why(r) for r in on_pages]
    whole, parts = (
        sum(bool(re.match(way, each)) for each in ways) for way in (r"fused($|;| but for)", "fused but for")
    )
    served = f"{len(on_pages)} run on pages" + (f", among them {', '.join(among)}" if among else "")
    return (
        f"Of the {len(run)} models in transformers {run[0]['transformers']}, {served}. Of {whole} of them our kernels "
        f"run whole layers, not attention alone; in {parts} of these a part of a layer, the code around experts say, "
        "runs as it is.\n"
    )


def models_refused() -> str:
    """The reasons for which `patch` raises, those first that most models share."""
    refused = [(why, names) for (status, why), names in models.sharing().items() if status == "raises"]
    return "; ".join(f"{why} ({models.such_as(names)})" for why, names in refused) + ".\n" if refused else models.NO_RUN


def quality_short() -> str:
    """Chunk mode scores enough tokens to tell; contexts beyond the model's own are on the page."""
    found = [
        r
        for r in quality.perplexity_records()
        if r["gpu"] == GPU and r["mode"] == "chunk" and not r["rope_scaling"] and "difference_error_percent" in r
    ]
    lines = [
        f"- pages of {r['kv_dtype'] or r['dtype']}: {r['difference_percent']:+.3f} ± "
        f"{r['difference_error_percent']:.3f} % ({r['windows']} x {r['context']:,} tokens)\n"
        for r in found
    ]
    return "".join(lines) or NO_GPU_RUN


def finetune_short() -> str:
    lines = [
        f"- {performance.training(r)}: the perplexity of held-out text went from {r['perplexity_before']:.2f} to "
        f"{r['perplexity_after']:.2f}. Served with its adapters, a step of {r['prompts']} rows takes "
        f"{r['step_ms_p50']:.1f} ms, unpatched {r['step_ms_p50_unpatched']:.0f}.\n"
        for r in performance.finetune_records()
        if r["gpu"] == GPU
    ]
    return f"On an {GPU}:\n\n" + "".join(lines) if lines else NO_GPU_RUN


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline,
    "report": report,
    "requirements": requirements,
    "models-short": models_short,
    "models-refused": models_refused,
    "memory": memory,
    "quality-short": quality_short,
    "finetune-short": finetune_short,
}
