"""Which experts rows choose, by their logits, in one launch: scores, groups, the largest ones and their weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pkv_hf.kernels.experts import reference
from pkv_hf.kernels.experts.reference import SCORES, Routing
from pkv_hf.kernels.launch import DTYPES, Remembered, described, next_power_of_2
from pkv_hf.kernels.launcher import Launcher
from pkv_hf.kernels.pdl import options, overlaps, release, wait

MOST_EXPERTS = 1024
"""A program holds a row's."""

LEAST_SUM = tl.constexpr(reference.LEAST_SUM)


@triton.jit(do_not_specialize=["experts", "scale"])
def route_kernel(logits_ptr, correction_ptr, weights_ptr, index_ptr, experts, scale,
                 SCORES: tl.constexpr, CORRECTED: tl.constexpr, NORMALISED: tl.constexpr, GROUPS: tl.constexpr,
                 KEPT: tl.constexpr, CHOICES: tl.constexpr, BLOCK_CHOICES: tl.constexpr, BLOCK: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """`reference.route` of one row, in float32. NaN is the largest score; no number but an expert's is chosen."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    inside = expert < experts
    none = float("-inf")
    correction = tl.zeros([BLOCK], tl.float32)
    if CORRECTED:
        correction = tl.load(correction_ptr + expert, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    release(PDL)
    scores = tl.load(logits_ptr + row * experts + expert, mask=inside, other=none).to(tl.float32)
    if SCORES == "softmax":
        scores = tl.exp(scores - tl.max(scores, 0))
        scores /= tl.sum(scores, 0)
    else:
        scores = 1.0 / (1.0 + tl.exp(-scores))
    ranked = scores + correction
    ranked = tl.where(ranked != ranked, float("inf"), ranked)
    ranked = tl.where(inside, ranked, none)
    if GROUPS > 1:
        in_groups = tl.reshape(ranked, [GROUPS, BLOCK // GROUPS])
        largest, at = tl.max(in_groups, 1, return_indices=True)
        others = tl.where(tl.arange(0, BLOCK // GROUPS)[None, :] == at[:, None], none, in_groups)
        sums = largest + tl.max(others, 1)
        group = tl.arange(0, GROUPS)
        kept = group < 0
        for _ in tl.static_range(KEPT):
            _, best = tl.max(sums, 0, return_indices=True)
            kept = kept | (group == best)
            sums = tl.where(group == best, none, sums)
        ranked = tl.reshape(tl.where(kept[:, None], in_groups, none), [BLOCK])
    choice = tl.arange(0, BLOCK_CHOICES)
    weights = tl.zeros([BLOCK_CHOICES], tl.float32)
    index = tl.zeros([BLOCK_CHOICES], tl.int32)
    for i in tl.static_range(CHOICES):
        _, best = tl.max(ranked, 0, return_indices=True)
        index = tl.where(choice == i, best, index)
        weights = tl.where(choice == i, tl.sum(tl.where(expert == best, scores, 0.0), 0), weights)
        ranked = tl.where(expert == best, none, ranked)
    if NORMALISED:
        weights /= tl.sum(weights, 0) + LEAST_SUM
    at = row * CHOICES + choice
    tl.store(weights_ptr + at, (weights * scale).to(weights_ptr.dtype.element_ty), mask=choice < CHOICES)
    tl.store(index_ptr + at, index.to(tl.int64), mask=choice < CHOICES)


_route = Launcher(route_kernel, fp_fusion=True)
_checked: Remembered[None] = Remembered()


def check_routing(experts: int, of: Routing) -> None:
    """Raises ValueError, naming the field, for a choice among so many experts that the kernel does not make."""
    if not 1 <= of.choices <= experts <= MOST_EXPERTS:
        raise ValueError(f"choices={of.choices} of {experts} experts: want 1 to {MOST_EXPERTS} experts, fewer choices")
    if of.scores not in SCORES:
        raise ValueError(f"scores={of.scores!r} is not one of {', '.join(SCORES)}")
    powers = of.groups & (of.groups - 1) == 0 == experts & (experts - 1)
    if of.groups != 1 and not (powers and 1 <= of.kept <= of.groups and 2 * of.groups <= experts):
        raise ValueError(f"groups={of.groups}, kept={of.kept} of {experts} experts: want powers of two, two a group")


def route(
    logits: torch.Tensor, of: Routing, correction: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and index `[rows, choices]` of the experts that rows choose by logits `[rows, experts]`.

    Logits are fp16, bf16 or fp32; weights are in `dtype`, by itself the logits'; index is int64. The correction is
    `[experts]`, floating; it and what it is added to are float32. Of equal scores the first is taken, as torch's top-k
    does on a GPU.

    Raises ValueError for arguments that the kernel cannot take.
    """
    rows, experts = logits.shape
    key = (*described(logits, correction), of, dtype)
    if key not in _checked:
        check_routing(experts, of)
        if logits.dtype not in DTYPES or not logits.is_contiguous():
            raise ValueError(
                f"logits are {logits.dtype} {list(logits.shape)}: want them contiguous, fp16, bf16 or fp32"
            )
        if (correction is not None) != of.corrected:
            raise ValueError(
                f"correction is {'given' if correction is not None else 'missing'}: want it as the form says"
            )
        if correction is not None and (correction.shape != (experts,) or not correction.is_contiguous()):
            raise ValueError(f"correction is {list(correction.shape)}: want contiguous [{experts}]")
        _checked[key] = None
    device = logits.device
    weights = torch.empty((rows, of.choices), dtype=dtype or logits.dtype, device=device)
    index = torch.empty((rows, of.choices), dtype=torch.int64, device=device)
    constants = (
        of.scores, of.corrected, of.normalised, of.groups, of.kept, of.choices, next_power_of_2(of.choices),
        next_power_of_2(experts), overlaps(device),
    )  # fmt: skip
    _route(
        (logits.dtype, weights.dtype, None if correction is None else correction.dtype, device, constants),
        (rows, 1, 1), (logits, logits if correction is None else correction, weights, index),
        (experts, of.scale), constants, num_warps=1, **options(device),
    )  # fmt: skip
    return weights, index
