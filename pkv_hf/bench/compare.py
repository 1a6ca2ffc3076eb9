"""The same work by one model with and without pages, part by part, resumable."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from pkv_hf.bench.results.resume import Store
from pkv_hf.compat import unwrap
from pkv_hf.patching import patch, patched, unpatch
from pkv_hf.replaced import STATE
from pkv_hf.reporting import report

Part = tuple[str, Callable[[], dict[str, Any]]]
"""A name that no other part of the run has, and what computes it: a dict of JSON types."""


@dataclass(frozen=True)
class Engine:
    """A way to compute the parts of a run."""

    on_pages: bool
    parts: Sequence[Part]
    warm_up: Callable[[], object]


def run(
    model: Any, engines: Mapping[str, Engine], store: Store | None, label: str, progress: bool = True
) -> dict[str, list[dict[str, Any]]]:
    """Computes the parts of every engine, with the model patched (by its own settings if it has some) or unpatched.

    Engines take turns at the parts, one of each at a time: a host that is slow for some seconds is so for all of them.
    `warm_up` runs before an engine's first part that `store` does not hold. On pages every result says by which `route`
    it ran and what was `left` to transformers. The model is then as it was before.
    """
    warm: set[str] = set()

    def computed(name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        engine = engines[name]
        with _as_patched(model) if engine.on_pages else _unpatched(model):
            if name not in warm:
                engine.warm_up()
                warm.add(name)
            result = compute()
            if engine.on_pages:
                ran = report(model)
                result = {**result, "route": ran.route, "left": list(ran.left)}
        return result

    turns = [(name, *part) for parts in zip(*(e.parts for e in engines.values())) for name, part in zip(engines, parts)]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    for name, part, compute in tqdm(turns, label, disable=not progress):
        compute = functools.partial(computed, name, compute)
        results[name].append(compute() if store is None else store.part(part, compute))
    return results


def served(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The route of results on pages, and all that was left to transformers."""
    left = sorted({reason for result in results for reason in result["left"]})
    return {"route": results[-1]["route"], "left": left}


def check_patchable(model: Any) -> None:
    """Raises UnsupportedModelError before anything is measured on a model that `patch` refuses."""
    with _as_patched(model):
        pass


def _as_patched(model: Any) -> AbstractContextManager[Any]:
    return nullcontext() if getattr(unwrap(model), STATE, None) is not None else patched(model)


@contextmanager
def _unpatched(model: Any) -> Iterator[None]:
    state = getattr(unwrap(model), STATE, None)
    unpatch(model)
    try:
        yield
    finally:
        if state is not None:
            patch(model, **state.settings)
