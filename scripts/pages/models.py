"""The tables of docs/models.md: which models are served, by the newest run of scripts/record_models.py over all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import pages
from pkv_hf.bench.model_types.modes import ALIKE, ON_PAGES
from pkv_hf.bench.model_types.reasons import shared
from pkv_hf.bench.results.published import Record, markdown, measured_on

PAGE = pages.ROOT / "docs" / "models.md"

WORDS = {"pages": "on pages", "left": "left", "raises": "refused", "wrong": "wrong", "own error": "not known"}
NO_GPU = "Triton kernels need a GPU"
NO_RUN = "No run of all models is committed yet.\n"
NO_MODES = "The committed run compared none.\n"
AS_IT_IS = r"their (\w+) is called as it is"
OWN_PATH = ("static cache", "forward")
"""Modes that are transformers' own path by design."""
EXAMPLES = 3
WELL_KNOWN = (
    "qwen3_vl", "qwen2_5_vl", "gemma4", "gemma3", "mistral3", "internvl", "llama4", "qwen3_5", "qwen3_next",
    "granitemoehybrid", "falcon_h1", "mamba2", "gpt_oss", "deepseek_v3", "deepseek_v32", "bloom", "mpt",
    "t5gemma2", "blip", "gemma3n",
)  # fmt: skip
"""Model types that tables name first."""


def newest_run() -> list[Record]:
    """The records of the last run of all models by route auto that came to its end, none where there is none."""
    runs: dict[str, list[Record]] = {}
    for record in pages.read("models.jsonl", modes={}):
        if record["route"] == "auto":
            runs.setdefault(record["date"], []).append(record)
    whole = [run for run in runs.values() if len(run) == run[0]["of"]]
    return whole[-1] if whole else []


def why(record: Record) -> str:
    """How the steps of a model on pages run, or why it is not there."""
    if record["status"] != "pages":
        return shared(record["reason"])
    if "fused" not in record:  # of a run that did not say
        return "not recorded"
    rejected = record["split_rejected"] or ""
    if rejected and not rejected.startswith(NO_GPU):
        return f"its own layers, attention by torch: {shared(rejected)}"
    if record["eager"]:
        return f"its own layers: {shared(record['eager'])}"
    steps = fused(record)
    if record["not_captured"]:
        return f"{steps}; not captured: {shared(record['not_captured'])}"
    return f"{steps}; not run ahead: {shared(record['not_run_ahead'])}" if record["not_run_ahead"] else steps


def fused(record: Record) -> str:
    """Which layers of a model, and what of them, our kernels run."""
    called = {module[1]: None for why in record["not_fused"] if (module := re.search(AS_IT_IS, why))}
    others = dict.fromkeys(shared(why) for why in record["not_fused"] if not re.search(AS_IT_IS, why))
    if not record["fused"]:
        return f"its own layers: {', '.join(others)}"
    layers = "" if record["fused"] == record["layers"] else f" {record['fused']} of {record['layers']} layers"
    but_for = f" but for {', '.join(called)}" if called else ""
    return f"fused{layers}{but_for}" + (f" ({', '.join(others)})" if others else "")


def modes_of(record: Record) -> str:
    """Which of the other modes are not on pages, though the same; "-" where none was compared."""
    compared: dict[str, str] = record["modes"] or {}
    names = [mode for mode, how in compared.items() if how != ON_PAGES and mode not in OWN_PATH]
    return f"all but {', '.join(names)}" if names else "all" if compared else "-"


def summary() -> str:
    run = newest_run()
    if not run:
        return NO_RUN
    kinds = [[r for r in run if bool(r["variant"]) == variant] for variant in (False, True)]
    rows = [
        [word, *(f"{sum(r['status'] == status for r in kind)}" for kind in kinds)] for status, word in WORDS.items()
    ]
    rows.append(["all", *(f"{len(kind)}" for kind in kinds)])
    says = f"{rows[0][1]} of {rows[-1][1]} models of transformers {run[0]['transformers']} run on pages.\n\n"
    return says + markdown(["status", "models", "published variants"], rows) + measured_on(run)


def modes() -> str:
    """How many of the models on pages run a mode in each way; one that differs is wrong and not among them."""
    run = [r for r in newest_run() if r["modes"] and r["status"] == "pages"]
    if not run:
        return NO_MODES
    rows = [[mode, *(f"{sum(r['modes'][mode] == how for r in run)}" for how in ALIKE)] for mode in run[0]["modes"]]
    header = ["mode", "the same, on pages", "the same, by transformers", "transformers refuses it"]
    return f"Of the {len(run)} models and variants on pages:\n\n" + markdown(header, rows)


def sharing() -> dict[tuple[str, str], list[str]]:
    """The model types that share a status and a reason: by status, the most frequent reasons first."""
    found: dict[tuple[str, str], list[str]] = {}
    for r in newest_run():
        if r["status"] != "pages":
            found.setdefault((r["status"], why(r)), []).append(r["model_type"])
    order = list(WORDS)
    return dict(sorted(found.items(), key=lambda each: (order.index(each[0][0]), -len(each[1]))))


def such_as(model_types: Iterable[str]) -> str:
    """A few of the model types, those first that many people know."""
    different = dict.fromkeys(model_types)
    examples = [*(name for name in WELL_KNOWN if name in different), *(n for n in different if n not in WELL_KNOWN)]
    return ", ".join([*examples[:EXAMPLES], *(["..."] if len(examples) > EXAMPLES else [])])


def reasons() -> str:
    """How many models share a reason."""
    rows = [
        [cell(reason), WORDS[status], f"{len(named)}", such_as(named)] for (status, reason), named in sharing().items()
    ]
    return texts(["why", "status", "models", "such as"], rows)


def every_model() -> str:
    run = sorted(newest_run(), key=lambda r: (r["model_type"].lower(), r["class"], r["variant"]))
    rows = [
        [f"{r['model_type']}: {r['variant']}" if r["variant"] else r["model_type"], r["class"], WORDS[r["status"]],
         cell(why(r)), modes_of(r)]
        for r in run
    ]  # fmt: skip
    header = ["model type", "class", "status", "how its steps run, or why not", "other modes"]
    shown = len(header) - (not any(r["modes"] for r in run))
    return texts(header[:shown], [row[:shown] for row in rows])


def texts(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of words, aligned left."""
    return markdown(header, rows).replace("---:", "---", len(header) - 1)


def cell(text: str) -> str:
    """A text as a table's cell holds it."""
    return text.replace("|", "\\|").replace("<", "&lt;")


TABLES = {"models-summary": summary, "models-modes": modes, "models-reasons": reasons, "models": every_model}
