"""One case tried: the same generate() calls by transformers alone and patched, compared.

A trial says which stage it is in before it begins it, so that whoever ends it knows whose fault a crash is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import pkv_hf
from pkv_hf.bench.model_types.building import build, prompts
from pkv_hf.bench.model_types.cases import Case

NEW_TOKENS = 12
TOLERANCE = 1e-4
"""Of logits, relative to the largest one."""

STATUSES = ("pages", "left", "raises", "wrong", "own error")
"""Served on pages; patched and left to transformers; refused by `patch` or by the route that was named; patched and not
the same; and transformers alone fails, so that nothing is known."""

STAGES = {"built": "own error", "run unpatched": "own error", "patched": "wrong", "run patched": "wrong"}
"""What a trial does in turn, and how it ends where that fails."""

Say = Callable[[str], None]


class Generated(NamedTuple):
    tokens: list[torch.Tensor]
    """Of two rows left-padded to one length, of these without logits, and of one row."""
    logits: torch.Tensor
    """`[NEW_TOKENS, 2, vocabulary]`, of the two rows."""

    def differs(self, other: Generated) -> str:
        """What is not the same in the other one, empty where nothing is."""
        if not all(map(torch.equal, self.tokens, other.tokens)):
            return "other tokens"
        error = self.difference(other)
        return "" if error <= TOLERANCE else f"logits differ by {error:.1e} of the largest"

    def difference(self, other: Generated) -> float:
        largest = max(self.logits.abs().max().item(), 1.0)
        return (self.logits - other.logits).abs().max().item() / largest


def run(case: Case, route: str, say: Say = lambda stage: None) -> dict[str, Any]:
    """What a record says of a case: `status`, `reason` and, of what was patched, how it ran."""
    stage = ""

    def enter(name: str) -> None:
        nonlocal stage
        stage = name
        say(name)

    try:
        with torch.no_grad():
            return _run(case, route, enter)
    except (pkv_hf.UnsupportedModelError, pkv_hf.RouteError) as error:
        return {"status": "raises", "reason": str(error)}
    except Exception as error:  # of transformers' model or of ours: it is the result
        return failed(stage, f"{type(error).__name__}: {error}")


def failed(stage: str, why: str) -> dict[str, Any]:
    """What a record says of a case that failed in a stage."""
    return {"status": STAGES[stage], "reason": f"cannot be {stage}: {' '.join(why.split())[:300]}"}


def _run(case: Case, route: str, enter: Say) -> dict[str, Any]:
    enter("built")
    model = build(case)
    enter("run unpatched")
    expected = _generate(model)
    if unsteady := expected.differs(_generate(model)):
        raise ValueError(f"a second run gives {unsteady}")
    if not expected.logits.isfinite().all():
        raise ValueError("its logits are not finite")
    enter("patched")
    pkv_hf.patch(model, route=route)
    enter("run patched")
    found = _generate(model)
    ran = pkv_hf.report(model)
    pkv_hf.unpatch(model)
    wrong = expected.differs(found)
    if not wrong and (kept := expected.differs(_generate(model))):
        wrong = f"after unpatch(): {kept}"
    served = ran.route is not None and not ran.calls.transformers
    return {
        "status": "wrong" if wrong else "pages" if served else "left",
        "reason": wrong or "; ".join(ran.left),
        "own_layers": ran.generic or _wraps(model),
        "step_route": ran.route,
        "split_rejected": ran.rejected.get("split"),
        "logits_error": expected.difference(found),
    }


def _wraps(model: Any) -> bool:
    """Whether a model is more than its decoder, which it then calls with embeddings: no fused step takes those."""
    return vars(model.get_decoder().config) is not vars(model.config)


def _generate(model: Any) -> Generated:
    two, one = prompts(12, 7), prompts(14)
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    settings["pad_token_id"] = 0
    first = model.generate(**two, **settings, return_dict_in_generate=True, output_logits=True)
    tokens = [first.sequences, model.generate(**two, **settings), model.generate(**one, **settings)]
    return Generated(tokens, torch.stack(first.logits))
