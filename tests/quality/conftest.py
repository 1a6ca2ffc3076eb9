from __future__ import annotations

import datasets
import pytest

from tiny import byte_tokenizer, tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "bytes"
    tiny("llama", vocab_size=260).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def within_its_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "results" / "out.jsonl"
