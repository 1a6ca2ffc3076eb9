"""Texts for measurements: a dataset of the hub or of local files, a text file, or a text that every Python has."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pkv_hf.arguments import needs
from pkv_hf.bench.inputs.smollm2 import pydoc_topics
from pkv_hf.errors import UsageError, first_line

BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
SLACK = 64
"""Tokens beyond what is asked for: the last ones of a text that goes on depend on what follows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset", default="pydoc", metavar="NAME[:CONFIG]",
        help="of the hub, a folder, or a csv, json, parquet or txt file; default: pydoc, Python's help topics",
    )  # fmt: skip
    parser.add_argument("--split", default="test", help="of the dataset; local files are one split, train")
    parser.add_argument("--column", default="text", help="the dataset's column of texts")
    parser.add_argument("--text-file", type=Path, metavar="FILE", help="one text, instead of a dataset")


def source_name(arguments: argparse.Namespace) -> str:
    """The source of the texts, for records."""
    if arguments.text_file is not None:
        return arguments.text_file.name
    if arguments.dataset == "pydoc":
        return "pydoc"
    return f"{arguments.dataset}/{arguments.split}/{arguments.column}"


def load_texts(arguments: argparse.Namespace) -> Iterator[str]:
    """The texts that the arguments name, one after another, at least one. Raises UsageError for what is not there."""
    if arguments.text_file is not None:
        return iter([read_text(arguments.text_file)])
    if arguments.dataset == "pydoc":
        return iter(pydoc_topics())
    return column_of(load_split(arguments.dataset, arguments.split), arguments.column, arguments.split)


def read_text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text-file {path} cannot be read as text: {error}") from error


def load_split(name: str, split: str) -> Any:
    """A split of a `datasets` dataset: NAME[:CONFIG] of the hub, a folder or a file of data."""
    needs("datasets")
    import datasets

    path, config, files = name, None, None
    if Path(name).is_file():
        if Path(name).suffix not in BUILDERS:
            raise UsageError(f"--dataset {name}: pass a file that ends in {', '.join(BUILDERS)}, or --text-file {name}")
        path, files = BUILDERS[Path(name).suffix], name
    elif not Path(name).exists():
        path, _, part = name.partition(":")
        config = part or None
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(path, config, data_files=files)
        if split.partition("[")[0] not in found:
            raise UsageError(f"--split {split} is not in {name}: it has {', '.join(found)}")
        return datasets.load_dataset(path, config, data_files=files, split=split) if "[" in split else found[split]
    except UsageError:
        raise
    except Exception as error:  # datasets raises errors of pyarrow, pandas, the hub and its own
        raise UsageError(f"--dataset {name} cannot be loaded: {first_line(error.__cause__ or error)}") from error


def column_of(rows: Any, column: str, split: str) -> Iterator[str]:
    """The texts of a column of a split, empty ones too (in perplexity they are blank lines); nulls are passed over."""
    if column not in rows.column_names:
        raise UsageError(f"--column {column} is not in the dataset: it has {', '.join(rows.column_names)}")
    texts = (row[column] for row in rows.select_columns([column]) if row[column] is not None)
    head = []
    for text in texts:
        if not isinstance(text, str):
            others = ", ".join(rows.column_names)
            raise UsageError(f"--column {column} holds {type(text).__name__}, not text: pass another of {others}")
        head.append(text)
        if text.strip():
            return itertools.chain(head, texts)
    raise UsageError(f"--split {split} holds no text in column {column}: pass another split or column")


def begin_ids(tokenizer: Any) -> list[int]:
    """The token that the tokenizer begins a text with, if it does."""
    first = tokenizer("a").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


def token_ids(tokenizer: Any, texts: Iterable[str], needed: int | None = None) -> torch.Tensor:
    """The first `needed` token ids (None: all) of the texts joined by blank lines, int64 `[tokens]`.

    No special token is added. Of many texts only as many are read as are needed; fewer tokens come back where the texts
    end before.
    """
    taken: list[str] = []
    characters, goal = 0, 0 if needed is None else 4 * needed
    for text in texts:
        taken.append(text)
        characters += len(text)
        if needed is not None and characters >= goal:
            ids = _encode(tokenizer, taken)
            if len(ids) >= needed + SLACK:
                return ids[:needed]
            goal = 2 * characters
    return _encode(tokenizer, taken)[:needed]


def _encode(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    return torch.tensor(tokenizer("\n\n".join(texts), add_special_tokens=False).input_ids, dtype=torch.long)
