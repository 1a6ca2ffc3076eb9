"""Decode steps of transformers' linear-attention modules by our kernels: gated delta nets, Mamba 2, short convolutions.

A module is recognised by what it is made of: submodules, parameters, buffers, and the numbers that it keeps. Nothing
else that its forward may do is seen, so that a mixer is to be believed where `agrees` (mixer_check.py) says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.activations import SiLUActivation

from pkv_hf.cache.linear import LinearLayer
from pkv_hf.patches.projections.base import Normed
from pkv_hf.patches.projections.registry import Kinds

SILU = (nn.SiLU, SiLUActivation)


@dataclass(frozen=True)
class Mixer:
    """One step of a module, described; equal mixers of other modules take the same step with other weights."""

    module: Any = field(compare=False, repr=False)
    kinds: Kinds = field(default_factory=Kinds, compare=False, repr=False, kw_only=True)

    def step(self, x: torch.Tensor, layer: LinearLayer) -> torch.Tensor:
        """What the module returns for one token after others: x and the result `[rows, 1, hidden]`.

        Updates the states of `layer` where they are, which have to be those of a cache that records no past. Raises
        ValueError for states or dtypes that the kernels cannot take.
        """
        raise NotImplementedError

    def product(self, x: torch.Tensor, *modules: Any) -> torch.Tensor:
        """x `[rows, inputs]` by one linear layer, or by three side by side, `[rows, sum of outputs]`."""
        return self.kinds(modules, x).linear(Normed(x))


class GatedNorm(NamedTuple):
    """RMSNorms of `size` elements each, with a gate before or after; as `gated_norm` takes them."""

    weight: str
    """The submodule whose weight it is; empty for the gate alone."""
    eps: float
    size: int
    gate_first: bool

    def __call__(self, module: Any, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        from pkv_hf.kernels.states.norm import gated_norm

        weight = getattr(module, self.weight).weight if self.weight else None
        return gated_norm(x, gate, weight, self.eps, size=self.size, gate_first=self.gate_first)


@dataclass(frozen=True)
class DeltaNet(Mixer):
    """A gated delta net (Qwen3-Next, Qwen3.5, OLMo hybrid)."""

    key_heads: int
    heads: int
    key_dim: int
    """Of a head, as value_dim."""
    value_dim: int
    beta: float
    projections: str
    """"z" (q, k and v in one), "qkvz" (by key head), or "g" (each by itself): how the module is cut."""
    norm: GatedNorm

    def step(self, x: torch.Tensor, layer: LinearLayer) -> torch.Tensor:
        from pkv_hf.kernels.states.delta import delta_rule

        module, paired = self.module, self.projections == "qkvz"
        qkv, gate, a, b = self._projected(x.view(len(x), -1))
        qkv = _convolved(qkv, module.conv1d, layer, silu=True)
        state = layer.recurrent_states[0]
        settings: dict[str, Any] = {"key_heads": self.key_heads, "beta": self.beta, "paired": paired}
        out = delta_rule(qkv, a, b, module.A_log, module.dt_bias, state, **settings)  # type: ignore[arg-type]
        out = self.norm(module, out, gate)
        return self.product(out, module.o_proj if self.projections == "g" else module.out_proj)[:, None]

    def _projected(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v side by side, the gate in parts, a and b, as the kernels take them."""
        module, values = self.module, self.heads * self.value_dim
        if self.projections == "z":
            together = self.product(x, module.in_proj_qkv, module.in_proj_z, module.in_proj_b)
            qkv, gate, b = together.split([together.shape[1] - values - self.heads, values, self.heads], dim=1)
            return qkv, gate[:, None], self.product(x, module.in_proj_a), b
        if self.projections == "g":
            qkv = self.product(x, module.q_proj, module.k_proj, module.v_proj)
            gate, b, a = self.product(x, module.g_proj, module.b_proj, module.a_proj).split(
                [values, self.heads, self.heads], dim=1
            )
            return qkv, gate[:, None], a, b
        repeats = self.heads // self.key_heads
        each = [self.key_dim, self.key_dim, repeats * self.value_dim, repeats * self.value_dim]
        heads = self.product(x, module.in_proj_qkvz).view(len(x), self.key_heads, sum(each))
        *qkv, gate = heads.split(each, dim=2)
        ba = self.product(x, module.in_proj_ba)
        flat = torch.cat([part.reshape(len(x), -1) for part in qkv], dim=1)
        return flat, gate, ba[:, repeats:], ba[:, : 2 * self.heads - repeats]


@dataclass(frozen=True)
class Mamba2(Mixer):
    """A Mamba 2 mixer (Granite 4, Bamba, Nemotron-H, Falcon-H1)."""

    heads: int
    head_dim: int
    groups: int
    state_size: int
    multiplier: float | None
    """Of what comes in, where there is one; the projection is then multiplied by the module's `mup_vector`."""
    norm: GatedNorm

    def step(self, x: torch.Tensor, layer: LinearLayer) -> torch.Tensor:
        from pkv_hf.kernels.states.ssm import state_space

        module, flat = self.module, x.view(len(x), -1)
        if self.multiplier is not None:
            projected = self.product(flat * self.multiplier, module.in_proj) * module.mup_vector.view(1, -1)
        else:
            projected = self.product(flat, module.in_proj)
        inner, shared = self.heads * self.head_dim, 2 * self.groups * self.state_size
        gate, xbc, dt = projected.split([inner, inner + shared, self.heads], dim=1)
        xbc = _convolved(xbc, module.conv1d, layer, silu=True)
        state: Any = layer.recurrent_states[0]
        out = state_space(xbc, dt, module.A_log, module.dt_bias, module.D, state, groups=self.groups)
        return self.product(self.norm(module, out, gate[:, None]).to(x.dtype), module.out_proj)[:, None]


