"""Tables of docs/performance.md about layers of any structure: shapes that have a name, and the checks of layers."""

from __future__ import annotations

from collections.abc import Callable

import pages
from pages import performance
from pkv_hf.bench.inputs.shapes import SHAPES
from pkv_hf.bench.results.published import Record, is_cpu, of_every_gpu, table

ELSEWHERE = "llama-3.1-8b", "llama-3.2-1b"
"""Shapes that tables of their own have more of."""

BY_SHAPE: dict[str, Callable[[performance.Row], str]] = {
    "shape": lambda row: row.record["model"],
    "layers of": lambda row: SHAPES[row.record["model"]].source,
    "prompt": lambda row: f"{row.record['lengths'][0]:,}",
    "step ms, p50": lambda row: f"{row.record['step_ms_p50']:.2f}",
    "of the memory floor": lambda row: f"{row.record['percent_of_floor']:.0f} %",
    "`dynamic`, ms": lambda row: f"{row.run['dynamic']['step_ms_p50']:.2f}",
    "of it": lambda row: f"{row.run['dynamic']['percent_of_floor']:.0f} %",
    "logit error over `dynamic`'s": lambda row: over(row.record["logit_error"], row.run["dynamic"]["logit_error"]),
}


def over(error: float | None, own: float | None) -> str:
    return "-" if error is None or not own else f"{error / own:.2f}"


def shapes_table(records: list[Record]) -> str:
    """One prompt of each shape in bfloat16, the longest that was measured up to 8,192 tokens."""
    fitting = [
        r
        for r in records
        if r["model"] in SHAPES and r["model"] not in ELSEWHERE
        and r["dtype"] == "bfloat16" and not r.get("weights") and not r.get("adapter")
        and len(r["lengths"]) == 1 and r["lengths"][0] <= 8192
    ]  # fmt: skip
    longest = {run["patched"]["model"]: run for run in performance.compared(fitting)}  # which are in their order
    rows = [performance.Row(longest[name]["patched"], longest[name]) for name in SHAPES if name in longest]
    return table(BY_SHAPE, rows, [r for row in rows for r in row.run.values()])


def layers_records(*parts: str) -> list[Record]:
    newest = pages.newest("layers.jsonl", ("part", "name", "gpu"))
    return [r for r in newest if r["part"] in parts and not is_cpu(r)]


CHECKED: dict[str, Callable[[Record], str]] = {
    "small model": lambda r: r["name"] if r["part"] == "models" else f"{r['model']}, altered: {r['name']}",
    "layers fused": lambda r: f"{r['bfloat16']['fused']} of {r['bfloat16']['layers']}",
    "float32: same tokens": lambda r: "yes" if r["float32"]["tokens_equal"] else "no",
    "logit error, bfloat16": lambda r: f"{r['bfloat16']['logit_error']:.1e}",
    "over transformers'": lambda r: over(r["bfloat16"]["logit_error"], r["bfloat16"]["own_logit_error"]),
}

SELF_CHECK: dict[str, Callable[[Record], str]] = {
    "shape": lambda r: f"{r['name']} {r['dtype']}",
    "layers fused": lambda r: f"{r['fused']} of {r['layers']}",
    "s, with kernels to compile": lambda r: f"{r['first_s']:.1f}",
    "s, without": lambda r: f"{r['compiled_s']:.2f}",
    "peak, MiB": lambda r: f"{r['peak_bytes'] / 2**20:,.0f}",
    "a layer in float32, MiB": lambda r: f"{r['layer_float32_bytes'] / 2**20:,.0f}",
}


def layers_table(columns: dict[str, Callable[[Record], str]], *parts: str) -> str:
    ran = (r for r in layers_records(*parts) if "error" not in r)
    return of_every_gpu(ran, lambda found: table(columns, found, found))


TABLES: dict[str, Callable[[], str]] = {
    "shapes": lambda: of_every_gpu(performance.on_gpus("greedy"), shapes_table),
    "layers-checked": lambda: layers_table(CHECKED, "models", "altered"),
    "self-check": lambda: layers_table(SELF_CHECK, "self-check"),
}
