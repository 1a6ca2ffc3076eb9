"""The law of imports: a room knows itself, the rooms below it and the ground. And how large a folder may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from places import ROOT

ROOMS = ("kernels", "cache", "routes", "policy", "runtime", "patches", "memory", "face", "bench", "cli")
"""From the bottom: the folders of the package, and the modules that users call."""

GROUND = ("compat", "configurations", "origins", "replaced", "arguments", "errors", "tables", "version")
"""Modules that all rooms but `kernels` may import, and that import no room."""

FACE = ("__init__", "patching", "prefixes", "reporting")
PACKAGES = {"pkv_hf": "pkv_hf", "kernels": "pkv_hf.kernels", "patches": "pkv_hf.patches"}
"""Folders of the repository, and what they are imported as."""

MOST_FILES = 13


def room_of(name: str) -> str:
    """The room of a module of pkv_hf by its full name; for what is in none, the folder or name in its place."""
    place = name.partition(".")[2].partition(".")[0]
    if place in FACE:
        return "face"
    return "ground" if place in GROUND else {"__main__": "cli"}.get(place, place)


def modules() -> Iterator[tuple[Path, str]]:
    """Every module's file, and its room."""
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, room_of(".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts]))


MODULES = list(modules())


class Imports(ast.NodeVisitor):
    """Lines and full names of what a module imports, in functions too; what it imports for types alone is left out."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []

    def visit_If(self, node: ast.If) -> None:
        for_types = ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.orelse if for_types else [*node.body, *node.orelse]:
            self.visit(statement)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(node.lineno, alias.name) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = "." * node.level + (node.module or "")
        self.found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]


def imported(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, full name and room of what a module imports of ours. What is in no folder and no module is the face's."""
    imports = Imports()
    imports.visit(ast.parse(source))
    for line, name in imports.found:
        if name.startswith("."):
            yield line, name, "relative"
        elif name.split(".")[0] == "pkv_hf":
            room = room_of(name)
            yield line, name, room if room in ("ground", *ROOMS) else "face"


def allowed(room: str, other: str) -> bool:
    if other == "ground":
        return room != "kernels"
    return room == other or (room != "ground" and other in ROOMS[: ROOMS.index(room)])


@pytest.mark.parametrize(("path", "room"), MODULES, ids=[str(path.relative_to(ROOT)) for path, _ in MODULES])
def test_a_room_imports_itself_and_what_is_below(path, room):
    assert room in ("ground", *ROOMS)
    assert [breach for breach in imported(path.read_text()) if not allowed(room, breach[-1])] == []


def test_breaches_of_the_law_are_seen():
    source = (
        "import pkv_hf, pkv_hf.runtime.step, torch\n"
        "from pkv_hf import compat, plan, bench\n"
        "def later():\n"
        "    from pkv_hf.memory.planner import plan\n"
        "    from . import table\n"
        "if TYPE_CHECKING:\n"
        "    from pkv_hf.cli import main\n"
        "elif True:\n"
        "    from pkv_hf.patches.description import Layer\n"
    )
    rooms = [room for *_, room in imported(source)]
    assert rooms == ["face", "runtime", "ground", "face", "bench", "memory", "relative", "patches"]
    assert [room for room in rooms if not allowed("memory", room)] == ["face", "face", "bench", "relative"]
    assert [room for room in rooms if allowed("ground", room)] == ["ground"]
    assert not any(allowed("kernels", room) for room in rooms)


def test_no_folder_holds_more_files_than_one_can_read():
    top = [ROOT / folder for folder in (*PACKAGES, "tests")]
    folders = [*top, *(path for folder in top for path in folder.rglob("*") if path.is_dir())]
    counts = {str(folder.relative_to(ROOT)): len([*folder.glob("[!_]*.py")]) for folder in folders}
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}
