"""One case tried: the same generate() calls by transformers alone and patched, compared.

A trial says which stage it is in before it begins it, so that whoever ends it knows whose fault a crash is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

import pkv_hf
from pkv_hf import compat
from pkv_hf.bench.model_types.building import build, prompts
from pkv_hf.bench.model_types.cases import Case
from pkv_hf.bench.model_types.modes import ALIKE, TOLERANCE, compared, outcomes
from pkv_hf.cache import linear
from pkv_hf.cache.paged import PagedCache
from pkv_hf.errors import NotServed
from pkv_hf.replaced import STATE
from pkv_hf.routes.base import Bounds
from pkv_hf.routes.registry import ROUTES
from pkv_hf.runtime.ahead.forward import Forward, updated
from pkv_hf.runtime.captured.static import run_decoder
from pkv_hf.runtime.step import Step

NEW_TOKENS = 12
OF_THIS_MACHINE = ("the route ", "a CUDA graph needs a GPU", "the first step of its shape")
"""How reasons begin why a step is not captured here, and would be in a longer run on a GPU."""

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


def run(case: Case, route: str, say: Say = lambda stage: None, modes: bool = False) -> dict[str, Any]:
    """What a record says of a case: `status`, `reason` and, of what was patched, how it ran, in `modes` too."""
    stage = ""

    def enter(name: str) -> None:
        nonlocal stage
        stage = name
        say(name)

    try:
        with torch.no_grad():
            return _run(case, route, enter, modes)
    except (pkv_hf.UnsupportedModelError, pkv_hf.RouteError) as error:
        return {"status": "raises", "reason": str(error)}
    except Exception as error:  # of transformers' model or of ours: it is the result
        return failed(stage, f"{type(error).__name__}: {error}")


def failed(stage: str, why: str) -> dict[str, Any]:
    """What a record says of a case that failed in a stage."""
    return {"status": STAGES[stage], "reason": f"cannot be {stage}: {' '.join(why.split())[:300]}"}


def _run(case: Case, route: str, enter: Say, modes: bool) -> dict[str, Any]:
    enter("built")
    model = build(case)
    enter("run unpatched")
    expected = _generate(model)
    if unsteady := expected.differs(_generate(model)):
        raise ValueError(f"a second run gives {unsteady}")
    if not expected.logits.isfinite().all():
        raise ValueError("its logits are not finite")
    expected_in_modes = outcomes(model) if modes else {}
    enter("patched")
    pkv_hf.patch(model, route=route)
    enter("run patched")
    found = _generate(model)
    ran, on_gpus = pkv_hf.report(model), _on_gpus(model)
    found_in_modes = outcomes(model) if modes else {}
    pkv_hf.unpatch(model)
    wrong = expected.differs(found)
    if not wrong and (kept := expected.differs(_generate(model))):
        wrong = f"after unpatch(): {kept}"
    in_modes = compared(model, expected_in_modes, found_in_modes)
    if not wrong:
        wrong = "; ".join(f"{mode}: {what}" for mode, what in in_modes.items() if what not in ALIKE)
    served = ran.route is not None and not ran.calls.transformers
    return {
        "status": "wrong" if wrong else "pages" if served else "left",
        "reason": wrong or "; ".join(ran.left),
        **on_gpus,
        "step_route": ran.route,
        "split_rejected": ran.rejected.get("split"),
        "logits_error": expected.difference(found),
        "modes": in_modes,
    }


def _on_gpus(model: Any) -> dict[str, Any]:
    """How a patched model's decode steps run on a GPU, which checks each description first, by what is found here."""
    state = getattr(model, STATE)
    described = state.fusing.described(state.known.decoder)
    eager = _eager(model)
    not_captured = eager or _not_captured(model)
    return {
        "layers": state.known.decoder.config.num_hidden_layers,
        "fused": len(described.layers),
        "not_fused": described.reasons,
        "eager": eager,
        "not_captured": not_captured,
        "not_run_ahead": not_captured or _not_run_ahead(model),
    }


def _eager(model: Any) -> str:
    """Why decode steps, on a GPU too, run the model's own layers; empty where they run on static buffers."""
    why = pkv_hf.report(model).not_captured
    return getattr(model, STATE).known.look().not_static if why.startswith(OF_THIS_MACHINE) else why


@torch.no_grad()
def _not_run_ahead(model: Any) -> str:
    """Why steps are not queued before the last one's tokens are read; empty where they are."""

    def loop(model: Any, ids: torch.Tensor, *_: Any, generation_config: Any, **kwargs: Any) -> torch.Tensor:
        outputs = model._prefill(ids, generation_config, kwargs)
        forward = Forward(model, getattr(model, STATE), updated(model, outputs, kwargs))
        last = outputs.logits[:, -1].argmax(-1)
        newest = torch.stack([last, torch.ones_like(last)])
        sequences: Any = SimpleNamespace(ids=torch.cat([ids, last[:, None]], dim=1), newest=newest)
        forward(sequences)
        return ids

    model.generate(**prompts(14), custom_generate=loop, max_new_tokens=2)
    return pkv_hf.report(model).not_run_ahead


@torch.no_grad()
def _not_captured(model: Any) -> str:
    """Why a step that a graph would keep cannot run, though nothing else speaks against it; empty where it runs."""
    cache, decoder = PagedCache(model.config), getattr(model, STATE).known.decoder
    decoder(torch.tensor([[5, 6, 7]]), **{compat.CACHE: cache})
    bounds, places = Bounds(np.zeros(1, dtype=np.int64), 3, 1), linear.addresses(cache.linear_layers)
    try:
        with Step(cache, bounds, ROUTES["sdpa"], decoder.config, captured=True) as step:
            run_decoder(decoder, torch.tensor([[8]]), torch.tensor([[3]]), step, None)
    except (RuntimeError, NotServed) as error:
        return str(error)
    return "" if linear.addresses(cache.linear_layers) == places else "its states move at each step"


def _generate(model: Any) -> Generated:
    two, one = prompts(12, 7), prompts(14)
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    settings["pad_token_id"] = 0
    first = model.generate(**two, **settings, return_dict_in_generate=True, output_logits=True)
    tokens = [first.sequences, model.generate(**two, **settings), model.generate(**one, **settings)]
    return Generated(tokens, torch.stack(first.logits))
