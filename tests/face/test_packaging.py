"""What an installation gives, and what importing it does not need."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from pkv_hf import compat
from places import ROOT

pytestmark = pytest.mark.contract


def python(code: str) -> str:
    """Runs code in a new interpreter at the repository's root, whose folders come first on its path."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_three_packages_come_from_here():
    out = python("import pkv_hf.kernels.reference as k, pkv_hf.patches.description as p; print(k.__file__, p.__file__)")
    assert out == f"{ROOT / 'kernels' / 'reference.py'} {ROOT / 'patches' / 'description.py'}"


def test_hugging_faces_kernels_package_is_not_hidden():
    """`make test-oldest` has, apart, a release that the oldest transformers makes use of."""
    pytest.importorskip("kernels")
    lines = python(
        "import sys; sys.path.insert(0, 'tests/helpers')\n"
        "import kernels, torch; from transformers.utils import is_kernels_available\n"
        "from tiny import assert_on_pages, left_padded, tiny; import pkv_hf\n"
        "model, inputs = tiny('llama'), left_padded(20, 9)\n"
        "expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)\n"
        "pkv_hf.patch(model, route='sdpa')\n"
        "assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), expected)\n"
        "assert_on_pages(model)\n"
        "print(kernels.__file__, is_kernels_available())"
    ).splitlines()
    file, available = lines[-1].split()
    assert str(ROOT / "kernels") not in file
    assert available == "True" or "with_kernels" not in file


def test_importing_needs_no_triton_and_no_flashinfer():
    python(
        "import sys; sys.modules['triton'] = sys.modules['flashinfer'] = None\n"
        "import pkv_hf, pkv_hf.kernels.reference\n"
        "pkv_hf.PagedCache"
    )
    extras = ("flashinfer", "matplotlib", "datasets", "evaluate")
    assert python(f"import sys, pkv_hf; print([name for name in {extras} if name in sys.modules])") == "[]"


def test_generating_on_a_cpu_needs_no_triton_and_a_route_that_does_says_so():
    python(
        "import sys; sys.path.insert(0, 'tests/helpers'); sys.modules['triton'] = None\n"
        "from tiny import tiny, left_padded; import pkv_hf\n"
        "model = pkv_hf.patch(tiny('llama')); model.generate(**left_padded(9), max_new_tokens=3)\n"
        "assert pkv_hf.report(model).route == 'sdpa'\n"
        "pkv_hf.patch(model, route='split')\n"
        "try: model.generate(**left_padded(9), max_new_tokens=3)\n"
        "except pkv_hf.RouteError as error: assert 'triton is not installed' in str(error), error\n"
        "else: raise SystemExit('generated')"
    )


def test_patching_and_generating_need_no_extra_and_what_does_names_it():
    python(
        "import sys; sys.path.insert(0, 'tests/helpers')\n"
        "extras = ('peft', 'datasets', 'evaluate', 'matplotlib', 'flashinfer', 'kernels')\n"
        "sys.modules.update(dict.fromkeys(extras))\n"
        "from tiny import assert_on_pages, left_padded, tiny; import pkv_hf\n"
        "model = pkv_hf.patch(tiny('llama')); model.generate(**left_padded(9), max_new_tokens=3)\n"
        "assert_on_pages(model)\n"
        "from pkv_hf import errors; from pkv_hf.bench.inputs import texts\n"
        "try: texts.load_split('a', 'test')\n"
        "except errors.UsageError as error: assert 'pip install datasets' in str(error)\n"
        "else: raise SystemExit('loaded')"
    )


@pytest.mark.parametrize(
    "old",
    ["import transformers", "sys.modules['transformers'] = ModuleType('old')"],
    ids=["a release before", "without any of its names"],
)
def test_an_old_transformers_fails_at_patch_and_not_at_import(old):
    python(
        f"import sys; from types import ModuleType; {old}\n"
        "sys.modules['transformers'].__version__ = '4.40.1'\n"
        "import pkv_hf\n"
        "for name in ('patch', 'patched', 'PagedCache', 'plan'):\n"
        "    try: getattr(pkv_hf, name)(None)\n"
        "    except pkv_hf.UnsupportedVersionError as error:\n"
        '        assert "transformers 4.40.1 is older than" in str(error)\n'
        '        assert "pip install \'transformers>=" in str(error)\n'
        "    else: raise SystemExit('patched')\n"
        "import contextlib, io; from pkv_hf import cli; sys.argv = ['pkv-hf', 'demo']\n"
        "with contextlib.redirect_stderr(io.StringIO()) as said: assert cli.main() == 2\n"
        "assert said.getvalue().startswith('pkv-hf demo: transformers 4.40.1 is older than'), said.getvalue()"
    )


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def test_one_module_compares_versions():
    versions = re.compile(r"packaging|parse_version|is_transformers_version|(hasattr|getattr)\(transformers, [\"']")
    found = [path.name for path in sources("pkv_hf", "kernels", "patches") if versions.search(path.read_text())]
    assert found == ["compat.py"]


def test_one_module_knows_what_transformers_calls_a_cache():
    names = re.compile(r"past_key_values|[\"']cache[\"']|\bcache=")
    found = [path.name for path in sources("pkv_hf", "kernels", "patches") if names.search(path.read_text())]
    assert found == ["compat.py"]
    assert not [path for path in sources("scripts") if "past_key_values" in path.read_text()]


def test_the_tested_range_is_what_make_tests():
    (oldest,) = re.findall(r"^OLDEST = transformers==(\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    (pinned,) = re.findall(r"^transformers==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    (declared,) = re.findall(r"transformers>=(\S+)", (ROOT / "setup.cfg").read_text())
    assert Version(oldest) == Version(compat.OLDEST_TRANSFORMERS) == Version(f"{declared}.0")
    assert Version(oldest) < Version(pinned) <= Version(compat.NEWEST_TRANSFORMERS)
