"""Routers of mixtures in the steps on static buffers: one product, and one launch that chooses experts by it.

A router is a module beside experts with a weight of as many rows. What it makes of logits is what gives the numbers of
its own code in float32, with its vectors drawn anew: scores, a correction, groups, whether weights are normalised.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from pkv_hf.compat import logger
from pkv_hf.kernels.experts import reference
from pkv_hf.kernels.experts.reference import Routing
from pkv_hf.patches.experts.described import CLOSE, DOWN, holds_experts
from pkv_hf.patches.judged import excess
from pkv_hf.patches.reading import alike, drawn, twin_of
from pkv_hf.replaced import original
from pkv_hf.runtime.step import current_step, launching_on

ROWS = 24
"""Of random hidden states that routers are compared on."""

SPREAD = 2.0
"""The root mean square of their logits."""

GIVEN = "given"
"""In the place of a correction's name: the router is given it (MiniMax M2)."""


class Router(NamedTuple):
    """What a router returns: logits, weights and index in some order."""

    routing: Routing
    order: tuple[int, int, int]
    """The places of logits, weights and index."""
    bias: str
    """The product's, by its name in the module; empty for none."""
    correction: str
    """A tensor of the module by its full name, GIVEN, or empty."""
    flattens: bool
    """Whether what it returns of `[B, tokens, hidden]` is of rows."""
    wide: bool = False
    """Whether the product is of float32, whatever the hidden states are."""
    logits_dtype: torch.dtype = torch.float32
    weights_dtype: torch.dtype = torch.float32


def routers_of(decoder: nn.Module) -> Iterator[tuple[Any, torch.dtype]]:
    """The modules of a decoder that may be routers, and the dtype of the experts beside each: routers of many models
    are float32 whatever the model is."""
    for parent in decoder.modules():
        beside = {
            len(down): down.dtype
            for held in parent.children()
            if holds_experts(held) and (down := held._parameters.get(DOWN)) is not None
        }
        for child in parent.children() if beside else ():
            weight = child._parameters.get("weight")
            if weight is not None and weight.ndim == 2 and len(weight) in beside:
                yield child, beside[len(weight)]


def router_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of a router's `forward`: by the kernels for the rows of a step that has it among its own."""
    step: Any = None if torch.compiler.is_compiling() else current_step()
    routers = {} if step is None else step.fusion.mixtures.routers
    if self not in routers:
        return original(self, "forward")(*args, **kwargs)
    from pkv_hf.kernels.experts.experts import most_rows

    taken = not kwargs and _taken(self, routers[self], args)
    if not taken:  # it will be called so again
        del routers[self]
    if not taken or not 1 <= args[0].numel() // args[0].shape[-1] <= most_rows(args[0].device):
        return original(self, "forward")(*args, **kwargs)
    return routed(self, routers[self], *args)


def _taken(module: Any, router: Router, args: tuple[Any, ...]) -> bool:
    """Whether a call is of a kind that the kernels take."""
    if len(args) != 1 + (router.correction == GIVEN) or not all(isinstance(each, torch.Tensor) for each in args):
        return False
    x = args[0]
    return x.shape[-1] == module.weight.shape[1] and (x.ndim == 2 or router.flattens)


def routed(module: Any, router: Router, x: torch.Tensor, given: torch.Tensor | None = None) -> tuple[Any, ...]:
    """What a router returns for hidden states `[..., hidden]`."""
    from pkv_hf.kernels.experts.routing import route

    correction = given if router.correction == GIVEN else _named(module, router.correction)
    logits = product(module, router, x.reshape(-1, x.shape[-1]))
    flat = None if correction is None else correction.reshape(-1)
    weights, index = route(logits, router.routing, flat, router.weights_dtype)
    made = dict(zip(router.order, (logits.to(router.logits_dtype), weights, index)))
    return tuple(made[place] for place in range(3))


def product(module: Any, router: Router, x: torch.Tensor) -> torch.Tensor:
    """A router's logits of x `[rows, hidden]`, in the dtype that it computes them in."""
    from pkv_hf.kernels.linear import DTYPES, linear, outruns_cublas

    weight, bias = module.weight, _named(module, router.bias)
    if router.wide:
        return functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    if x.dtype in DTYPES and weight.dtype == x.dtype and weight.is_contiguous() and outruns_cublas(x, len(weight)):
        return linear(x.contiguous(), [weight], [bias])
    return functional.linear(x, weight, bias)


def _named(module: Any, name: str) -> Any:
    place, _, own = name.rpartition(".")
    return getattr(module.get_submodule(place), own) if name else None


