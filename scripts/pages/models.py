"""The tables of docs/models.md: which models are served, by the newest run of scripts/record_models.py over all."""

from __future__ import annotations

from collections.abc import Sequence

import pages
from pkv_hf.bench.model_types.reasons import shared
from pkv_hf.bench.results.published import Record, markdown, measured_on

PAGE = pages.ROOT / "docs" / "models.md"

WORDS = {"pages": "on pages", "left": "left", "raises": "refused", "wrong": "wrong", "own error": "not known"}
NO_GPU = "Triton kernels need a GPU"
NO_RUN = "No run of all models is committed yet.\n"
EXAMPLES = 3


def newest_run() -> list[Record]:
    """The records of the last run of all models by route auto that came to its end, none where there is none."""
    runs: dict[str, list[Record]] = {}
    for record in pages.read("models.jsonl"):
        if record["route"] == "auto":
            runs.setdefault(record["date"], []).append(record)
    whole = [run for run in runs.values() if len(run) == run[0]["of"]]
    return whole[-1] if whole else []


def why(record: Record) -> str:
    """How the steps of a model on pages run, or why it is not there."""
    if record["status"] != "pages":
        return shared(record["reason"])
    layers = "its own layers" if record["own_layers"] else "fused layers"
    rejected = record["split_rejected"] or ""
    return (
        layers if not rejected or rejected.startswith(NO_GPU) else f"{layers}, attention by torch: {shared(rejected)}"
    )


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


def reasons() -> str:
    """How many models share a reason: by status, the most frequent ones first."""
    sharing: dict[tuple[str, str], list[str]] = {}
    for r in newest_run():
        if r["status"] != "pages":
            sharing.setdefault((r["status"], why(r)), []).append(r["model_type"])
    order = list(WORDS)
    rows = []
    for (status, reason), named in sorted(sharing.items(), key=lambda each: (order.index(each[0][0]), -len(each[1]))):
        examples = list(dict.fromkeys(named))
        such_as = ", ".join([*examples[:EXAMPLES], *(["..."] if len(examples) > EXAMPLES else [])])
        rows.append([cell(reason), WORDS[status], f"{len(named)}", such_as])
    return texts(["why", "status", "models", "such as"], rows)


def every_model() -> str:
    rows = [
        [f"{r['model_type']}: {r['variant']}" if r["variant"] else r["model_type"], r["class"], WORDS[r["status"]],
         cell(why(r))]
        for r in sorted(newest_run(), key=lambda r: (r["model_type"].lower(), r["class"], r["variant"]))
    ]  # fmt: skip
    return texts(["model type", "class", "status", "how its steps run, or why not"], rows)


def texts(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of words, aligned left."""
    return markdown(header, rows).replace("---:", "---", len(header) - 1)


def cell(text: str) -> str:
    """A text as a table's cell holds it."""
    return text.replace("|", "\\|").replace("<", "&lt;")


TABLES = {"models-summary": summary, "models-reasons": reasons, "models": every_model}