@dataclass(frozen=True)
class ShortConvolution(Mixer):
    """A gated convolution (LFM2)."""

    def step(self, x: torch.Tensor, layer: LinearLayer) -> torch.Tensor:
        projected = self.product(x.view(len(x), -1), self.module.in_proj)
        return self.product(_convolved(projected, self.module.conv, layer, gated=True), self.module.out_proj)[:, None]


def _convolved(x: torch.Tensor, conv: nn.Conv1d, layer: LinearLayer, **kind: bool) -> torch.Tensor:
    from pkv_hf.kernels.states.convolution import convolution

    state: Any = layer.conv_states[0]
    return convolution(x, state, conv.weight[:, 0], conv.bias, **kind)


def read(module: nn.Module) -> Mixer | None:
    """The step of a linear-attention module, None where the module is made of anything else than is known."""
    if any("forward" in vars(part) for part in module.modules()):  # somebody's own
        return None
    made = _Made.of(module)
    return _delta_net(module, made) or _mamba(module, made) or _short_convolution(module, made)


class _Made(NamedTuple):
    """What a module is made of, by name."""

    modules: frozenset[str]
    parameters: frozenset[str]
    buffers: frozenset[str]

    @classmethod
    def of(cls, module: nn.Module) -> _Made:
        return cls(*(frozenset(held) for held in (module._modules, module._parameters, module._buffers)))


PROJECTIONS = {
    "z": ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "norm", "out_proj"),
    "qkvz": ("in_proj_qkvz", "in_proj_ba", "norm", "out_proj"),
    "g": ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj", "o_norm", "o_proj"),
}
"""The submodules of gated delta nets, beside their convolution."""


def _delta_net(module: Any, made: _Made) -> DeltaNet | None:
    kinds = [kind for kind, names in PROJECTIONS.items() if made.modules == {"conv1d", *names}]
    numbers = [getattr(module, name, 0) for name in ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")]
    if not kinds or made.parameters != {"A_log", "dt_bias"} or made.buffers or not _counts(numbers):
        return None
    key_heads, heads, key_dim, value_dim = numbers
    norm = _gated_norm(module, "o_norm" if kinds[0] == "g" else "norm", value_dim, gate_first=False)
    if (
        heads % key_heads
        or norm is None
        or not _is_silu(getattr(module, "activation", None))
        or not _is_causal(module.conv1d, 2 * key_heads * key_dim + heads * value_dim)
    ):
        return None
    beta = 2.0 if getattr(module, "allow_neg_eigval", False) else 1.0
    return DeltaNet(module, key_heads, heads, key_dim, value_dim, beta, kinds[0], norm)


def _mamba(module: Any, made: _Made) -> Mamba2 | None:
    numbers = [getattr(module, name, 0) for name in ("num_heads", "head_dim", "n_groups", "ssm_state_size")]
    if (
        made.modules - {"act"} != {"conv1d", "in_proj", "norm", "out_proj"}
        or made.parameters != {"A_log", "D", "dt_bias"}
        or made.buffers not in (frozenset(), {"mup_vector"})
        or not _counts(numbers)
    ):
        return None
    heads, head_dim, groups, state_size = numbers
    inner = heads * head_dim
    if isinstance(module.norm, nn.Identity):
        norm: GatedNorm | None = GatedNorm("", 0.0, head_dim, True)
    else:
        norm = _gated_norm(module, "norm", inner, gate_first=True)
    if (
        heads % groups
        or norm is None
        or not _is_silu(getattr(module, "activation", None))
        or not _is_causal(module.conv1d, inner + 2 * groups * state_size)
    ):
        return None
    multiplier = float(module.ssm_in_multiplier) if made.buffers else None
    return Mamba2(module, heads, head_dim, groups, state_size, multiplier, norm)


def _short_convolution(module: Any, made: _Made) -> ShortConvolution | None:
    if made.modules != {"conv", "in_proj", "out_proj"} or made.parameters or made.buffers:
        return None
    return ShortConvolution(module) if _is_causal(module.conv, getattr(module.conv, "in_channels", 0)) else None


def _counts(numbers: list[Any]) -> bool:
    return all(type(number) is int and number > 0 for number in numbers)


def _is_silu(activation: Any) -> bool:
    return activation in ("silu", "swish") or type(activation) in SILU


def _is_causal(conv: Any, channels: int) -> bool:
    """Whether a module is a plain convolution of every channel by itself."""
    return (
        type(conv) is nn.Conv1d
        and type(conv.weight) is nn.Parameter
        and conv.in_channels == conv.out_channels == conv.groups == channels
        and conv.weight.is_contiguous()
        and (conv.stride, conv.dilation, conv.padding_mode) == ((1,), (1,), "zeros")
    )


def _gated_norm(module: Any, name: str, width: int, gate_first: bool) -> GatedNorm | None:
    """A submodule that norms `width` elements, in groups where it names any."""
    norm = getattr(module, name)
    made, eps = _Made.of(norm), getattr(norm, "variance_epsilon", None)
    groups = getattr(norm, "n_groups", 1)
    size = getattr(norm, "group_size", width // groups if _counts([groups]) else 0)
    if (
        made != (frozenset(), {"weight"}, frozenset())
        or not isinstance(eps, float)
        or norm.weight.shape != (width,)
        or not _counts([size])
        or width % size
        or not _is_silu(getattr(norm, "activation", "silu"))
    ):
        return None
    return GatedNorm(name, eps, size, not getattr(norm, "norm_before_gate", not gate_first))
