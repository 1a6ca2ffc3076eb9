"""Which models of the installed transformers are served on pages, and whether rightly: a record for each model type.

Builds a tiny random model of every model type that transformers maps to a causal or a multimodal LM, and of some
variants that are published; generates by transformers alone and patched, in float32 on the CPU; compares tokens and
logits. With --modes it compares beams, chunked prefill, two turns, sampling, prompt lookup, inputs_embeds, a static
cache and a plain forward too. Models that take images or sound get text alone. Each runs in a process of its own. Exits
with 1 where a patched model is wrong. docs/models.md shows the newest run of all.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))  # kernels run as they do in the tests

from tqdm import tqdm

import interpreter

interpreter.use()  # first: packages that transformers finds installed may import triton

import transformers  # noqa: E402

from pkv_hf.arguments import count, needs  # noqa: E402
from pkv_hf.bench.model_types import trial  # noqa: E402
from pkv_hf.bench.model_types.cases import Case, all_cases  # noqa: E402
from pkv_hf.bench.model_types.isolated import LIMIT_S, run_all  # noqa: E402
from pkv_hf.bench.results.records import OUT_FOLDER, append_record, environment, output  # noqa: E402
from pkv_hf.errors import UsageError, status  # noqa: E402
from pkv_hf.tables import table  # noqa: E402

KERNELS = ("split", "workqueue")
SHOWN_CHARACTERS = 80


def main() -> int:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="model types or classes (default: all)")
    parser.add_argument("--jobs", type=count, default=cores, help="processes (default: as many as cores)")
    parser.add_argument(
        "--route",
        default="auto",
        choices=("auto", "sdpa", *KERNELS),
        help="as patch() takes it; split and workqueue by Triton's interpreter, where there is no GPU (slow)",
    )
    parser.add_argument("--modes", action="store_true", help="compare other ways to generate too (some times as long)")
    parser.add_argument("--out", type=output, default=f"{OUT_FOLDER}/models.jsonl")
    arguments = parser.parse_args()
    return status("record_models", lambda: record(arguments))


def record(arguments: argparse.Namespace) -> int:
    """Appends a record of each case. Returns 1 where a patched model is wrong."""
    if arguments.route in KERNELS:
        needs("triton")
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    known, asked = all_cases(), set(arguments.only)
    if unknown := asked - {name for case in known for name in (case.model_type, case.class_name)}:
        raise UsageError(f"--only {' '.join(sorted(unknown))}: transformers has no such causal or multimodal LM")
    cases = [case for case in known if not asked or asked & {case.model_type, case.class_name}]
    run = {"device": "cpu", "route": arguments.route, "of": len(known), **environment()}
    started, found = time.perf_counter(), []
    limit_s = LIMIT_S * (1 + arguments.modes)
    each = functools.partial(trial.run, modes=arguments.modes)
    results = run_all(cases, arguments.route, arguments.jobs, limit_s, each)
    for case, result in tqdm(results, total=len(cases), file=sys.stderr):
        what = {"model_type": case.model_type, "class": case.class_name, "variant": case.variant}
        append_record(arguments.out, {"bench": "models", **what, **result, **run})
        found.append((case, result))
    found.sort(key=lambda each: cases.index(each[0]))
    print(table(("model", "class", "status", "why"), [row(*each) for each in found]), end="\n\n")
    counts = Counter(result["status"] for _, result in found)
    seconds = round(time.perf_counter() - started, 1)
    print(json.dumps({"records": len(found), **{name: counts[name] for name in trial.STATUSES}, "seconds": seconds}))
    return 1 if counts["wrong"] else 0


def row(case: Case, result: dict[str, Any]) -> tuple[str, ...]:
    return case.name, case.class_name, result["status"], result["reason"][:SHOWN_CHARACTERS]


if __name__ == "__main__":
    raise SystemExit(main())
