"""Writes the tables of README.md and docs/ from benchmarks/results, between `<!-- generated: NAME -->` and
`<!-- end -->` marks.

A row compares what one run measured on one GPU; the newest run that has it all counts. `--check` changes nothing and
fails where a page is stale.
"""

from __future__ import annotations

from collections.abc import Callable

from pages import layers, models, performance, policy, prefix, quality, readme

from pkv_hf.bench.results import published

PAGES = [readme.PAGE, models.PAGE, performance.PAGE, quality.PAGE, policy.PAGE]
TABLES: dict[str, Callable[[], str]] = {
    **readme.TABLES, **models.TABLES, **performance.TABLES, **layers.TABLES, **prefix.TABLES,
    **quality.TABLES, **policy.TABLES,
}  # fmt: skip


def main() -> int:
    return published.main(__doc__, TABLES, PAGES)


if __name__ == "__main__":
    raise SystemExit(main())
