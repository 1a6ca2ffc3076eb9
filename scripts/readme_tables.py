"""Writes the tables of README.md and docs/quality.md from results, between marks `<!-- generated: NAME -->` and
`<!-- end -->`.

The newest record of a case counts. `--check` changes nothing and fails where a page is stale.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pkv_hf.bench.results import published
from pkv_hf.bench.results.published import NO_GPU_RUN, Record, markdown, measured_on

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def newest(name: str, case: Iterable[str], **defaults: Any) -> list[Record]:
    return published.newest(RESULTS / name, case, **defaults)


ABLATED = {"model": "llama-3.1-8b", "lengths": [8192], "weight_bits": None}
ABLATION = {
    "dynamic-cold": "transformers, first call",
    "dynamic": "transformers, second call",
    "patched-pages-only": "pages and attention kernels alone",
    "patched-no-graphs": "all but CUDA graphs",
    "patched-no-fuse": "all but fused layers",
    "patched-no-run-ahead": "all but the run-ahead loop",
    "patched": "all",
}


CASE = ("model", "dtype", "weight_bits", "lengths", "engine", "gpu", "mode", "num_beams", "assistant", "draft_tokens")
MODE = {"mode": "greedy", "num_beams": 1, "assistant": None, "draft_tokens": 0, "tokens_per_step": 1.0}
"""What records of before there were modes count as."""


def generate_records(on_gpu: bool, *modes: str) -> list[Record]:
    records = newest("generate.jsonl", CASE, **MODE)
    return [r for r in records if r["gpu"].startswith("none") != on_gpu and r["mode"] in modes]


def generate_table(on_gpu: bool) -> str:
    cases: dict[str, dict[str, Record]] = {}
    for r in generate_records(on_gpu, "greedy"):
        case = json.dumps([r.get(key) for key in ("model", "dtype", "weight_bits", "lengths", "gpu")])
        cases.setdefault(case, {})[r["engine"]] = r
    rows, records = [], []
    for found, engine in itertools.product(cases.values(), ("dynamic", "static-compile", "patched")):
        if engine not in found:
            continue
        r, base = found[engine], found["dynamic"]
        records.append(r)
        lengths = r["lengths"]
        size = (
            f"{len(lengths)} x {lengths[0]:,}" if len(set(lengths)) == 1 else f"{len(lengths)} rows, {sum(lengths):,}"
        )
        rows.append([
            f"{r['model']} {r['dtype']}{', NF4 weights' if r.get('weight_bits') else ''}, {size}",
            r["engine"] + (f" ({r['route']})" if r["route"] else ""),
            f"{r['step_ms_p50']:.2f} ({r['step_ms_p20']:.2f} to {r['step_ms_p80']:.2f})",
            f"{base['step_ms_p50'] / r['step_ms_p50']:.2f}x",
            f"{r['percent_of_floor']:.0f} %",
            f"{r['first_token_ms'] / 1e3:.2f} s",
            f"{r['peak_gib']:.1f} GiB",
            f"{r['kv_bytes'] / 2**20:,.0f} MiB",
            "yes" if r["tokens_match"] else "no",
        ])  # fmt: skip
    header = ["case", "engine", "step ms, p50 (p20 to p80)", "speed", "of the memory floor", "first token",
              "peak memory", "KV cache", "same tokens"]  # fmt: skip
    return markdown(header, rows) + measured_on(records)


def ablation_table() -> str:
    greedy = generate_records(True, "greedy")
    found = {r["engine"]: r for r in greedy if all(r.get(key) == value for key, value in ABLATED.items())}
    rows = [
        [
            words,
            f"{found[e]['step_ms_p50']:.2f}",
            f"{found[e]['percent_of_floor']:.0f} %",
            f"{found[e]['setup_s']:.1f} s",
        ]
        for e, words in ABLATION.items()
    ]
    return markdown(["8B shape, bf16, 1 x 8,192", "step ms, p50", "of the memory floor", "first call"], rows)


def modes_table() -> str:
    records = generate_records(True, "beams", "assisted")
    if not records:
        return NO_GPU_RUN
    rows = []
    for r in records:
        alike = ("model", "dtype", "lengths", "gpu", "mode", "num_beams", "assistant", "draft_tokens")
        base = next(b for b in records if b["engine"] == "dynamic" and all(b[key] == r[key] for key in alike))
        mode = f"{r['num_beams']} beams"
        if r["mode"] == "assisted":
            mode = f"{r['draft_tokens']} tokens a round from {r['assistant']}"
        rows.append([
            f"{r['model']} {r['dtype']}, {len(r['lengths'])} x {max(r['lengths']):,}, {mode}",
            r["engine"] + (f" ({r['route']})" if r["route"] else ""),
            f"{r['step_ms_p50']:.2f} ({r['step_ms_p20']:.2f} to {r['step_ms_p80']:.2f})",
            f"{base['step_ms_p50'] / r['step_ms_p50']:.2f}x",
            f"{r['tokens_per_step']:.2f}",
            f"{r['percent_of_floor']:.0f} %",
            f"{r['first_token_ms'] / 1e3:.2f} s",
            f"{r['peak_gib']:.1f} GiB",
            f"{r['kv_bytes'] / 2**20:,.0f} MiB",
        ])  # fmt: skip
    header = ["case", "engine", "step or round ms, p50 (p20 to p80)", "speed", "tokens a step", "of the memory floor",
              "first token", "peak memory", "KV cache"]  # fmt: skip
    return markdown(header, rows) + measured_on(records)


def devices_table() -> str:
    records = newest("devices.jsonl", ("model", "dtype", "lengths", "devices", "way", "engine", "gpu"))
    if not records:
        return NO_GPU_RUN
    rows = [
        [
            f"{r['model']} {r['dtype']}, {len(r['lengths'])} x {max(r['lengths']):,}",
            f"{r['way']} ({r['devices']})",
            r["engine"] + (f" ({r['route']})" if r["route"] else ""),
            f"{r['step_ms_p50']:.2f} ({r['step_ms_p20']:.2f} to {r['step_ms_p80']:.2f})",
            f"{r['first_token_ms'] / 1e3:.2f} s",
            f"{r['peak_gib']:.1f} GiB",
            "yes" if r["tokens_match"] else "no",
        ]
        for r in records
    ]
    header = ["case", "where (devices)", "engine", "step ms, p50 (p20 to p80)", "first token",
              "peak memory of the first", "tokens of one device"]  # fmt: skip
    return markdown(header, rows) + measured_on(records)


def finetune_table() -> str:
    records = newest("finetune.jsonl", ("model", "dtype", "weight_bits", "batch", "block", "rank", "prompts", "gpu"))
    if not records:
        return NO_GPU_RUN
    rows = [
        [
            f"{r['model']} {r['dtype']}{', NF4 weights' if r['weight_bits'] else ''}, rank {r['rank']}, "
            f"{r['steps']} steps of {r['batch']} x {r['block']}",
            f"{r['perplexity_before']:.2f} to {r['perplexity_after']:.2f}",
            f"{r['prompts']} x {r['new_tokens']}",
            *(
                f"{r['step_ms_p50' + s]:.2f} ({r['step_ms_p20' + s]:.2f} to {r['step_ms_p80' + s]:.2f})"
                for s in ("_unpatched", "")
            ),
            f"{r['step_ms_p50_unpatched'] / r['step_ms_p50']:.2f}x",
            "yes" if r["tokens_identical"] else "no",
        ]
        for r in records
    ]
    header = ["training", "perplexity, held out", "served", "step ms, transformers, p50 (p20 to p80)", "on pages",
              "speed", "same tokens"]  # fmt: skip
    return markdown(header, rows) + measured_on(records)


QUANTISED = {"rows": 8, "length": 16_384, "group": 4, "head_dim": 128, "page_size": 16, "holes": 0.0, "splits": 0,
             "order": "scattered"}  # fmt: skip


def quantised_table() -> str:
    case = (*QUANTISED, "query_heads", "dtype", "kv_dtype", "engine", "gpu", "commit")  # speeds are of one run
    records = newest("attention.jsonl", case, order="scattered")
    records = [r for r in records if all(r[key] == value for key, value in QUANTISED.items())]
    records = [r for r in records if r["gpu_us"] is not None and r["dtype"] == "bfloat16"]
    runs = {r["gpu"]: r["commit"] for r in records if r["kv_dtype"] != "same"}  # each GPU's last
    if not runs:
        return NO_GPU_RUN
    records = [r for r in records if r["engine"] in ("split", "workqueue") and r["commit"] == runs.get(r["gpu"])]
    base = {(r["query_heads"], r["engine"], r["gpu"]): r for r in records if r["kv_dtype"] == "same"}
    pairs = [(r, base[key]) for r in records if (key := (r["query_heads"], r["engine"], r["gpu"])) in base]
    rows = [
        [r["engine"], "bfloat16" if r["kv_dtype"] == "same" else r["kv_dtype"], f"{r['gpu_us']:.1f}",
         f"{r['gb_s']:,.0f} ({r['percent_of_read']:.0f} %)", f"{same['gpu_us'] / r['gpu_us']:.2f}x"]
        for r, same in pairs
    ]  # fmt: skip
    header = ["route", "pages", "us a layer", "GB/s, of the read bandwidth", "speed, target 1.6x"]
    return markdown(header, rows) + measured_on([r for r, _ in pairs])


def linear_table() -> str:
    records = newest("linear.jsonl", ("shape", "case", "rows", "engine", "gpu"))
    times = {(r["shape"], r["case"], r["rows"], r["engine"]): r["us_p50"] for r in records}
    counts = sorted({r["rows"] for r in records})
    rows = [
        [f"{shape}, {case}", *(
            f"{times[shape, case, count, 'cublas']:.1f} / {times[shape, case, count, 'pkv_hf']:.1f}" for count in counts
        )]
        for shape, case in dict.fromkeys((r["shape"], r["case"]) for r in records)
    ]  # fmt: skip
    header = ["us, cuBLAS / ours", *(f"{count} row{'s' * (count > 1)}" for count in counts)]
    return markdown(header, rows) + measured_on(records)


def kernels_table() -> str:
    if not (RESULTS / "kernels.jsonl").exists():
        return "No record of a GPU run is committed yet; the tests run such cases in Triton's interpreter.\n"
    records = newest("kernels.jsonl", ("route", "dtype", "gpu"))
    rows = [
        [
            r["route"],
            r["dtype"],
            f"{r['cases']}",
            f"{r['longest']:,}",
            f"{r['error_over_sdpa_p50']:.2f}",
            f"{r['error_over_sdpa_max']:.2f}",
        ]
        for r in records
    ]
    header = ["route", "dtype", "random cases", "longest row", "error / SDPA's, p50", "worst"]
    return markdown(header, rows) + measured_on(records)


def perplexity_records() -> list[Record]:
    case = (
        "model",
        "dtype",
        "kv_dtype",
        "text",
        "rope_scaling",
        "mode",
        "context",
        "chunk",
        "decode_tokens",
        "processes",
        "gpu",
    )
    return newest("perplexity.jsonl", case)


def perplexity_case(r: Record) -> list[str]:
    scaling = f", {r['rope_scaling']}" if r["rope_scaling"] else ""
    size = r["chunk"] or r["decode_tokens"]
    pages = f", {r['kv_dtype']} pages" if r.get("kv_dtype") else ""
    return [
        f"{r['model']} {r['dtype']}{pages}{scaling}, {r['text']}, {r['windows']} x {r['context']:,}",
        f"{r['mode']}, {size}",
    ]


TARGETS = {"int8": 0.5, "fp8": 0.5, "bfloat16": 0.05, "float16": 0.05, "float32": 0.01}
"""Percent that perplexity on pages may differ by, of pages that hold this. float32 is compared to 1e-4."""


def target(r: Record) -> str:
    percent = TARGETS[r.get("kv_dtype") or r["dtype"]]
    excess = abs(r["difference_percent"]) - percent
    if excess > 2 * r.get("difference_error_percent", 0.0):
        return f"{percent} %: missed"
    return f"{percent} %: {'met' if excess <= 0 else 'too few tokens to tell'}"


def difference(r: Record, suffix: str = "") -> str:
    error = r.get(f"difference_error_percent{suffix}")
    found = f"{r[f'difference_percent{suffix}']:+.6f}"
    return f"{found} %" if error is None else f"{found} ± {error:.6f} %"


def perplexity_table() -> str:
    records = perplexity_records()
    rows = [
        [
            *perplexity_case(r),
            f"{r['perplexity_forward']:.4f}",
            f"{r['perplexity']:.4f}",
            difference(r),
            target(r),
            difference(r, "_unpatched"),
            f"{r['largest_log_prob_difference']:.1e}",
            f"{r['largest_log_prob_difference_unpatched']:.1e}",
        ]
        for r in records
    ]
    header = ["windows", "mode", "perplexity, one forward", "on pages", "difference", "at most",
              "transformers' own", "largest log-prob difference", "transformers' own"]  # fmt: skip
    return markdown(header, rows) + measured_on(records)


def perplexity_speed_table() -> str:
    records = [r for r in perplexity_records() if not r["gpu"].startswith("none")]
    if not records:
        return NO_GPU_RUN
    rows = [
        [
            *perplexity_case(r),
            f"{r['tokens_per_s_unpatched']:,.1f}",
            f"{r['tokens_per_s']:,.1f}",
            f"{r['tokens_per_s'] / r['tokens_per_s_unpatched']:.2f}x",
            *(f"{r['peak_bytes' + suffix] / 2**20:,.0f} MiB" for suffix in ("_unpatched", "")),
        ]
        for r in records
    ]
    header = ["windows", "mode", "tokens/s, transformers", "on pages", "speed", "peak memory, transformers", "on pages"]
    return markdown(header, rows) + measured_on(records)


def passkey_table() -> str:
    records = newest("passkey.jsonl", ("model", "dtype", "rope_scaling", "length", "depth", "gpu"))
    groups: dict[tuple[str, ...], list[Record]] = {}
    for r in records:
        scaling = f", {r['rope_scaling']}" if r["rope_scaling"] else ""
        place = "CPU" if r["gpu"].startswith("none") else r["gpu"]
        groups.setdefault((f"{r['model']} {r['dtype']}{scaling}, {place}", f"{r['length']:,}"), []).append(r)
    rows = [
        [*group, f"{sum(r['trials'] for r in of_group)}",
         *(f"{100 * sum(r[key] for r in of_group) / len(of_group):.0f} %"
           for key in ("found_unpatched", "found", "same_tokens"))]
        for group, of_group in groups.items()
    ]  # fmt: skip
    header = ["model", "prompt, tokens", "keys", "found, transformers", "found, on pages", "same tokens"]
    return markdown(header, rows) + measured_on(records)


def dataset_table() -> str:
    case = ("model", "dtype", "source", "rope_scaling", "requests", "max_active", "prompt_tokens", "engine", "gpu")
    records = newest("dataset.jsonl", case)
    if not records:
        return NO_GPU_RUN
    rows = [
        [
            f"{r['model']} {r['dtype']}, {r['source']}: {r['requests']} requests, {r['max_active']} at a time, "
            f"{r['prompt_tokens']:,} + {r['new_tokens']:,} tokens",
            "transformers" if r["engine"] == "unpatched" else f"on pages ({r['route']})",
            f"{r['tokens_per_s']:,.1f}",
            *(f"{r[f'latency_s_p{p}']:.2f} s" for p in (50, 95, 99)),
            f"{r['first_token_s_p50']:.2f} s",
            f"{r['step_ms_p50']:.1f} ms",
            f"{r['peak_bytes'] / 2**20:,.0f} MiB",
            f"{r['kv_bytes'] / 2**20:,.0f} MiB",
            f"{100 * r['same_tokens']:.0f} %",
        ]
        for r in records
    ]
    header = ["workload", "engine", "tokens/s", "latency p50", "p95", "p99", "first token p50", "step p50",
              "peak memory", "KV cache", "same answers"]  # fmt: skip
    return markdown(header, rows) + measured_on(records)


def demo_output() -> str:
    return f"```\n{(RESULTS / 'demo.txt').read_text()}```\n"


TABLES: dict[str, Callable[[], str]] = {
    "generate-gpu": lambda: generate_table(True),
    "generate-cpu": lambda: generate_table(False),
    "generate-modes": modes_table,
    "devices": devices_table,
    "finetune": finetune_table,
    "quantised": quantised_table,
    "ablation": ablation_table,
    "linear": linear_table,
    "kernels": kernels_table,
    "demo": demo_output,
    "perplexity": perplexity_table,
    "perplexity-speed": perplexity_speed_table,
    "passkey": passkey_table,
    "dataset": dataset_table,
}


def main() -> int:
    return published.main(__doc__, TABLES, [ROOT / "README.md", ROOT / "docs" / "quality.md"])


if __name__ == "__main__":
    raise SystemExit(main())
