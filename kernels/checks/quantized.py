"""Random cases for products with weights of 4 bits, and their errors beside those of torch's own computation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from pkv_hf.kernels import reference
from pkv_hf.kernels.checks.adapters import drawn_adapters, drawn_dtype, drawn_ranks, with_adapters
from pkv_hf.kernels.checks.attention import log_uniform, poisoned_scratch
from pkv_hf.kernels.checks.layers import ACTIVATIONS, EPS, MULTIPLIERS, OFFSETS, Draw, Result, beside, varied
from pkv_hf.kernels.products import adapters
from pkv_hf.kernels.products.blocks import MAX_ROWS
from pkv_hf.kernels.quantized import linear4
from pkv_hf.kernels.quantized.blocks import FORMS, Block4
from pkv_hf.kernels.quantized.codes import EVEN, LOOKED_UP
from pkv_hf.kernels.quantized.weights import (
    LAYOUTS,
    NESTED,
    PADDED,
    SCALES,
    AnyWeight4,
    Int4,
    Nested,
    Weight4,
    dequantized,
)  # fmt: skip

UNPAIRED = [scaled for scaled in SCALES[2:] if scaled != "pairs"]


@dataclass(frozen=True)
class Linear4Case:
    """A product of x `[rows, inputs]` with one weight of 4 bits or three, or with gate and up where `gated`."""

    dtype: torch.dtype
    rows: int
    outputs: tuple[int, ...]
    gated: bool
    bias: bool
    norm: bool
    residual: bool
    quant_type: str
    packing: str
    """One of `weights.LAYOUTS`."""
    scaled: str
    """One of `weights.SCALES`."""
    block: int
    form: str | None = None
    """How the launch is cut, one of `blocks.FORMS`; None for how it is by itself."""
    parts: int = 1
    activation: str | None = None
    offset: float = 0.0
    multiplier: float = 1.0
    lora_dtype: torch.dtype | None = None
    """Of adapters; None for none."""
    ranks: tuple[tuple[int, ...], ...] = ()
    """Of each weight's adapters."""
    inputs: int = 0
    scale: float = 1.0
    eps: float = EPS[0]
    aligned: bool = True
    seed: int = 0

    @classmethod
    def random(cls, rng: np.random.Generator, dtype: torch.dtype) -> Linear4Case:
        """What is compiled for a case of the supported space; `vary` draws its sizes."""
        one_row, gated = rng.random() < 0.5, rng.random() < 0.3
        weights = 2 if gated else int(rng.choice([1, 3]))
        residual = bool(weights == 1 and rng.random() < 0.5)
        active = gated or (weights == 1 and not residual and rng.random() < 0.6)
        layout = str(rng.choice(LAYOUTS))
        forms = [None, *FORMS[: 2 + one_row + (one_row and layout == "bytes")]]
        form = forms[int(rng.integers(len(forms)))]
        if layout == "bytes":
            code, scaled = rng.choice([*LOOKED_UP]), rng.choice(SCALES[:2])
        else:
            code, scaled = rng.choice([*EVEN]), "pairs" if layout == "tiles" else rng.choice(UNPAIRED)
        norm = bool(one_row and rng.random() < 0.6 and not (form in FORMS[:2] and dtype == torch.float16))
        return cls(
            dtype,
            rows=1 if one_row else 2,
            outputs=(0,) * weights,
            gated=gated,
            bias=bool(rng.random() < 0.5),
            norm=norm,
            residual=residual,
            quant_type=str(code),
            packing=layout,
            scaled=str(scaled),
            block=int(rng.choice([64, 64, 128] if layout == "bytes" else [32, 64, 128])),
            form=form,
            parts=1 if one_row or form is None else int(rng.choice([1, 3])),
            activation=str(rng.choice(ACTIVATIONS)) if active else None,
            offset=float(rng.choice(OFFSETS)),
            multiplier=float(rng.choice(MULTIPLIERS)) if residual else 1.0,
            lora_dtype=drawn_dtype(rng),
        )

    def vary(self, rng: np.random.Generator, longest: int) -> Linear4Case:
        outputs = tuple(7 + log_uniform(rng, longest) for _ in self.outputs)
        if self.scaled.startswith("zeros"):  # eight a word
            outputs = tuple(-(-count // 8) * 8 for count in outputs)
        return dataclasses.replace(
            self,
            rows=1 if self.rows == 1 else int(rng.integers(2, MAX_ROWS + 1)),
            inputs=self.block * log_uniform(rng, max(1, longest // self.block)),
            outputs=outputs[:1] * 2 if self.gated else outputs,
            ranks=drawn_ranks(rng, len(outputs)) if self.lora_dtype else (),
            **varied(rng),
        )

    def weight(self, draw: Draw, outputs: int) -> AnyWeight4:
        """A drawn weight of the case."""
        if self.packing == "bytes":
            return drawn_weight(draw, outputs, self.inputs, self.block, self.quant_type, self.scaled == "nested")
        return drawn_int4(draw, outputs, self.inputs, self.block, self.quant_type, self.packing, self.scaled)

    @property
    def cut(self) -> Block4 | None:
        """The block of a form: small, so that sizes are of several."""
        if self.form is None:
            return None
        if self.form in ("sums", "threads"):
            return Block4(16, 256, 1, self.form)
        of_inputs = 128 if self.rows > 8 or self.form == "weights" else 256
        return Block4(16, of_inputs, 2, self.form, parts=self.parts)


def drawn_weight(draw: Draw, outputs: int, inputs: int, block: int, quant_type: str, nested: bool) -> Weight4:
    """A weight of random bits, and scales that make results about as large as inputs."""
    generator, device = draw.generator, draw.generator.device
    blocks, scale = outputs * inputs // block, inputs**-0.5
    packed = torch.randint(256, (outputs * inputs // 2,), generator=generator, device=device, dtype=torch.uint8)
    if not nested:
        absmax = draw(blocks, scale=scale, dtype=torch.float32)
        return Weight4(packed, absmax.abs_().add_(scale), outputs, inputs, block, quant_type)
    of_scales = torch.randint(256, (blocks,), generator=generator, device=device, dtype=torch.uint8)
    code = draw(256, dtype=torch.float32)
    absmax = draw(-(-blocks // NESTED), scale=scale, dtype=torch.float32)
    offset = draw(1, scale=scale, dtype=torch.float32)[0]
    return Weight4(packed, of_scales, outputs, inputs, block, quant_type, Nested(code, absmax, offset))


def drawn_int4(
    draw: Draw,
    outputs: int,
    inputs: int,
    block: int,
    code: str,
    layout: str,
    scaled: str,
    dtype: torch.dtype | None = None,
) -> Int4:
    """A weight of random bits, its scales, and zero points that take away about half of the values' range.

    Scales are of a dtype, the draw's by itself. What tiles are padded with is NaN in scales, where nothing may be read.
    """
    generator, device, dtype = draw.generator, draw.generator.device, dtype or draw.dtype
    groups, scale = inputs // block, inputs**-0.5 / 4

    def bits(*shape: int) -> torch.Tensor:
        low, high = -(1 << 31), 1 << 31
        return torch.randint(low, high, shape, generator=generator, device=device).to(torch.int32)

    of_scales = draw(groups, outputs, scale=scale, dtype=torch.float32).abs_().add_(scale)
    zero: torch.Tensor | None = None
    if layout == "tiles":
        tiles, rows = -(-outputs // 8), -(-inputs // PADDED) * PADDED
        shifts = draw(groups, outputs, scale=4 * scale, dtype=torch.float32)
        pairs = torch.full((rows // block, 8 * tiles, 2), torch.nan, device=device, dtype=dtype)
        pairs[:groups, :outputs] = torch.stack([of_scales, shifts], 2).to(dtype)
        return Int4(bits(tiles, rows // 128, 32, 4), pairs, None, outputs, inputs, block, code, layout, scaled)
    packed = bits(outputs, inputs // 8) if layout == "rows" else bits(inputs // 8, outputs)
    if scaled == "shifted":
        zero = draw(groups, outputs, scale=4 * scale, dtype=torch.float32).to(dtype)
    elif scaled.startswith("zeros"):
        zero = bits(groups, outputs // 8)
    return Int4(packed, of_scales.to(dtype), zero, outputs, inputs, block, code, layout, scaled)


def check_linear4(case: Linear4Case, device: torch.device | str) -> dict[str, Result]:
    """The result of `linear4.linear4`, or of `linear4.gated4` where the case is: `out`."""
    draw = Draw(case.seed, case.dtype, case.aligned, device)
    x = draw(case.rows, case.inputs, scale=case.scale)
    weights = [case.weight(draw, count) for count in case.outputs]
    biases = [draw(count) if case.bias else None for count in case.outputs]
    norm = draw(case.inputs) if case.norm else None
    residual = draw(case.rows, *case.outputs) if case.residual else None
    lora = drawn_adapters(draw, case.inputs, case.outputs, case.ranks, case.lora_dtype)

    def by_torch(dtype: torch.dtype) -> torch.Tensor:
        """As modules compute: weights are dequantised in float32 and rounded."""
        wide, made = x.to(dtype), torch.promote_types(dtype, torch.float32)
        if norm is not None:
            wide = reference.rms_norm(wide, norm.to(dtype), case.eps, case.offset)
        products = [
            functional.linear(wide, dequantized(weight, made).to(dtype), bias if bias is None else bias.to(dtype))
            for weight, bias in zip(weights, biases)
        ]
        products = [with_adapters(y, wide, of_weight) for y, of_weight in zip(products, lora)]
        if case.activation is not None:
            products[0] = reference.activation(products[0], case.activation)
        if case.gated:
            return products[0] * products[1]
        y = torch.cat(products, dim=1) * case.multiplier
        return y if residual is None else y + residual.to(dtype)

    settings: dict[str, Any] = {"norm": norm, "eps": case.eps, "offset": case.offset, "block": case.cut}
    if case.ranks:
        settings["adapters"] = adapters.Adapters(lora)
    with poisoned_scratch():
        if case.gated:
            bias_gate, bias_up = biases
            assert case.activation is not None
            ours = linear4.gated4(x, *weights, case.activation, bias_gate=bias_gate, bias_up=bias_up, **settings)
        else:
            settings.update(residual=residual, scale=case.multiplier, activation=case.activation)
            ours = linear4.linear4(x, weights, biases, **settings)
    return {"out": beside(ours, by_torch(case.dtype), by_torch(torch.float64))}
