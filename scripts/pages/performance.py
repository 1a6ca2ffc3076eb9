"""Tables of docs/performance.md: what a decode step, its parts and its kernels take."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pages
from pkv_hf.bench.inputs.weights import WORDS
from pkv_hf.bench.results.published import Record, is_cpu, of_every_gpu, of_one_run, table

PAGE = pages.ROOT / "docs" / "performance.md"

PEERS = ("dynamic", "static-compile")
"""transformers' own caches that ours is compared with."""

GREEDY_CASE = ("model", "dtype", "weights", "adapter", "lengths")
MODE = {"mode": "greedy", "num_beams": 1, "assistant": None, "draft_tokens": 0, "tokens_per_step": 1.0}
"""What records of before there were modes count as."""

ABLATED = {"model": "llama-3.1-8b", "dtype": "bfloat16", "lengths": [8192], "weights": None, "adapter": None}
ABLATION = {
    "dynamic-cold": "transformers, first call",
    "dynamic": "transformers, second call",
    "patched-pages-only": "pages and attention kernels alone",
    "patched-no-graphs": "all but CUDA graphs",
    "patched-no-fuse": "all but fused layers",
    "patched-no-run-ahead": "all but the run-ahead loop",
    "patched": "all",
}

QUANTISED = {"rows": 8, "length": 16_384, "group": 4, "head_dim": 128, "page_size": 16, "holes": 0.0, "splits": 0,
             "order": "scattered", "dtype": "bfloat16"}  # fmt: skip


class Row(NamedTuple):
    """An engine's record, and those of all engines that it is compared with."""

    record: Record
    run: dict[str, Record]


def generate_records(*modes: str) -> list[Record]:
    """Of what ran: a peer that raised is recorded by its error."""
    return [r for r in pages.read("generate.jsonl", **MODE) if r["mode"] in modes and "error" not in r]


def compared(records: list[Record]) -> list[dict[str, Record]]:
    """Greedy decoding by engine, a run a case; one that has both of our peers is preferred to a newer that has not."""
    runs = of_one_run(records, GREEDY_CASE, (*PEERS, "patched"), (PEERS[0], "patched"))
    by_engine = [{r["engine"]: r for r in run} for run in runs]
    return sorted(by_engine, key=lambda run: size(run["patched"]))


def size(r: Record) -> tuple:
    return r["model"], r["dtype"], words(r), len(r["lengths"]), sum(r["lengths"])


def words(r: Record) -> str:
    """How a record's weights are stored, and adapters around them; empty for those of its dtype alone."""
    weights, adapter = r.get("weights"), r.get("adapter")
    stored = f", {WORDS[weights]}" if weights else ""
    return stored + (f", LoRA of rank {adapter.removeprefix('lora-r')}" if adapter else "")


def case(r: Record) -> str:
    lengths = r["lengths"]
    rows = f"{len(lengths)} x {lengths[0]:,}" if len(set(lengths)) == 1 else f"{len(lengths)} rows, {sum(lengths):,}"
    return f"{r['model']} {r['dtype']}{words(r)}, {rows}"


def engine(r: Record) -> str:
    return r["engine"] + (f" ({r['route']})" if r["route"] else "")


def step_ms(r: Record, suffix: str = "") -> str:
    p20, p50, p80 = (r[f"step_ms_{quantile}{suffix}"] for quantile in ("p20", "p50", "p80"))
    return f"{p50:.2f} ({p20:.2f} to {p80:.2f})"


def bandwidth(r: Record) -> str:
    """The bytes that a step has to read over its time."""
    return f"{r['read_gb_s'] * r['floor_ms'] / r['step_ms_p50']:,.0f} ({r['percent_of_floor']:.0f} %)"


def ahead_of(peer: str, row: Row) -> str:
    if peer not in row.run:
        return "-"
    return f"{row.run[peer]['step_ms_p50'] / row.record['step_ms_p50']:.2f}x"


def logit_error(r: Record) -> str:
    return "-" if r.get("logit_error") is None else f"{r['logit_error']:.1e}"


