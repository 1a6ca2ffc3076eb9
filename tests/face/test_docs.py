"""The front door: a README of one page, pages that name all that is public, a version for each change that landed."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest
from packaging.version import Version

import pkv_hf
from pkv_hf.cli import parser
from places import ROOT

DOCS = ROOT / "docs"


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_api_page_has_every_public_name():
    named = re.findall(r"^\.\. auto\w+:: pkv_hf\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(set(pkv_hf.__all__) - {"__version__"})


def test_every_subcommand_is_on_its_page():
    (commands,) = [action.choices for action in parser()._actions if isinstance(action.choices, dict)]
    assert set(re.findall(r"^\| `pkv-hf (\w+)", (DOCS / "environment.md").read_text(), re.MULTILINE)) == set(commands)


def test_every_variable_that_is_read_is_on_its_page():
    sources = [
        path.read_text() for folder in ("pkv_hf", "kernels", "patches") for path in (ROOT / folder).rglob("*.py")
    ]
    read = set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", "".join(sources))) - {"XDG_CACHE_HOME"}
    page = (DOCS / "environment.md").read_text()
    assert read
    assert {name for name in read if f"`{name}" not in page} == set()


def test_every_page_is_in_the_index():
    (tree,) = re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    listed = {(DOCS / f"{line}.md").resolve() for line in tree.splitlines() if line and not line.startswith(":")}
    pages = {*ROOT.glob("*.md"), *DOCS.glob("*.md"), *(ROOT / "examples").glob("*.md")} - {DOCS / "index.md"}
    assert listed == pages


def test_the_version_is_that_of_the_newest_change():
    versions = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == pkv_hf.__version__
    assert versions == sorted(versions, key=Version, reverse=True)


REASONS = re.findall(r"^\| (?!the reason says)([^|]*?) \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("reason", REASONS)
def test_a_reason_on_the_page_of_symptoms_is_one_that_is_given(reason):
    """By the longest run of plain words in it; what varies is written as dots."""
    sources = "".join(path.read_text() for folder in ("pkv_hf", "patches") for path in (ROOT / folder).rglob("*.py"))
    for part in re.split(r"; ", reason):
        words = max(part.split("..."), key=len).strip()
        assert words in re.sub(r"\"\s*f?\"|\{[^}]*\}", "", sources), words


def test_every_reason_why_layers_are_not_fused_or_steps_not_run_ahead_is_on_the_page_of_symptoms():
    kinds = ["base", "plain", "bnb4", "bits4", "gptq4", "lora", "registry", "torchao4"]
    kinds = [*(f"projections/{name}" for name in kinds), "experts/described", "experts/served"]
    files = [*(ROOT / "patches" / f"{name}.py" for name in ("reading", "check", "probe", "adapters", *kinds)),
             *(ROOT / "pkv_hf" / "runtime" / "ahead").glob("*.py")]  # fmt: skip
    given = {
        max(re.split(r"\{[^}]*\}", reason), key=len).strip(" :")
        for path in files
        for reason in re.findall(
            r"(?:return|Foreign\(|else|not_ahead =|None,) ?f?\"([^\"]+ [^\"]+)\"", path.read_text()
        )
    }
    assert len(given) > 15
    page = (DOCS / "troubleshooting.md").read_text()
    assert {reason for reason in given if reason not in page} == {"modules of its layers are not understood"}


def test_what_is_installed_says_who_made_it():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    metadata = setup["metadata"]
    assert metadata["author"] == "The pkv_hf developers"
    assert "Typing :: Typed" in metadata["classifiers"]
    assert "py.typed" in setup["options.package_data"]["pkv_hf"]
    assert (Path(pkv_hf.__file__).parent / "py.typed").exists()
