"""Tables of docs/policy.md: request traces and equal rows, ours beside FlashInfer's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pages
from pkv_hf.bench.results.published import Record, of_every_gpu, of_one_run, table

PAGE = pages.ROOT / "docs" / "policy.md"

PAPER_CUDA_WALL = {
    "bucketed:1": (1.471, 1.403), "bimodal:4": (1.0, 1.0), "bimodal:8": (1.106, 1.080),
    "uniform:8": (1.076, 1.044), "zipf:8": (1.105, 1.068),
}  # fmt: skip
"""Throughput of PersistentKV's policy over FlashInfer's planned wrapper, by CUDA and by wall time: the main table of
arXiv 2606.26666."""

OURS = ("split", "workqueue")
FLASHINFER = ("flashinfer", "flashinfer_tc", "flashinfer_xqa")
TRACE_CASE = ("trace", "max_active", "group", "head_dim", "page_size", "holes", "dtype", "layers", "graph")


class Trace(NamedTuple):
    """Records of a trace by engine, all of one run; of each engine, one a seed (one of a file's trace)."""

    engines: dict[str, list[Record]]

    @property
    def first(self) -> Record:
        return self.engines["policy"][0]

    @property
    def name(self) -> str:
        return f"{self.first['trace']}:{self.first['max_active']}"

    def mean(self, engine: str, key: str) -> float:
        records = self.engines[engine]
        return sum(r[key] for r in records) / len(records)

    def best_flashinfer(self, key: str) -> float:
        return max(self.mean(engine, key) for engine in FLASHINFER if engine in self.engines)

    def over_best(self, key: str) -> str:
        return f"{self.mean('policy', key) / self.best_flashinfer(key):.2f}"

    def over_planned(self, key: str) -> str:
        return f"{self.mean('policy', key) / self.mean('flashinfer', key):.2f}"


def traces(records: list[Record], layers: int, *, of_file: bool = False, group: int = 4) -> list[Trace]:
    """What was played over so many layers: the paper's families, which have seeds, or requests of a file."""
    fitting = [
        r for r in records if (r["layers"], r["group"], r["holes"], not r["seed"]) == (layers, group, 0, of_file)
    ]
    found = []
    for run in of_one_run(fitting, TRACE_CASE, (*OURS, *FLASHINFER, "policy"), parts=("seed",)):
        engines: dict[str, list[Record]] = {}
        for r in run:
            engines.setdefault(r["engine"], []).append(r)
        found.append(Trace(engines))
    return found


def trace_table(columns: dict[str, Callable[[Trace], str]], found: list[Trace]) -> str:
    return table(columns, found, [r for trace in found for r in trace.engines["policy"]])


def speed(engine: str, trace: Trace) -> str:
    return f"{trace.mean(engine, 'tokens_per_s_wall'):,.0f}"


def paper(column: int, trace: Trace) -> str:
    figures = PAPER_CUDA_WALL.get(trace.name)
    return "-" if figures is None else f"{figures[column]:.2f}"


SPEEDS: dict[str, Callable[[Trace], str]] = {
    "trace:rows": lambda trace: trace.name,
    "kernels": lambda trace: "replayed" if trace.first["graph"] else "launched",
    **{engine: partial(speed, engine) for engine in (*OURS, *FLASHINFER, "policy")},
}
MODEL: dict[str, Callable[[Trace], str]] = {
    **SPEEDS, "policy / best FlashInfer": lambda trace: trace.over_best("tokens_per_s_wall"),
}  # fmt: skip
TRACE_SPEED: dict[str, Callable[[Trace], str]] = {
    **SPEEDS,
    "wall, policy / `flashinfer`": lambda trace: trace.over_planned("tokens_per_s_wall"),
    "the paper's, wall": partial(paper, 1),
    "wall, policy / best FlashInfer": lambda trace: trace.over_best("tokens_per_s_wall"),
    "GPU time, policy / `flashinfer`": lambda trace: trace.over_planned("tokens_per_s_gpu"),
    "the paper's, GPU time": partial(paper, 0),
    "GPU time, policy / best FlashInfer": lambda trace: trace.over_best("tokens_per_s_gpu"),
}


def over_oracle(trace: Trace) -> str:
    return f"{trace.mean('policy', 'regret_gpu_mean'):.1%}, {trace.mean('policy', 'regret_gpu_p95'):.1%}"


REAL: dict[str, Callable[[Trace], str]] = {
    **MODEL,
    "GPU time over the oracle, mean and p95": lambda trace: over_oracle(trace) if trace.first["graph"] else "-",
}


def time_and_share(engine: str, trace: Trace) -> str:
    share = 100 * trace.mean(engine, "gb_s") / trace.mean(engine, "read_gb_s")
    return f"{trace.mean(engine, 'gpu_us_p50'):,.0f} us, {share:.0f} %"


def of_ours(key: str, trace: Trace) -> str:
    return " / ".join(f"{trace.mean(engine, key):.1f}" for engine in OURS)


COUNTERS: dict[str, Callable[[Trace], str]] = {
    "trace:rows": lambda trace: trace.name,
    **{engine: partial(time_and_share, engine) for engine in (*OURS, *FLASHINFER)},
    "policy over the oracle, mean and p95": over_oracle,
    "launches, split / workqueue": partial(of_ours, "launches"),
    "programs an SM": partial(of_ours, "programs_per_sm"),
    "merge MB": partial(of_ours, "merge_mb"),
    "KV MB": lambda trace: f"{trace.mean('split', 'kv_mb'):,.0f}",
}


def time_of(engine: str, trace: Trace) -> str:
    return f"{trace.mean(engine, 'gpu_us_p50'):,.0f} us"


def ours_ahead(trace: Trace) -> str:
    theirs, ours = (min(trace.mean(engine, "gpu_us_p50") for engine in engines) for engines in (FLASHINFER, OURS))
    return f"{theirs / ours:.2f}"


GROUPS: dict[str, Callable[[Trace], str]] = {
    "trace:rows": lambda trace: f"{trace.name}, G {trace.first['group']}",
    **{engine: partial(time_of, engine) for engine in (*OURS, *FLASHINFER)},
    "ours / best FlashInfer": ours_ahead,
}


def replayed(found: list[Trace]) -> list[Trace]:
    return [trace for trace in found if trace.first["graph"]]


def groups_table(records: list[Record]) -> str:
    """Groups of another size: GPU time of a layer."""
    return trace_table(GROUPS, replayed([trace for group in (1, 8) for trace in traces(records, 1, group=group)]))


ATTENTION_CASE = ("rows", "length", "query_heads", "group", "head_dim", "page_size", "holes", "order", "dtype",
                  "kv_dtype", "splits")  # fmt: skip
PLAIN = {"query_heads": 32, "group": 4, "head_dim": 128, "page_size": 16, "holes": 0.0, "order": "scattered",
         "dtype": "float16", "kv_dtype": "same", "splits": 0}  # fmt: skip

Attention = dict[str, Record]
"""Records of equal rows by engine, all of one run."""


def plain_but(records: list[Record], **wanted: Any) -> list[Record]:
    """Records of equal rows that are plain but for what is wanted: a value, one of several, None for any."""
    settings = {**PLAIN, **wanted}
    return [
        r
        for r in records
        if all(r[key] in value if isinstance(value, tuple) else value in (None, r[key])
               for key, value in settings.items())
    ]  # fmt: skip


def attention(records: list[Record], **wanted: Any) -> list[Attention]:
    """Cases that both of our routes took, beside what FlashInfer took of them."""
    runs = of_one_run(plain_but(records, **wanted), ATTENTION_CASE, (*OURS, "flashinfer_tc"), OURS)
    return [{r["engine"]: r for r in run} for run in runs]


def route_cell(engine: str, engines: Attention) -> str:
    r = engines.get(engine)
    return "-" if r is None else f"{r['gpu_us']:,.1f} us, {r['percent_of_read']:.0f} %"


def best_ahead(engines: Attention) -> str:
    ours, theirs = ([engines[e]["gpu_us"] for e in names if e in engines] for names in (OURS, FLASHINFER))
    return f"{min(theirs) / min(ours):.2f}" if theirs else "-"


def attention_table(name: str, wanted: dict[str, Any], records: list[Record]) -> str:
    """A line for each case, in order of the fields that `name`, a format, names it by."""
    swept = [key for key in ATTENTION_CASE if "{" + key in name]
    cases = sorted(attention(records, **wanted), key=lambda engines: [engines["split"][key] for key in swept])
    columns: dict[str, Callable[[Attention], str]] = {
        "": lambda engines: name.format(**engines["split"]),
        **{engine: partial(route_cell, engine) for engine in (*OURS, *FLASHINFER)},
        "ours / best FlashInfer": best_ahead,
    }
    return table(columns, cases, [r for engines in cases for r in engines.values()])


def splits_table(records: list[Record]) -> str:
    """Parts that `split` cuts a row into, GPU time in microseconds; 0 is its own choice."""
    swept = [r for r in plain_but(records, splits=None) if r["engine"] == "split"]
    case = [key for key in ATTENTION_CASE if key != "splits"]
    rows = [{r["splits"]: r for r in run} for run in of_one_run(swept, case, (0, 1), engine="splits")]
    counts = sorted({splits for row in rows for splits in row if splits})

    def time(splits: int, row: dict[int, Record]) -> str:
        return f"{row[splits]['gpu_us']:,.1f}" if splits in row else "-"

    columns: dict[str, Callable[[dict[int, Record]], str]] = {
        "": lambda row: LENGTHS.format(**row[0]),
        **{f"{splits} part{'s' * (splits > 1)}": partial(time, splits) for splits in counts},
        "its own choice": partial(time, 0),
    }
    return table(columns, rows, [r for row in rows for r in row.values()])


LENGTHS = "{rows} x {length:,}"
EQUAL_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention-lengths": (LENGTHS, {}),
    "attention-groups": (
        "G {group}, {query_heads} heads",
        {"rows": 8, "length": 16_384, "group": None, "query_heads": (32, 42)},
    ),
    "attention-pages": (
        LENGTHS + ", pages of {page_size}, holes {holes:.0%}",
        {"rows": (1, 8), "length": 16_384, "page_size": None, "holes": None},
    ),
    "attention-order": (LENGTHS + ", {order}", {"rows": (1, 8), "length": (8192, 8240), "order": None}),
    "attention-heads": (
        LENGTHS + ", heads of {head_dim}, {dtype}",
        {"rows": (1, 8), "length": 16_384, "head_dim": None, "dtype": None},
    ),
}
"""Of each table the name of a line, and what differs from plain rows."""

OF_TRACES: dict[str, Callable[[list[Record]], str]] = {
    "trace-speed": lambda records: trace_table(TRACE_SPEED, traces(records, 1)),
    "trace-counters": lambda records: trace_table(COUNTERS, replayed(traces(records, 1))),
    "trace-model": lambda records: trace_table(MODEL, traces(records, 32)),
    "trace-real": lambda records: trace_table(REAL, traces(records, 1, of_file=True)),
    "trace-groups": groups_table,
}
OF_EQUAL_ROWS: dict[str, Callable[[list[Record]], str]] = {
    **{name: partial(attention_table, *line) for name, line in EQUAL_ROWS.items()},
    "attention-splits": splits_table,
}


def made_of(name: str, table_of: Callable[[list[Record]], str]) -> Callable[[], str]:
    return lambda: of_every_gpu(pages.read(name, order="scattered"), table_of)


TABLES: dict[str, Callable[[], str]] = {
    **{name: made_of("traces.jsonl", table_of) for name, table_of in OF_TRACES.items()},
    **{name: made_of("attention.jsonl", table_of) for name, table_of in OF_EQUAL_ROWS.items()},
}
