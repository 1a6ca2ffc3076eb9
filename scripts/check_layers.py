"""Layers fused by their description: whether they are right, for a small model of every published shape by name.

- models: greedy tokens in float32 equal transformers'. A decode step's logits, in float32 and in bfloat16, are at most
  twice as far from those of wider arithmetic as transformers' own. A record says how many layers ran fused.
- altered: the same of models altered by hand (`bench/alterations.py`), whose logits are others than before.
- self-check: what it takes to find out which layers are fused at the 24B shape, in seconds and in bytes (on a GPU).

Runs the kernels on a GPU, or in Triton's interpreter (slow). Exits with 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))  # kernels run as they do in the tests

import interpreter

interpreter.use()  # first: packages that transformers finds installed may import triton

import torch  # noqa: E402

import pkv_hf  # noqa: E402
from pkv_hf.arguments import count, device, needs  # noqa: E402
from pkv_hf.bench import benchmark, logits  # noqa: E402
from pkv_hf.bench.alterations import ALTERATIONS, altered  # noqa: E402
from pkv_hf.bench.inputs.models import quieten  # noqa: E402
from pkv_hf.bench.inputs.shapes import SHAPES  # noqa: E402
from pkv_hf.bench.measure import PeakMemory  # noqa: E402
from pkv_hf.bench.results.records import OUT_FOLDER, append_record, environment, output  # noqa: E402
from pkv_hf.errors import UsageError, first_line, status  # noqa: E402
from pkv_hf.replaced import STATE  # noqa: E402
from pkv_hf.routes.registry import ROUTES  # noqa: E402

PARTS = ("models", "altered", "self-check")
ALTERED, LARGEST = "llama-3.1-8b", "mistral-small-24b"
LENGTHS = {torch.float32: [70, 50], torch.bfloat16: [70]}
"""Prompts, longer than the small models' windows."""
ROUTE = "split"
ERROR = 2.0
"""The error of logits over transformers' own, at most."""
ROUNDING = 1e-6
"""What may come to it: float32 logits are judged by float64."""
LEAST_MOVED = 0.01
"""Of logits, relative: an alteration that shows less tells nothing."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--only", nargs="+", default=list(SHAPES), choices=SHAPES, help="shapes of the models")
    parser.add_argument("--new-tokens", type=count, default=24, metavar="N")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=output, default=f"{OUT_FOLDER}/layers.jsonl")
    arguments = parser.parse_args()
    return status("check_layers", lambda: record(arguments))


def record(arguments: argparse.Namespace) -> int:
    """Appends a record of each model, alteration and self-check. Returns 1 where one is wrong."""
    needs("triton")
    on_gpu = arguments.device.startswith("cuda")
    if not on_gpu and arguments.parts == ["self-check"]:
        raise UsageError("--parts self-check: it builds a model of 48 GB on a GPU, and --device is none")
    quieten()
    warnings.filterwarnings("ignore")
    tasks: list[tuple[str, str]] = []
    tasks += [("models", name) for name in arguments.only if "models" in arguments.parts]
    tasks += [("altered", name) for name in ALTERATIONS if "altered" in arguments.parts]
    tasks += [("self-check", LARGEST)] * (on_gpu and "self-check" in arguments.parts)
    wrong = 0
    run = {"new_tokens": arguments.new_tokens, "device": arguments.device, **environment()}
    for part, name in tasks:
        try:
            with torch.backends.cudnn.flags(allow_tf32=False):  # float32 is to be float32 in convolutions too
                found = _TRIALS[part](name, arguments)
        except Exception as error:  # of a kernel or of a layer: it is the result
            found = {"right": False, "error": f"{type(error).__name__}: {first_line(error)}"}
        append_record(arguments.out, {"bench": "layers", "part": part, "name": name, **found, **run})
        print(json.dumps({"part": part, "name": name, **found}), flush=True)
        wrong += not found["right"]
    print(json.dumps({"records": len(tasks), "wrong": wrong}))
    return 1 if wrong else 0


def of_altered(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a record says of an altered model, and how far the alteration moves its logits."""
    found = compared(ALTERED, arguments, name)
    model = _built(ALTERED, torch.float32, arguments)
    inputs = benchmark.prompts(ALTERED, model, LENGTHS[torch.float32])
    with torch.no_grad():
        before = model(**inputs).logits[:, -1]
        with altered(model, name):
            moved = logits.error(before, model(**inputs).logits[:, -1].double())
    return {**found, "model": ALTERED, "logits_moved": moved, "right": found["right"] and moved > LEAST_MOVED}


