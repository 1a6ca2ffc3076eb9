"""The angles that a decoder turns queries and keys by: in one launch, in the steps that fuse layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from pkv_hf.compat import dynamic_rope, logger
from pkv_hf.patches.judged import excess
from pkv_hf.replaced import original
from pkv_hf.runtime.step import current_step

BUFFER = "inv_freq"
"""What transformers calls frequencies, after the kind of layers that they are for, where there are several."""

FORMS = ("once", "halves", "pairs")
"""A cosine for each frequency once, all of them twice, or each of them twice in a row."""


class Angles(NamedTuple):
    """cos and sin of position * frequency, times a factor."""

    frequencies: torch.Tensor
    """`[frequencies]`, as the module has them."""
    factor: float
    form: str
    """One of `FORMS`."""
    wide: bool
    """Whether they are float32 for hidden states of half precision too."""

    def __call__(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin `[B, q_len, width]` of positions `[B, q_len]`, in x's dtype unless they are `wide`."""
        from pkv_hf.kernels.queries import angles

        dtype = torch.float32 if self.wide else x.dtype
        return angles(positions, self.frequencies, self.factor, self.form, dtype)


def angle_modules(decoder: nn.Module) -> list[nn.Module]:
    """The decoder's own modules that hold frequencies alone."""
    return [child for child in decoder.children() if not list(child.parameters()) and _kinds(child)]


def _kinds(module: nn.Module) -> list[str]:
    """The kinds of layers that a module has frequencies for; an empty one where they are for all."""
    names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.ndim == 1]
    return [name[: -len(BUFFER)].rstrip("_") for name in names if name.endswith(BUFFER) and "original" not in name]


def angles_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of such a module's `forward`: by the kernel in the steps that fuse layers."""
    step: Any = None if torch.compiler.is_compiling() else current_step()
    found = None if step is None else step.fusion.angles.get(self)
    if found is not None:
        given = dict(zip(("x", "position_ids", "layer_type"), args), **kwargs)
        angles = found.get(given.pop("layer_type", ""))
        if angles is not None and given.keys() == {"x", "position_ids"} and given["position_ids"].ndim == 2:
            return angles(given["x"], given["position_ids"])
    return original(self, "forward")(*args, **kwargs)


def fused_angles(decoder: Any) -> dict[nn.Module, dict[str, Angles]]:
    """The angles of a decoder that our kernel computes as its own code does, by the kinds of layers."""
    found: dict[nn.Module, dict[str, Angles]] = {}
    if dynamic_rope(decoder):
        return found
    parameter = next(decoder.parameters())
    x = torch.empty(1, 1, 1, dtype=parameter.dtype, device=parameter.device)
    longest: Any = getattr(decoder.config, "max_position_embeddings", None) or 1 << 12
    positions = torch.randint(longest, (2, 32), device="cpu", generator=_generator).to(x.device)
    for module in angle_modules(decoder):
        for kind in _kinds(module):
            try:
                angles = _read(module, kind, x, positions)
            except Exception as error:  # of a module that is called otherwise, of a kernel, for memory
                logger.debug("pkv_hf: a %s runs as it is: %s", type(module).__name__, error)
                continue
            if angles is not None:
                found.setdefault(module, {})[kind] = angles
    return found


_generator = torch.Generator()  # of our own: the caller's random numbers are left where they were


def _read(module: Any, kind: str, x: torch.Tensor, positions: torch.Tensor) -> Angles | None:
    """A module's angles for a kind of layers; None for others than ours."""
    prefix = f"{kind}_" if kind else ""
    frequencies, factor = getattr(module, prefix + BUFFER), getattr(module, f"{prefix}attention_scaling", 1.0)
    if type(factor) not in (int, float):
        return None
    forward, kinds = original(module, "forward"), [kind] * bool(kind)
    own, exact = forward(x, positions, *kinds), forward(x.float(), positions, *kinds)
    for form in FORMS:
        angles = Angles(frequencies, float(factor), form, own[0].dtype != x.dtype)
        ours = angles(x, positions)
        if ours[0].shape == own[0].shape and all(map(_agree, ours, own, exact)):
            return angles
    return None


def _agree(ours: torch.Tensor, own: torch.Tensor, exact: torch.Tensor) -> bool:
    wide = exact.double()
    errors = (float((found.double() - wide).square().mean().sqrt()) for found in (ours, own))
    return ours.dtype == own.dtype and excess(*errors, float(wide.square().mean().sqrt())) <= 1
