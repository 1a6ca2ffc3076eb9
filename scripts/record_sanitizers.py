"""Reads the logs that scripts/sanitize.sh left in a folder, and appends one record of what the sanitizers found.

Exits with 1 unless every tool ended with a summary of no errors and its program with status 0.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from pkv_hf.bench.results.records import OUT_FOLDER, append_record, environment, output
from pkv_hf.errors import UsageError, status

TOOLS = ("memcheck", "racecheck", "initcheck")
BEGINNING = re.compile(r"^=+ COMPUTE-SANITIZER$", re.MULTILINE)
SUMMARY = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (.*)$", re.MULTILINE)
NOTHING = re.compile(r"0 (errors|hazards displayed \(0 errors)")
PASSED = re.compile(r"^(\d+) passed", re.MULTILINE)
FINDINGS = 40
"""Lines of a tool that is not clean which are printed."""


def read(folder: Path, tool: str) -> dict[str, object]:
    """A tool's summary, the tests that ran under it and the status of its program, over all of its runs.

    Of several summaries, the first that is not of no errors. Raises UsageError for a folder without what
    scripts/sanitize.sh leaves of the tool.
    """
    log, ended = _text(folder / f"{tool}.log"), folder / f"{tool}.status"
    runs, summaries, passed = len(BEGINNING.findall(log)), SUMMARY.findall(log), PASSED.findall(log)
    unclean = [summary for summary in summaries if not NOTHING.match(summary)]
    status = _number(ended) if ended.exists() else 0
    return {
        "summary": next(iter(unclean or summaries), "none"),
        "tests": sum(map(int, passed)),
        "status": status,
        "seconds": _number(folder / f"{tool}.seconds"),
        "clean": not unclean and runs > 0 and len(summaries) == len(passed) == runs and status == 0,
    }


def _text(path: Path) -> str:
    if not path.is_file():
        raise UsageError(f"{path.parent} has no {path.name}: name a folder that scripts/sanitize.sh has filled")
    return path.read_text(errors="replace")


def _number(path: Path) -> int:
    text = _text(path).strip()
    if not text.isdecimal():
        raise UsageError(f"{path} holds {text[:40]!r}, not a number: run scripts/sanitize.sh again")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path)
    parser.add_argument("--out", type=output, default=f"{OUT_FOLDER}/sanitizers.jsonl")
    arguments = parser.parse_args()
    return status("record_sanitizers", lambda: record(arguments))


def record(arguments: argparse.Namespace) -> int:
    """Returns 1 unless every tool is clean."""
    tools = {tool: read(arguments.logs, tool) for tool in TOOLS}
    for tool, found in tools.items():
        if not found["clean"]:
            lines = (arguments.logs / f"{tool}.log").read_text(errors="replace").splitlines()
            about = [line for line in lines if line.startswith("=========")] or lines[-FINDINGS:]
            print(f"{tool}: {found['summary']}", *about[:FINDINGS], sep="\n")
    clean = all(found["clean"] for found in tools.values())
    append_record(arguments.out, {"bench": "sanitizers", "clean": clean, **tools, **environment()})
    print(json.dumps({"clean": clean, **{tool: found["summary"] for tool, found in tools.items()}}))
    return 0 if clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
