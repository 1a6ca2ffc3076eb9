"""Charts of what the scripts measured: one style, and those that a measurement draws itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pkv_hf.bench.perplexity import BOUNDS
from pkv_hf.bench.results.published import Record
from pkv_hf.errors import UsageError

NAMES = {
    "dynamic": "default cache",
    "static-compile": "static + compile",
    "patched": "patched",
    "policy": "policy",
    "split": "split",
    "workqueue": "workqueue",
    "flashinfer": "FlashInfer",
    "flashinfer_tc": "FlashInfer tensor cores",
    "flashinfer_xqa": "FlashInfer xqa",
}
COLOURS = {
    "dynamic": "#E69F00",
    "static-compile": "#CC79A7",
    "patched": "#0072B2",
    "policy": "#0072B2",
    "split": "#56B4E9",
    "workqueue": "#009E73",
    "flashinfer": "#D55E00",
    "flashinfer_tc": "#7F3C00",
    "flashinfer_xqa": "#777777",
}
"""Of Okabe and Ito's palette, which colour-blind readers tell apart; an engine has one colour in every chart."""

LIMIT = "#222222"
"""What is no engine: a floor, a bound."""

DPI = 108
WIDTH = 8.0
"""Inches: 864 pixels, about what a page shows."""


def pyplot() -> Any:
    """matplotlib's, that draws into files. The command has asked for the package before."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def panel(height: float, title: str, **settings: Any) -> tuple[Any, Any]:
    """A figure of one panel."""
    figure, axes = pyplot().subplots(figsize=(WIDTH, height), layout="constrained")
    entitle(figure, title)
    axes.set(**settings)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def entitle(figure: Any, title: str) -> None:
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")


def of_gpu(records: Collection[Record], gpu: str, source: Path) -> list[Record]:
    """The records of one GPU. Raises UsageError where there are none."""
    found = [record for record in records if record["gpu"] == gpu]
    if not found:
        others = ", ".join(sorted({record["gpu"] for record in records})) or "no GPU"
        raise UsageError(f"--gpu {gpu!r}: {source} has records of {others} alone")
    return found


def length_ticks(axes: Any, lengths: Sequence[int]) -> None:
    """A logarithmic axis of tokens with a tick at each length."""
    from matplotlib.ticker import NullFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def end_labels(axes: Any, labels: Mapping[str, tuple[float, float, str]], apart: float = 14) -> None:
    """Writes labels (x, y and colour of each) to the right of lines' ends, moved until they are `apart` points."""
    points = 72 / axes.figure.dpi
    lowest = -float("inf")
    for text, (x, y, colour) in sorted(labels.items(), key=lambda item: item[1][1]):
        own = axes.transData.transform((x, y))[1] * points
        at = max(own, lowest + apart)
        lowest = at
        axes.annotate(
            text, (x, y), xytext=(8, at - own), textcoords="offset points", color=colour, va="center", fontsize=10
        )


def perplexity_case(record: Record) -> str:
    pages = record.get("kv_dtype") or record["dtype"]
    scaling = f", {record['rope_scaling']}" if record.get("rope_scaling") else ""
    return f"{pages} pages, {record['mode']}, {record['windows']} x {record['context']:,}{scaling}"


def perplexity_chart(records: Sequence[Record], title: str, path: Path) -> None:
    """Writes a PNG: the difference that pages make to perplexity, in percent, with its standard error and its bound."""
    figure, axes = panel(1.4 + 0.42 * len(records), title, xlabel="perplexity on pages, percent above one forward's")
    for place, record in enumerate(reversed(records)):
        bound = BOUNDS[record.get("kv_dtype") or record["dtype"]]
        axes.plot([-bound, bound], [place, place], "|", color=LIMIT, markersize=16, markeredgewidth=1.6)
        found, error = record["difference_percent"], record.get("difference_error_percent")
        axes.errorbar(found, place, xerr=error, fmt="o", color=COLOURS["patched"], capsize=4)
        spread = "" if error is None else f" ± {error:.3f}"
        at = max(found + (error or 0), bound)
        axes.annotate(f"{found:+.3f}{spread} %", (at, place), xytext=(8, 0), textcoords="offset points", va="center",
                      fontsize=9)  # fmt: skip
    axes.axvline(0, color=LIMIT, linewidth=0.8)
    axes.set_yticks(range(len(records)), [perplexity_case(record) for record in reversed(records)])
    axes.set_ylim(-0.6, len(records) - 0.4)
    axes.margins(x=0.25)
    axes.plot([], [], "|", color=LIMIT, markersize=10, markeredgewidth=1.6, label="bound, either way")
    axes.errorbar([], [], xerr=[], fmt="o", color=COLOURS["patched"], capsize=4, label="difference ± standard error")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    write(figure, path)


def passkey_chart(records: Sequence[Record], title: str, path: Path) -> None:
    """Writes a PNG: the share of keys found at every length and depth, unpatched and patched, and of equal answers."""
    lengths = sorted({record["length"] for record in records})
    depths = sorted({record["depth"] for record in records})
    cells = {(record["length"], record["depth"]): record for record in records}
    shown = {"found_unpatched": "found, transformers", "found": "found, patched", "same_tokens": "same tokens"}
    figure, all_axes = pyplot().subplots(1, 3, figsize=(10, 4), layout="constrained", sharey=True)
    for axes, (key, words) in zip(all_axes, shown.items()):
        shares = [[cells[length, depth][key] for length in lengths] for depth in depths]
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        axes.set(title=words, xlabel="prompt, tokens")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=30)
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        for row, of_depth in enumerate(shares):
            for column, share in enumerate(of_depth):
                colour = "black" if share > 0.5 else "white"
                axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=8, color=colour)
    all_axes[0].set_ylabel("depth of the key")
    figure.colorbar(image, ax=all_axes)
    figure.suptitle(title)
    write(figure, path)


def write(figure: Any, path: Path) -> None:
    """Writes a figure as a PNG, the same bytes for the same records, and closes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    pyplot().close(figure)
