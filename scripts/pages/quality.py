"""Tables of docs/quality.md: perplexity, keys in long texts, requests of a dataset or a trace."""

from __future__ import annotations

from collections.abc import Callable

import pages
from pkv_hf.bench.perplexity import BOUNDS
from pkv_hf.bench.results.published import Record, is_cpu, of_every_gpu, of_one_run, table

PAGE = pages.ROOT / "docs" / "quality.md"

PERPLEXITY_CASE = ("model", "dtype", "kv_dtype", "text", "rope_scaling", "mode", "context", "chunk", "decode_tokens",
                   "processes", "gpu")  # fmt: skip


def perplexity_records() -> list[Record]:
    return pages.newest("perplexity.jsonl", PERPLEXITY_CASE)


def windows(r: Record) -> str:
    scaling = f", {r['rope_scaling']}" if r["rope_scaling"] else ""
    kept = f", {r['kv_dtype']} pages" if r.get("kv_dtype") else ""
    return f"{r['model']} {r['dtype']}{kept}{scaling}, {r['text']}, {r['windows']} x {r['context']:,}"


def mode(r: Record) -> str:
    return f"{r['mode']}, {r['chunk'] or r['decode_tokens']}"


def target(r: Record) -> str:
    percent = BOUNDS[r.get("kv_dtype") or r["dtype"]]
    excess = abs(r["difference_percent"]) - percent
    if excess > 2 * r.get("difference_error_percent", 0.0):
        return f"{percent} %: missed"
    return f"{percent} %: {'met' if excess <= 0 else 'too few tokens to tell'}"


def difference(r: Record, suffix: str = "") -> str:
    error = r.get(f"difference_error_percent{suffix}")
    found = f"{r[f'difference_percent{suffix}']:+.6f}"
    return f"{found} %" if error is None else f"{found} ± {error:.6f} %"


PERPLEXITY: dict[str, Callable[[Record], str]] = {
    "windows": windows,
    "mode": mode,
    "perplexity, one forward": lambda r: f"{r['perplexity_forward']:.4f}",
    "on pages": lambda r: f"{r['perplexity']:.4f}",
    "difference": difference,
    "at most": target,
    "transformers' own": lambda r: difference(r, "_unpatched"),
    "largest log-prob difference": lambda r: f"{r['largest_log_prob_difference']:.1e}",
    "transformers' largest": lambda r: f"{r['largest_log_prob_difference_unpatched']:.1e}",
}

SPEED: dict[str, Callable[[Record], str]] = {
    "windows": windows,
    "mode": mode,
    "tokens/s, transformers": lambda r: f"{r['tokens_per_s_unpatched']:,.1f}",
    "on pages": lambda r: f"{r['tokens_per_s']:,.1f}",
    "speed": lambda r: f"{r['tokens_per_s'] / r['tokens_per_s_unpatched']:.2f}x",
    "peak memory, transformers": lambda r: f"{r['peak_bytes_unpatched'] / 2**20:,.0f} MiB",
    "peak memory, on pages": lambda r: f"{r['peak_bytes'] / 2**20:,.0f} MiB",
}


def passkey_table(records: list[Record]) -> str:
    """A line for each length, over all depths."""
    groups: dict[tuple[str, int], list[Record]] = {}
    for r in records:
        scaling = f", {r['rope_scaling']}" if r["rope_scaling"] else ""
        groups.setdefault((f"{r['model']} {r['dtype']}{scaling}", r["length"]), []).append(r)

    def share(group: tuple[str, int], key: str) -> str:
        of_group = groups[group]
        return f"{100 * sum(r[key] for r in of_group) / len(of_group):.0f} %"

    columns: dict[str, Callable[[tuple[str, int]], str]] = {
        "model": lambda group: group[0],
        "prompt, tokens": lambda group: f"{group[1]:,}",
        "keys": lambda group: f"{sum(r['trials'] for r in groups[group])}",
        "found, transformers": lambda group: share(group, "found_unpatched"),
        "found, on pages": lambda group: share(group, "found"),
        "same tokens": lambda group: share(group, "same_tokens"),
    }
    return table(columns, list(groups), records)


DATASET_CASE = ("model", "dtype", "source", "rope_scaling", "requests", "max_active", "prompt_tokens")
DATASET: dict[str, Callable[[Record], str]] = {
    "workload": lambda r: (
        f"{r['model']} {r['dtype']}, {r['source']}: {r['requests']} requests, {r['max_active']} at a time, "
        f"{r['prompt_tokens']:,} + {r['new_tokens']:,} tokens"
    ),
    "engine": lambda r: "transformers" if r["engine"] == "unpatched" else f"on pages ({r['route']})",
    "tokens/s": lambda r: f"{r['tokens_per_s']:,.1f}",
    "latency p50": lambda r: f"{r['latency_s_p50']:.2f} s",
    "p95": lambda r: f"{r['latency_s_p95']:.2f} s",
    "p99": lambda r: f"{r['latency_s_p99']:.2f} s",
    "first token p50": lambda r: f"{r['first_token_s_p50']:.2f} s",
    "step p50": lambda r: f"{r['step_ms_p50']:.1f} ms",
    "peak memory": lambda r: f"{r['peak_bytes'] / 2**20:,.0f} MiB",
    "KV cache": lambda r: f"{r['kv_bytes'] / 2**20:,.0f} MiB",
    "same answers": lambda r: f"{100 * r['same_tokens']:.0f} %",
}


def dataset_table(records: list[Record]) -> str:
    rows = [r for run in of_one_run(records, DATASET_CASE, ("unpatched", "patched")) for r in run]
    return table(DATASET, rows, rows)


TABLES: dict[str, Callable[[], str]] = {
    "perplexity": lambda: of_every_gpu(perplexity_records(), lambda found: table(PERPLEXITY, found, found)),
    "perplexity-speed": lambda: of_every_gpu(
        (r for r in perplexity_records() if not is_cpu(r)), lambda found: table(SPEED, found, found)
    ),
    "passkey": lambda: of_every_gpu(
        pages.newest("passkey.jsonl", ("model", "dtype", "rope_scaling", "length", "depth", "gpu")), passkey_table
    ),
    "dataset": lambda: of_every_gpu(pages.read("dataset.jsonl"), dataset_table),
}