GREEDY: dict[str, Callable[[Row], str]] = {
    "case": lambda row: case(row.record),
    "engine": lambda row: engine(row.record),
    "step ms, p50 (p20 to p80)": lambda row: step_ms(row.record),
    "GB/s (of the floor)": lambda row: bandwidth(row.record),
    "over `dynamic`": partial(ahead_of, "dynamic"),
    "over `static-compile`": partial(ahead_of, "static-compile"),
    "first token, s": lambda row: f"{row.record['first_token_ms'] / 1e3:.2f}",
    "peak, GiB": lambda row: f"{row.record['peak_gib']:.1f}",
    "KV, MiB": lambda row: f"{row.record['kv_bytes'] / 2**20:,.0f}",
    "logit error": lambda row: logit_error(row.record),
    "same tokens": lambda row: "yes" if row.record["tokens_match"] else "no",
}


def shown(run: dict[str, Record]) -> tuple[str, ...]:
    """The engines of a case. Where weights are quantised or have adapters, other kernels in our graphs are one."""
    return (*PEERS, *(["patched-no-fuse"] if words(run["patched"]) else []), "patched")


def generate_table(records: list[Record]) -> str:
    rows = [Row(run[name], run) for run in compared(records) for name in shown(run) if name in run]
    return table(GREEDY, rows, [row.record for row in rows])


def ablation_table(records: list[Record]) -> str:
    ablated = [r for r in records if all(r.get(key) == value for key, value in ABLATED.items())]
    rows = [r for run in of_one_run(ablated, ABLATED, tuple(ABLATION)) for r in run if r["engine"] in ABLATION]
    columns: dict[str, Callable[[Record], str]] = {
        "8B shape, bf16, 1 x 8,192": lambda r: ABLATION[r["engine"]],
        "step ms, p50": lambda r: f"{r['step_ms_p50']:.2f}",
        "of the memory floor": lambda r: f"{r['percent_of_floor']:.0f} %",
        "first call, s": lambda r: f"{r['setup_s']:.1f}",
    }
    return table(columns, sorted(rows, key=lambda r: list(ABLATION).index(r["engine"])), rows)


def mode_words(r: Record) -> str:
    if r["mode"] == "assisted":
        return f"{case(r)}, {r['draft_tokens']} tokens a round from {r['assistant']}"
    return f"{case(r)}, {r['num_beams']} beams"


def modes_table(records: list[Record]) -> str:
    alike = (*GREEDY_CASE, "mode", "num_beams", "assistant", "draft_tokens")
    runs = [{r["engine"]: r for r in run} for run in of_one_run(records, alike, ("dynamic", "patched"))]
    columns: dict[str, Callable[[Row], str]] = {
        "case": lambda row: mode_words(row.record),
        "engine": GREEDY["engine"],
        "step or round ms, p50 (p20 to p80)": lambda row: step_ms(row.record),
        "over `dynamic`": partial(ahead_of, "dynamic"),
        "tokens a step": lambda row: f"{row.record['tokens_per_step']:.2f}",
        "of the floor": lambda row: f"{row.record['percent_of_floor']:.0f} %",
        **{header: GREEDY[header] for header in ("first token, s", "peak, GiB", "KV, MiB")},
    }
    rows = [Row(run[name], run) for run in runs for name in ("dynamic", "patched")]
    return table(columns, rows, [row.record for row in rows])


def devices_table(records: list[Record]) -> str:
    runs = of_one_run(records, ("model", "dtype", "lengths"), ("dynamic", "patched"), parts=("way", "devices"))
    rows = [r for run in runs for r in run]
    columns: dict[str, Callable[[Record], str]] = {
        "case": case,
        "where (devices)": lambda r: f"{r['way']} ({r['devices']})",
        "engine": engine,
        "step ms, p50 (p20 to p80)": step_ms,
        "first token, s": lambda r: f"{r['first_token_ms'] / 1e3:.2f}",
        "peak of the first, GiB": lambda r: f"{r['peak_gib']:.1f}",
        "tokens of one device": lambda r: "yes" if r["tokens_match"] else "no",
    }
    return table(columns, rows, rows)


def finetune_records() -> list[Record]:
    case = ("model", "dtype", "weights", "batch", "block", "rank", "prompts", "gpu")
    return pages.newest("finetune.jsonl", case)


def training(r: Record) -> str:
    return f"{r['model']} {r['dtype']}{words(r)}, rank {r['rank']}, {r['steps']} steps of {r['batch']} x {r['block']}"


FINETUNE: dict[str, Callable[[Record], str]] = {
    "training": training,
    "perplexity, held out": lambda r: f"{r['perplexity_before']:.2f} to {r['perplexity_after']:.2f}",
    "served": lambda r: f"{r['prompts']} x {r['new_tokens']}",
    "step ms, transformers, p50 (p20 to p80)": lambda r: step_ms(r, "_unpatched"),
    "on pages": step_ms,
    "speed": lambda r: f"{r['step_ms_p50_unpatched'] / r['step_ms_p50']:.2f}x",
    "same tokens": lambda r: "yes" if r["tokens_identical"] else "no",
}