def compared(shape: str, arguments: argparse.Namespace, alteration: str | None = None) -> dict[str, Any]:
    """What a record says of a small model in each dtype: its tokens, its logits, and how its steps ran."""
    found: dict[str, Any] = {}
    for dtype, lengths in LENGTHS.items():
        model = _built(shape, dtype, arguments)
        inputs = benchmark.prompts(shape, model, lengths)
        with altered(model, alteration) if alteration else nullcontext():
            own = _tokens(model, inputs, arguments.new_tokens)
            own_error = _logit_error(model, inputs, arguments.new_tokens)
            with pkv_hf.patched(model, route=ROUTE):
                ours = _tokens(model, inputs, arguments.new_tokens)
                said = pkv_hf.report(model)
                step = logits.first_step(model, inputs, arguments.new_tokens)
            error = logits.error(step[1], logits.expected(model, step[0], inputs["attention_mask"]))
        found[str(dtype).removeprefix("torch.")] = {
            "lengths": lengths,
            "tokens_equal": torch.equal(own, ours),
            "logit_error": error,
            "own_logit_error": own_error,
            "layers": model.config.get_text_config().num_hidden_layers,
            "fused": said.fused,
            "experts": said.experts,
            "not_experts": said.not_experts,
            "calls": asdict(said.calls),
            "steps": asdict(said.steps),
            "last_step": said.last_step,
            "not_fused": said.not_fused,
            "not_captured": said.not_captured,
            "left": list(said.left),
        }
    near = all(r["logit_error"] <= ERROR * r["own_logit_error"] + ROUNDING for r in found.values())
    return {"right": near and found["float32"]["tokens_equal"], **found}


def _built(shape: str, dtype: torch.dtype, arguments: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    return SHAPES[shape].build(dtype, arguments.device, small=True)


def _tokens(model: Any, inputs: dict[str, torch.Tensor], new_tokens: int) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False).cpu()


def _logit_error(model: Any, inputs: dict[str, torch.Tensor], new_tokens: int) -> float:
    tokens, found = logits.first_step(model, inputs, new_tokens)
    return logits.error(found, logits.expected(model, tokens, inputs["attention_mask"]))


def of_self_check(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What it takes to find out which layers of a shape are fused: with kernels to compile, and without."""
    from pkv_hf.patches.check import Fusing

    model = SHAPES[name].build(torch.bfloat16, arguments.device)
    seconds = []
    with pkv_hf.patched(model, route=ROUTE):
        known = getattr(model, STATE).known
        before = torch.cuda.memory_allocated(arguments.device)
        with PeakMemory(torch.device(arguments.device)) as peak:
            for _ in range(2):
                started = time.perf_counter()
                fusion = Fusing()(known.decoder, known.kinds, ROUTES[ROUTE])
                torch.cuda.synchronize(arguments.device)
                seconds.append(time.perf_counter() - started)
        layer = next(iter(known.decoder.layers))
    return {
        "right": not fusion.reasons,
        "dtype": "bfloat16",
        "layers": len(known.kinds),
        "fused": len(fusion.layers),
        "reasons": fusion.reasons,
        "first_s": seconds[0],
        "compiled_s": seconds[1],
        "peak_bytes": peak.nbytes - before,
        "layer_float32_bytes": 4 * sum(parameter.numel() for parameter in layer.parameters()),
    }


_TRIALS: dict[str, Callable[..., dict[str, Any]]] = {
    "models": compared, "altered": of_altered, "self-check": of_self_check,
}  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(main())
