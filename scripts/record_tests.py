"""Runs tests, by default those of a GPU, and appends one record of how they ended. Exits with 1 where any failed."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from pkv_hf.arguments import count, needs
from pkv_hf.bench.results.records import OUT_FOLDER, append_record, environment, output
from pkv_hf.errors import UsageError, status


class Outcomes:
    """A plugin of pytest that notes how every test ended."""

    def __init__(self) -> None:
        self.passed = 0
        self.skipped = 0
        self.failed: set[str] = set()
        self.measured: dict[str, dict[str, Any]] = {}
        """What tests have recorded as properties, by test."""

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Of a test's set-up, its call or what follows it."""
        self.passed += report.when == "call" and report.passed
        self.skipped += report.skipped
        if report.failed:
            self.failed.add(report.nodeid)
        if report.when == "call" and report.user_properties:
            self.measured[report.nodeid] = dict(report.user_properties)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help="files or folders (default: tests/gpu)")
    parser.add_argument("--jobs", type=count, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--out", type=output, default=f"{OUT_FOLDER}/tests.jsonl")
    arguments = parser.parse_args()
    return status("record_tests", lambda: record(arguments))


def record(arguments: argparse.Namespace) -> int:
    """Returns 1 unless some tests passed and none failed."""
    needs("pytest")
    import pytest

    tests = arguments.tests or ["tests/gpu"]
    for test in tests:
        if not Path(test.partition("::")[0]).exists():
            raise UsageError(f"{test} does not exist: name files or folders of tests")
    outcomes, started = Outcomes(), time.perf_counter()
    processes = ["-n", str(arguments.jobs)] if arguments.jobs > 1 else []
    code = pytest.main(["-q", *processes, *tests], plugins=[outcomes])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise UsageError(f"pytest ended with {pytest.ExitCode(code).name}, as it says above: nothing is recorded")
    found = {
        "passed": outcomes.passed,
        "skipped": outcomes.skipped,
        "failed": sorted(outcomes.failed),
        "measured": outcomes.measured,
        "seconds": round(time.perf_counter() - started, 1),
    }
    append_record(arguments.out, {"bench": "tests", "tests": tests, **found, **environment()})
    print(json.dumps(found))
    return 0 if code == pytest.ExitCode.OK and outcomes.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
