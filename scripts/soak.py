"""Long runs that look for what short tests miss; each appends a record of what ran to a results file.

kernels: random cases of attention over the whole supported space against float64, poison wherever nothing may be read.
layers: the same of all other kernels: append and RoPE (what else pages hold stays), linear layers, norms, SwiGLU.
cache: random sequences of cache operations beside transformers' dense cache, every page counted after each.
leaks: generate() calls of every kind; memory, graphs and open files are as after the first quarter of them.

A record is appended whether or not there were failures; with failures the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))  # what the tests run a little of

import numpy as np
from tqdm import tqdm

import interpreter

interpreter.use()  # first: packages that transformers finds installed may import triton

from pkv_hf.arguments import count, device, natural, needs  # noqa: E402
from pkv_hf.bench.results.records import OUT_FOLDER, append_record, environment, output  # noqa: E402
from pkv_hf.errors import UsageError, status  # noqa: E402

if TYPE_CHECKING:
    from pkv_hf.kernels.checks.fuzz import Judge

CASES = {
    "cpu": {"kernels": 200, "layers": 1_000, "cache": 400, "leaks": 2_000},
    "cuda": {"kernels": 20_000, "layers": 20_000, "cache": 400, "leaks": 10_000},
}
LONGEST = {"cpu": {"kernels": 120, "layers": 4096}, "cuda": {"kernels": 16_384, "layers": 16_384}}
VARIATIONS = 60
"""Cases that share what Triton compiles."""

STEPS = 60
"""Operations of one sequence on caches, at most."""

SEQUENCES = 20
"""Sequences of one seed."""


def kernels(arguments: argparse.Namespace, cases: int, seed: int) -> dict[str, Any]:
    from pkv_hf.kernels.checks.attention import DTYPES, ROUTES
    from pkv_hf.kernels.checks.fuzz import batches, judge

    longest, variations = sizes("kernels", arguments)
    made = batches(np.random.default_rng(seed), cases, variations, longest, DTYPES)
    found, worst = fuzzed("kernels", made, arguments, judge)
    return {"routes": list(ROUTES), "longest": longest, "error_over_sdpa_max": worst, **found}


def layers(arguments: argparse.Namespace, cases: int, seed: int) -> dict[str, Any]:
    from pkv_hf.kernels.checks.fuzz_layers import batches, judge

    longest, variations = sizes("layers", arguments)
    made = batches(np.random.default_rng(seed), cases, variations, longest)
    found, worst = fuzzed("layers", made, arguments, judge)
    return {"longest": longest, "error_over_torch_max": worst, **found}


def sizes(kind: str, arguments: argparse.Namespace) -> tuple[int, int]:
    """The largest size of a case, and how many cases share what Triton compiles."""
    return arguments.longest or LONGEST[arguments.device][kind], VARIATIONS if arguments.device == "cuda" else 4


def fuzzed(
    kind: str, made: Sequence[Sequence[Any]], arguments: argparse.Namespace, judge: Judge
) -> tuple[dict[str, Any], float]:
    """What a record says of batches of cases, of dtypes that the device has, and their largest error over torch's.

    Raises UsageError where that leaves none.
    """
    import torch

    from pkv_hf.kernels.checks.fuzz import BOUND, fuzz
    from pkv_hf.kernels.launch import has_dtypes

    gpu = torch.device(arguments.device)
    made = [batch for batch in made if has_dtypes(gpu, batch[0].dtype, getattr(batch[0], "kv_dtype", None))]
    if not made:
        raise UsageError(f"{kind}: no case that was drawn has dtypes that {gpu} supports: ask for more --cases")
    cases, failures, redrawn, worst = sum(map(len, made)), [], 0, 0.0
    with progress(kind, cases) as bar:
        for outcomes in fuzz(made, arguments.device, arguments.jobs, interpreter.use, judge):
            for outcome in outcomes:
                failures += [f"{name} {outcome.case} {outcome.results[name]}" for name in outcome.failed]
                redrawn += outcome.redrawn
                worst = max(worst, *(result.ratio for result in outcome.results.values()))
            bar.update(len(outcomes))
    found = {
        "cases": cases, "configurations": len(made), "bound": BOUND, "redrawn": redrawn, "failures": failures
    }  # fmt: skip
    return found, worst


def cache(arguments: argparse.Namespace, cases: int, seed: int) -> dict[str, Any]:
    import cache_machine

    failures, operations = [], 0
    with progress("cache", cases) as bar:
        for begin in range(0, cases, SEQUENCES):
            for machine in cache_machine.MACHINES:
                sequences = min(SEQUENCES, cases - begin)
                try:
                    operations += cache_machine.run(machine, sequences, STEPS, seed + begin)
                except Exception:  # what a sequence fails with is the result
                    failures.append(f"{machine.__name__} from seed {seed + begin}: {traceback.format_exc()}")
            bar.update(sequences)
    return {"cases": cases * len(cache_machine.MACHINES), "operations": operations, "failures": failures}


def leaks(arguments: argparse.Namespace, cases: int, seed: int) -> dict[str, Any]:
    from leaks import BOUNDS, Calls

    calls, warm = Calls(seed, arguments.device), None
    for call in progress("leaks", cases, range(cases)):
        if call == cases // 4:
            warm = calls.held()
        calls()
    after = calls.held()
    grown = after.grown(warm) if warm else {}
    return {
        "cases": cases,
        "after_warm_up": asdict(warm) if warm else {},
        "at_the_end": asdict(after),
        "bounds": BOUNDS,
        "failures": [f"{name} grew by {value:,}" for name, value in grown.items()],
    }


KINDS: dict[str, Callable[[argparse.Namespace, int, int], dict[str, Any]]] = {
    "kernels": kernels,
    "layers": layers,
    "cache": cache,
    "leaks": leaks,
}
PACKAGES = {"kernels": ["triton"], "layers": ["triton"], "cache": ["hypothesis", "pytest"], "leaks": []}


def progress(name: str, total: int, over: range | None = None) -> tqdm:
    return tqdm(over, desc=name, total=total, file=sys.stderr, mininterval=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--cases", type=count, help="cases, sequences or calls (default: by kind and device)")
    parser.add_argument("--device", type=device, default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--jobs", type=count, default=1, help="processes of kernels and layers (default: %(default)s)")
    parser.add_argument("--longest", type=count, help="tokens of the longest row, and the widest of layers")
    parser.add_argument("--seed", type=natural, help="drawn afresh where it is not given")
    parser.add_argument("--out", type=output, default=f"{OUT_FOLDER}/soak.jsonl")
    arguments = parser.parse_args()
    for kind in arguments.kinds:
        if kind not in KINDS:
            parser.error(f"{kind!r} is no kind of soak: name one of {', '.join(KINDS)}")
    return status("soak", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    """Runs every kind that is named. Returns 1 where there are failures."""
    kinds = arguments.kinds or list(KINDS)
    needs(*(package for kind in kinds for package in PACKAGES[kind]))
    seed = secrets.randbits(31) if arguments.seed is None else arguments.seed
    summary = {}
    for kind in kinds:
        started = time.perf_counter()
        found = KINDS[kind](arguments, arguments.cases or CASES[arguments.device][kind], seed)
        for failure in found["failures"]:
            print(f"FAILED {kind} {failure}")
        record = {
            "bench": "soak",
            "kind": kind,
            "device": arguments.device,
            "seed": seed,
            **found,
            "failures": len(found["failures"]),
            "seconds": round(time.perf_counter() - started, 1),
            **environment(),
        }
        append_record(arguments.out, record)
        summary[kind] = {key: record[key] for key in ("cases", "seconds", "failures")}
    failures = sum(of_kind["failures"] for of_kind in summary.values())
    print(json.dumps({"passed": not failures, "seed": seed, **summary}))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
