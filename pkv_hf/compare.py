"""The same work by one model with and without pages, part by part, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from tqdm import tqdm

from pkv_hf.patch import patch, patched, unpatch, unwrap
from pkv_hf.report import state_of
from pkv_hf.resume import Store
from pkv_hf.state import STATE

Part = tuple[str, Callable[[], dict[str, Any]]]
"""A name that no other part of the run has, and what computes it: a dict of JSON types."""


def run(
    model: Any,
    on_pages: bool,
    parts: Sequence[Part],
    warm_up: Callable[[], object],
    store: Store | None,
    label: str,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Computes parts with the model patched (with its own settings if it has some) or unpatched, then as it was before.

    `warm_up` runs first, if a part has to be computed that `store` does not hold. On pages every result says by which
    `route` it ran and what was `left` to transformers.
    """
    warm = False

    def computed(compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        nonlocal warm
        if not warm:
            warm_up()
            warm = True
        result = compute()
        if on_pages:
            ran = state_of(model)
            result = {**result, "route": ran.route, "left": list(ran.left)}
        return result

    results = []
    with _as_patched(model) if on_pages else _unpatched(model):
        for name, compute in tqdm(parts, label, disable=not progress):
            results.append(computed(compute) if store is None else store.part(name, lambda: computed(compute)))  # noqa: B023
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
