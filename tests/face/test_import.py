"""What importing pkv_hf loads, what its command loads, and that every public name is there all the same."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys

import pytest

import pkv_hf
from pkv_hf import compat
from pkv_hf.bench.inputs import models
from pkv_hf.cli import parser
from places import ROOT
from tiny import left_padded, tiny

COMMANDS = ("demo", "plan", "calibrate", "env")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_importing_loads_no_torch():
    done = python("import sys, pkv_hf; dir(pkv_hf); print([m for m in ('torch', 'transformers') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)])
def test_the_command_tells_what_it_takes_without_torch(arguments):
    blocked = "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
    done = python(blocked + "from pkv_hf.cli import main; raise SystemExit(main())", *arguments)
    assert done.returncode == 0, done.stderr
    assert "pkv-hf" in done.stdout
    assert not done.stderr
    if arguments[0] == "--help":
        assert all(name in done.stdout for name in COMMANDS)


def test_every_subcommand_has_its_module():
    (commands,) = [action.choices for action in parser()._actions if isinstance(action.choices, dict)]
    assert tuple(commands) == COMMANDS
    assert all((ROOT / "pkv_hf" / "cli" / f"{name}.py").exists() for name in commands)


def test_a_public_name_is_what_its_module_gives():
    tree = ast.parse((ROOT / "pkv_hf" / "__init__.py").read_text())
    (for_types,) = [
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    assert "__getattr__" not in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    named = {alias.name: node.module for node in for_types.body for alias in node.names}
    assert {name: place for place, names in pkv_hf._PLACES.items() for name in names} == named
    assert {*named, "__version__"} == set(pkv_hf.__all__) <= set(dir(pkv_hf))
    for name, place in named.items():
        assert getattr(pkv_hf, name) is getattr(sys.modules[place], name)
        assert place.rpartition(".")[2] not in named  # a module of that name would take its place
    with pytest.raises(AttributeError, match="no attribute 'patches_'"):
        pkv_hf.patches_  # noqa: B018


def test_a_name_stays_a_function_whatever_is_imported_before():
    done = python(
        "import importlib, pkgutil, pkv_hf\n"
        "for found in pkgutil.iter_modules(pkv_hf.__path__[:1], 'pkv_hf.'):\n"
        "    if not found.name.endswith('__main__'): importlib.import_module(found.name)\n"
        "print(all(callable(getattr(pkv_hf, name)) for name in pkv_hf.__all__ if name != '__version__'))"
    )
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize(("level", "said"), [(logging.WARNING, 1), (logging.ERROR, 0)])
def test_what_is_said_follows_transformers_verbosity(level, said, verbosity, caplog):
    verbosity(level)
    model = pkv_hf.patch(tiny("llama", attn_implementation="eager"))
    model.generate(**left_padded(9), max_new_tokens=3, return_dict_in_generate=True, output_attentions=True)
    assert pkv_hf.report(model).left
    assert len([record for record in caplog.records if "left to transformers" in record.getMessage()]) == said
    assert not compat.logger.handlers  # nothing is said twice


@pytest.mark.parametrize(("level", "said"), [(logging.WARNING, True), (logging.ERROR, False)])
def test_a_command_silences_transformers_and_not_us(level, said, verbosity):
    verbosity(level)
    for _ in range(2):
        models.quieten()
        assert not logging.getLogger("transformers").isEnabledFor(logging.WARNING)
        assert compat.logger.isEnabledFor(logging.WARNING) == said


def test_what_is_said_goes_where_transformers_says_it():
    done = python(
        "from pkv_hf import compat; compat.logger.warning('pkv_hf: heard'); compat.logger.info('pkv_hf: not heard')"
    )
    assert [line for line in done.stderr.splitlines() if "heard" in line] == ["[transformers] pkv_hf: heard"]
