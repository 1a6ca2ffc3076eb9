"""A few lines of text as local datasets."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas

TEXTS = [f"Line {i} of a text that goes on for a while, then ends. " * 2 for i in range(8)]


def write_dataset(path: Path, lines: list[str]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["number", "text"], *enumerate(lines)])
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"number": i, "text": text}) + "\n" for i, text in enumerate(lines)))
    elif path.suffix == ".parquet":
        pandas.DataFrame({"number": range(len(lines)), "text": lines}).to_parquet(path)
    else:
        path.write_text("\n".join(lines))
    return path