class BelievedRouters:
    """What is known of the routers of one patched model, by modules that are alike."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Router | None] = {}

    def __call__(self, decoder: nn.Module) -> dict[nn.Module, Router]:
        """The routers of a decoder on its device that the kernels run; others run their own forward."""
        found = {}
        for module, dtype in routers_of(decoder):
            key = alike(module), dtype
            if key not in self._known:
                self._known[key] = _believed(module, dtype)
            if (router := self._known[key]) is not None:
                found[module] = router
        return found


def _believed(module: Any, dtype: torch.dtype) -> Router | None:
    try:
        router = read(module)
        if router is not None:
            with launching_on(module.weight.device):
                router = _of_dtype(module, router, dtype)
    except Exception as error:  # of a module that is no router, of a kernel, for memory
        logger.debug("pkv_hf: a %s runs as it is: %s", type(module).__name__, error)
        return None
    return router


def read(module: Any) -> Router | None:
    """What a router does, by a float32 copy of it whose vectors are drawn; None where that is not known."""
    twin: Any = twin_of(module)
    experts, vectors = len(twin.weight), _vectors(twin)
    for vector in vectors.values():
        vector.add_(drawn(*vector.shape, like=vector))
    x, given = _hidden(twin, torch.float32), drawn(experts, like=twin.weight)
    arguments: tuple[torch.Tensor, ...] = ()
    try:
        returned, call = twin(x), ""
    except TypeError:  # it is given its correction
        returned, call, arguments = twin(x, given), GIVEN, (given,)
    biases = {name: vector for name, vector in vectors.items() if vector.shape == (experts,) and "." not in name}
    for bias in ("", *biases):
        logits = functional.linear(x, twin.weight, biases.get(bias))
        order = _order(returned, logits)
        if order is None:
            continue
        _, weights, index = (returned[place] for place in order)
        corrections: dict[str, Any] = {call: given if call else None}
        corrections |= {name: vector.reshape(-1) for name, vector in vectors.items() if name != bias}
        for correction, routing in itertools.product(corrections, _ways(twin, index.shape[1], experts)):
            of = routing._replace(corrected=bool(correction))
            ours = _dense(logits, *reference.route(logits, of, corrections[correction]))
            if _off(ours, _dense(logits, weights, index)) <= CLOSE:
                flat = twin(x[None], *arguments)[order[2]].ndim == 2
                return Router(of, order, bias, correction, flat)
    return None


def _vectors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a router beside its weight, which have an element for each expert."""
    held = dict(itertools.chain(module.named_parameters(), module.named_buffers()))
    weight = held.pop("weight")
    if any(tensor.numel() != len(weight) for tensor in held.values()):
        raise ValueError("it has more weights than one, or other vectors")
    return held


def _hidden(module: Any, dtype: torch.dtype) -> torch.Tensor:
    """Random hidden states with logits of a root mean square."""
    x = drawn(ROWS, module.weight.shape[1], like=module.weight).float()
    logits = functional.linear(x, module.weight.float())
    return (x * SPREAD / logits.square().mean().sqrt()).to(dtype)


def _order(returned: Any, logits: torch.Tensor) -> tuple[int, int, int] | None:
    """Where logits, weights and index are in what a router returned; None where they are not all that it returned."""
    if not isinstance(returned, tuple) or len(returned) != 3:
        return None
    for order in itertools.permutations(range(3)):
        found, weights, index = (returned[place] for place in order)
        if (
            index.dtype == torch.int64
            and index.ndim == 2
            and weights.is_floating_point()
            and weights.shape == index.shape
            and found.shape == logits.shape
            and _off(found.float(), logits) <= CLOSE
        ):
            return order[0], order[1], order[2]
    return None


def _ways(module: Any, choices: int, experts: int) -> list[Routing]:
    """Routings that a module with these settings may have."""
    values = vars(module).values()
    scales = (1.0, *(float(value) for value in values if type(value) in (int, float) and value > 0))
    counts = sorted({value for value in values if type(value) is int and 0 < value <= experts // 2})
    groups = [(1, 1), *((of, kept) for of in counts for kept in counts if of > 1 and kept < of)]
    shape = itertools.product(reference.SCORES, (False, True), dict.fromkeys(scales), groups)
    return [
        Routing(choices, scores, False, normalised, scale, *of_groups)
        for scores, normalised, scale, of_groups in shape
        if experts % of_groups[0] == 0
    ]


def _dense(logits: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Weights at their experts, `[rows, experts]`, whatever their order."""
    return torch.zeros_like(logits, dtype=torch.float32).scatter_add_(1, index, weights.float())


def _off(ours: torch.Tensor, own: torch.Tensor) -> float:
    return float((ours - own).square().mean().sqrt() / own.square().mean().sqrt())


def _of_dtype(module: Any, router: Router, dtype: torch.dtype) -> Router | None:
    """A router with the dtypes that its module returns for hidden states of a dtype; None where the kernels differ from
    what it returns."""
    x, given = _hidden(module, dtype), drawn(len(module.weight), like=module.weight)
    arguments = (given,) if router.correction == GIVEN else ()
    own = original(module, "forward")(x, *arguments)
    logits, weights, index = (own[place] for place in router.order)
    narrow = x.dtype == torch.float32 or torch.equal(logits.to(x.dtype).float(), logits.float())
    router = router._replace(wide=not narrow, logits_dtype=logits.dtype, weights_dtype=weights.dtype)
    exact = functional.linear(x.double(), module.weight.double())
    if (bias := _named(module, router.bias)) is not None:
        exact += bias.double()
    errors = [float((each.double() - exact).square().mean().sqrt()) for each in (product(module, router, x), logits)]
    if not excess(*errors, float(exact.square().mean().sqrt())) <= 1:
        return None
    from pkv_hf.kernels.experts.routing import route

    correction = given if arguments else _named(module, router.correction)
    flat = None if correction is None else correction.reshape(-1)
    chosen = route(logits.contiguous(), router.routing, flat, weights.dtype)
    differ = (_dense(logits, *chosen) - _dense(logits, weights, index)).abs().amax(1)
    right = differ <= 4 * torch.finfo(weights.dtype).eps * weights.float().abs().amax(1)
    # Of equal logits torch's own top-k may take any.
    alike = [logits.gather(1, of).sort(1)[0] for of in (chosen[1], index)]
    return router if bool((right | (alike[0] == alike[1]).all(1)).all()) and bool(right.any()) else None
