"""Today's families on the Triton routes: a record of each tiny model and route, compared with transformers alone.

Random models in float32 generate from two prompts, left-padded, with an image where the family takes some: greedily and
with beams. A record says whether tokens are equal, how far greedy logits are off, how the decode steps ran, and why
they ran no better. A model is right where tokens are equal, logits close and every forward ran on pages, by the route
asked for: layers that no CUDA graph can hold are not wrong. On a GPU the kernels run there; elsewhere Triton's
interpreter runs them (slow). Exits with 1 where a model is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))  # the models are those of the tests

import interpreter

interpreter.use()  # first: packages that transformers finds installed may import triton

import torch  # noqa: E402
import transformers  # noqa: E402

import pkv_hf  # noqa: E402
from families.compare import logits_error  # noqa: E402
from families.models import FAMILIES, WRAPPERS, family_model  # noqa: E402
from families.modes import seen, text  # noqa: E402
from pkv_hf.arguments import count, needs  # noqa: E402
from pkv_hf.bench.model_types.modes import TOLERANCE  # noqa: E402
from pkv_hf.bench.results.records import OUT_FOLDER, append_record, environment, output  # noqa: E402
from pkv_hf.errors import UsageError, first_line, status  # noqa: E402

RECORDED = ("qwen3.5", "qwen3-vl", "gemma3", "gemma4", "gpt-oss", "granite-4", "llama4")
ROUTES = ("split", "workqueue")
LENGTHS = (60, 23)
ROWS = ((38, 1, 12), (4, 1, 9))
"""Tokens before an image, images, and tokens after."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=RECORDED, metavar="NAME", help="families (default: %(default)s)")
    parser.add_argument("--new-tokens", type=count, default=40, help="of each call (default: %(default)s)")
    parser.add_argument("--out", type=output, default=f"{OUT_FOLDER}/families.jsonl")
    arguments = parser.parse_args()
    return status("record_families", lambda: record(arguments))


def record(arguments: argparse.Namespace) -> int:
    """Appends a record of each family and route. Returns 1 where one is wrong."""
    needs("triton")
    if unknown := [name for name in arguments.only if name not in FAMILIES]:
        raise UsageError(f"--only {' '.join(unknown)}: no such family, of {', '.join(FAMILIES)}")
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    wrong, run = 0, {"lengths": LENGTHS, "new_tokens": arguments.new_tokens, **environment()}
    for family in arguments.only:
        for route in ROUTES:
            found = trial(family, route, arguments.new_tokens)
            append_record(arguments.out, {"bench": "families", "family": family, "route": route, **found, **run})
            print(json.dumps({"family": family, "route": route, **found}), flush=True)
            wrong += not found["right"]
    return 1 if wrong else 0


@torch.no_grad()
def trial(family: str, route: str, new_tokens: int) -> dict[str, Any]:
    """What a record says of a family on a route. Where the route cannot serve it, or fails, it says the error."""
    model = family_model(family).to("cuda" if torch.cuda.is_available() else "cpu")
    modes = asked(family, new_tokens)
    try:
        with torch.backends.cudnn.flags(allow_tf32=False):  # float32 is to be float32 in convolutions too
            expected = {mode: ask(model, family) for mode, ask in modes.items()}
            with pkv_hf.patched(model, route=route):
                found = {mode: ask(model, family) for mode, ask in modes.items()}
                said = pkv_hf.report(model)
    except Exception as error:  # of the route, of a kernel or of a layer: it is the result
        return {"right": False, "error": f"{type(error).__name__}: {first_line(error)}"}
    equal = {mode: torch.equal(found[mode].sequences, expected[mode].sequences) for mode in modes}
    off = logits_error(found["greedy"], expected["greedy"])
    on_pages = not said.calls.transformers and said.route == route
    return {
        "right": all(equal.values()) and off <= TOLERANCE and on_pages,
        "tokens_equal": equal["greedy"],
        "beams_equal": equal["beams"],
        "logits_error": off,
        "with_media": family in WRAPPERS,
        "step_route": said.route,
        "calls": asdict(said.calls),
        "steps": asdict(said.steps),
        "last_step": said.last_step,
        "not_fused": said.not_fused,
        "not_captured": said.not_captured,
        "left": said.left,
    }


def asked(family: str, new_tokens: int) -> dict[str, Callable[..., Any]]:
    """Greedy decoding, and beams, whose pages and states change places."""
    how = partial(seen, ROWS) if family in WRAPPERS else partial(text, LENGTHS)
    return {"greedy": how(new_tokens=new_tokens), "beams": how(new_tokens=new_tokens, num_beams=3)}


if __name__ == "__main__":
    raise SystemExit(main())
