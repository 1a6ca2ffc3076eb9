"""Which route a step takes: the one that is predicted to be fastest, of those that accept it."""

from __future__ import annotations

from dataclasses import dataclass

from pkv_hf.errors import RouteError
from pkv_hf.policy.calibration import constants_for
from pkv_hf.routes.base import Rejected, Route, StepShape
from pkv_hf.routes.costs import Constants, RouteConstants, predict
from pkv_hf.routes.registry import ROUTES
from pkv_hf.tables import table

HYSTERESIS = 0.05
"""A cache leaves the route of its last step only for one that is predicted to be faster by more than this share, since
another route means another captured graph."""


CHOOSE_EVERY = 64
"""Steps of the same rows after which a loop asks for the fastest route again: lengths have hardly changed before."""


@dataclass(frozen=True)
class Candidate:
    """A route, and what it is predicted to take in seconds a layer, or why it is not taken."""

    route: str
    seconds: float | None = None
    rejected: str | None = None


@dataclass(frozen=True)
class Decision:
    """The route of a step, among all. `print()`, a REPL and a notebook show the table."""

    route: Route
    shape: StepShape
    constants: Constants
    answers: dict[str, str | None]
    """Why each route rejects steps of this kind, None where it takes them."""
    contenders: dict[str, tuple[RouteConstants, ...]]
    """The routes that take such steps and can be predicted, for each kind of layer."""
    seconds: dict[str, float]
    """What each of these is predicted to take a layer."""
    others: tuple[StepShape, ...] = ()
    """The step by its layers of other heads, or that do other things with scores, than `shape` says."""

    @property
    def shapes(self) -> tuple[StepShape, ...]:
        """The step by its layers of every kind."""
        return self.shape, *self.others

    @property
    def source(self) -> str:
        """Where the constants come from."""
        return self.constants.source

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """All routes."""
        return tuple(Candidate(name, self.seconds.get(name), self._rejection(name)) for name in ROUTES)

    def _rejection(self, name: str) -> str | None:
        if self.answers[name] is not None or name in self.seconds or name == self.route.name:
            return self.answers[name]
        return None if ROUTES[name].work(self.shape) is None else "not calibrated: run `pkv-hf calibrate`"

    @property
    def rejected(self) -> dict[str, str]:
        """Why routes were refused, by name."""
        return {other.route: other.rejected for other in self.candidates if other.rejected is not None}

    def __repr__(self) -> str:
        lines = [
            f"step       {shape.rows} x {shape.q_len} queries over {shape.tokens:,} tokens, {shape.longest:,} at most; "
            f"{shape.layers} layers, {shape.kv_heads} KV heads of {shape.head_dim}, {shape.group} query heads each, "
            f"{str(shape.dtype).removeprefix('torch.')}, {'replayed' if shape.captured else 'not captured'}"
            for shape in self.shapes
        ]
        lines.append(f"constants  {self.source}")
        rows = [
            (
                candidate.route,
                "-" if candidate.seconds is None else f"{candidate.seconds * 1e6:,.1f}",
                "taken" if candidate.route == self.route.name else candidate.rejected or "",
            )
            for candidate in sorted(self.candidates, key=lambda c: float("inf") if c.seconds is None else c.seconds)
        ]
        return "\n".join([*lines, table(("route", "us a layer", ""), rows)])


def choose(
    name: str,
    shape: StepShape,
    last: str | None = None,
    constants: Constants | None = None,
    before: Decision | None = None,
    others: tuple[StepShape, ...] = (),
) -> Decision:
    """Decides on a step: the route `name`, or for "auto" the fastest by prediction; `last` is the cache's last route.

    `others` are the step by its layers of other kinds: a route serves all of them or none. `constants` are those stored
    for the device where none are given. What routes answered to `before` holds for a step that differs in its rows
    alone. `sdpa` has no prediction and is taken where no other route can be.

    Raises RouteError where the caller named a route that rejects the step.
    """
    constants = constants or constants_for(shape.device)
    shapes = shape, *others
    kinds = [each.kind() for each in shapes]
    if before is not None and before.constants is constants and [each.kind() for each in before.shapes] == kinds:
        answers, contenders = before.answers, before.contenders
    else:
        answers = {route.name: _reason(route, shapes) for route in ROUTES.values()}
        measured = [constants.of("graph" if each.captured else "eager", each.group) for each in shapes]
        contenders = {
            name: tuple(routes[name] for routes in measured)
            for name, reason in answers.items()
            if reason is None and all(name in routes for routes in measured)
        }
    seconds = {
        route: predicted
        for route, of_route in contenders.items()
        if (predicted := _seconds(ROUTES[route], shapes, of_route)) is not None
    }
    fastest = min(seconds, key=seconds.__getitem__, default="sdpa")
    if last in seconds and seconds[fastest] > seconds[last] * (1 - HYSTERESIS):
        fastest = last
    taken = fastest if name == "auto" else name
    decision = Decision(ROUTES[taken], shape, constants, answers, contenders, seconds, others)
    if answers[taken] is not None:
        reasons = "; ".join(f"{route}: {reason}" for route, reason in decision.rejected.items())
        raise RouteError(f"route={name!r} cannot serve this step ({reasons}). Use route='auto' or {fastest!r}.")
    return decision


def _reason(route: Route, shapes: tuple[StepShape, ...]) -> str | None:
    answers = map(route.supports, shapes)
    return next((answer.reason for answer in answers if isinstance(answer, Rejected)), None)


def _seconds(route: Route, shapes: tuple[StepShape, ...], constants: tuple[RouteConstants, ...]) -> float | None:
    """What a route is predicted to take a layer, over layers of all kinds; None where it has no prediction."""
    layers, seconds = sum(shape.layers for shape in shapes), 0.0
    for shape, of_shape in zip(shapes, constants):
        work = route.work(shape)
        if work is None:
            return None
        seconds += predict(work, of_shape, layers) * (shape.layers / layers)
    return seconds