def quantised_table(records: list[Record]) -> str:
    """Each route beside itself on pages that are not quantised."""
    fitting = [
        r
        for r in records
        if all(r[key] == value for key, value in QUANTISED.items())
        and r["gpu_us"] is not None
        and r["engine"] in ("split", "workqueue")
    ]
    whole = ("same", "int8", "fp8")
    alike = (*QUANTISED, "query_heads")
    runs = of_one_run(fitting, alike, whole, whole[:2], whole[::2], engine="kv_dtype", parts=("engine",))
    rows = [
        Row(r, {"same": same})
        for run in runs
        for r in run
        for same in run
        if same["kv_dtype"] == "same" and same["engine"] == r["engine"]
    ]
    columns: dict[str, Callable[[Row], str]] = {
        "route": lambda row: row.record["engine"],
        "pages": lambda row: "bfloat16" if row.record["kv_dtype"] == "same" else row.record["kv_dtype"],
        "us a layer": lambda row: f"{row.record['gpu_us']:.1f}",
        "GB/s (of the read bandwidth)": lambda row: (
            f"{row.record['gb_s']:,.0f} ({row.record['percent_of_read']:.0f} %)"
        ),
        "speed, target 1.6x": lambda row: f"{row.run['same']['gpu_us'] / row.record['gpu_us']:.2f}x",
    }
    return table(columns, rows, [row.record for row in rows])


def linear_table(records: list[Record]) -> str:
    pairs = of_one_run(records, ("shape", "case", "rows"), ("cublas", "pkv_hf"))
    lines: dict[str, dict[int, dict[str, Record]]] = {}
    for pair in pairs:
        first = pair[0]
        by_count = lines.setdefault(f"{first['shape']}, {first['case']}", {})
        by_count[first["rows"]] = {r["engine"]: r for r in pair}
    counts = sorted({count for by_count in lines.values() for count in by_count})

    def times(count: int, name: str) -> str:
        pair = lines[name].get(count)
        return "-" if pair is None else f"{pair['cublas']['us_p50']:.1f} / {pair['pkv_hf']['us_p50']:.1f}"

    columns: dict[str, Callable[[str], str]] = {
        "us, cuBLAS / ours": str,
        **{f"{count} row{'s' * (count > 1)}": partial(times, count) for count in counts},
    }
    return table(columns, list(lines), [r for pair in pairs for r in pair])


KERNELS: dict[str, Callable[[Record], str]] = {
    "route": lambda r: r["route"],
    "dtype": lambda r: r["dtype"],
    "random cases": lambda r: f"{r['cases']}",
    "longest row": lambda r: f"{r['longest']:,}",
    "error / SDPA's, p50": lambda r: f"{r['error_over_sdpa_p50']:.2f}",
    "worst": lambda r: f"{r['error_over_sdpa_max']:.2f}",
}


def on_gpus(*modes: str) -> list[Record]:
    return [r for r in generate_records(*modes) if not is_cpu(r)]


TABLES: dict[str, Callable[[], str]] = {
    "generate-gpu": lambda: of_every_gpu(on_gpus("greedy"), generate_table),
    "generate-cpu": lambda: of_every_gpu(filter(is_cpu, generate_records("greedy")), generate_table),
    "generate-modes": lambda: of_every_gpu(on_gpus("beams", "assisted"), modes_table),
    "ablation": lambda: of_every_gpu(on_gpus("greedy"), ablation_table),
    "devices": lambda: of_every_gpu(pages.read("devices.jsonl"), devices_table),
    "finetune": lambda: of_every_gpu(finetune_records(), lambda found: table(FINETUNE, found, found)),
    "quantised": lambda: of_every_gpu(pages.read("attention.jsonl", order="scattered"), quantised_table),
    "linear": lambda: of_every_gpu(pages.read("linear.jsonl"), linear_table),
    "kernels": lambda: of_every_gpu(
        pages.newest("kernels.jsonl", ("route", "dtype", "gpu")), lambda found: table(KERNELS, found, found)
    ),
    "demo": lambda: f"```\n{(pages.RESULTS / 'demo.txt').read_text()}```\n",
}
