"""Charts of what the quality scripts measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def pyplot() -> Any:
    """matplotlib's, that draws into files. The command has asked for the package before."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def perplexity_chart(records: Sequence[Record], title: str, path: Path) -> None:
    """Writes a PNG: perplexity over the position in the window, one forward and patched, a pair of lines a context."""
    figure, axes = pyplot().subplots(figsize=(8, 4.5), layout="constrained")
    for record in records:
        pages = f", {record['kv_dtype']} pages" if record["kv_dtype"] else ""
        name = f"{record['mode']}{pages}, {record['context']:,}"
        positions = record["positions"]
        (line,) = axes.plot(
            positions, record["perplexity_by_position_forward"], "o-", alpha=0.5, label=f"{name}: one forward"
        )
        axes.plot(positions, record["perplexity_by_position"], "x--", color=line.get_color(), label=f"{name}: on pages")
    axes.set(xlabel="position in the window, tokens", ylabel="perplexity", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    write(figure, path)


def passkey_chart(records: Sequence[Record], title: str, path: Path) -> None:
    """Writes a PNG: the share of keys found at every length and depth, unpatched and patched, and of equal answers."""
    lengths = sorted({record["length"] for record in records})
    depths = sorted({record["depth"] for record in records})
    cells = {(record["length"], record["depth"]): record for record in records}
    shown = {"found_unpatched": "found, transformers", "found": "found, patched", "same_tokens": "same tokens"}
    figure, all_axes = pyplot().subplots(1, 3, figsize=(12, 4), layout="constrained", sharey=True)
    for axes, (key, words) in zip(all_axes, shown.items()):
        shares = [[cells[length, depth][key] for length in lengths] for depth in depths]
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set(title=words, xlabel="prompt, tokens")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=30)
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        for row, of_depth in enumerate(shares):
            for column, share in enumerate(of_depth):
                axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=8)
    all_axes[0].set_ylabel("depth of the key")
    figure.colorbar(image, ax=all_axes)
    figure.suptitle(title)
    write(figure, path)


def write(figure: Any, path: Path) -> None:
    """Writes a figure as a PNG, and closes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot().close(figure)
