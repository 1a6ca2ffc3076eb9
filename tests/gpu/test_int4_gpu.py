"""What only a GPU can show of evenly spaced weights of 4 bits: that torch's own tiles are what our kernels read."""

from __future__ import annotations

import pytest
import torch
from weights.packed4 import quantised, tinygemm

pytest.importorskip("triton")

from pkv_hf.kernels.checks.attention import rms
from pkv_hf.kernels.quantized.linear4 import gated4, linear4
from pkv_hf.kernels.quantized.weights import Int4, dequantized

pytestmark = pytest.mark.gpu


def weight_of(outputs: int, inputs: int, group: int) -> Int4:
    """A weight that torch has put in tiles."""
    values, zero, scale = quantised(torch.randn(outputs, inputs, dtype=torch.bfloat16) * inputs**-0.5, group)
    packed, pairs = tinygemm(values, scale, (8 - zero).to(scale.dtype) * scale)
    width = torch.nn.functional.pad(values, (0, 32 * 4 * packed.shape[1] - inputs)).cuda()
    of_torch = torch.ops.aten._convert_weight_to_int4pack((width[:, ::2] << 4 | width[:, 1::2]).to(torch.uint8), 8)
    assert torch.equal(of_torch.cpu(), packed)
    return Int4(of_torch, pairs.cuda(), None, outputs, inputs, group, "uint4", "tiles", "pairs")


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize(("outputs", "inputs"), [(1024, 4096), (520, 3584), (4096, 11008)])
def test_tiles_are_torchs_own(outputs, inputs, group):
    weight, up = weight_of(outputs, inputs, group), weight_of(outputs, inputs, group)
    exact = dequantized(weight, torch.float64)
    for rows in (1, 3, 8, 17, 80):
        x = torch.randn(rows, inputs, dtype=torch.bfloat16, device="cuda")
        padded = torch.nn.functional.pad(x, (0, 128 * weight.packed.shape[1] - inputs))
        theirs = torch.ops.aten._weight_int4pack_mm(padded, weight.packed, group, weight.scale)[:, :outputs]
        error = rms(theirs - x.double() @ exact.T)
        assert rms(linear4(x, [weight]) - x.double() @ exact.T) <= 2 * error
        gate = torch.nn.functional.silu(x.double() @ exact.T)
        wide = gate * (x.double() @ dequantized(up, torch.float64).T)
        assert rms(gated4(x, weight, up) - wide) <= 0.02 * rms(wide)


@torch.no_grad()
def test_a_model_in_tiles_is_served_by_our_products():
    quantization = pytest.importorskip("torchao.quantization")
    import pkv_hf
    from pkv_hf.bench.inputs.weights import quantised as stored
    from tiny import decode_logits, left_padded, tiny

    model = stored(tiny("llama", hidden_size=256, intermediate_size=512).to("cuda", torch.bfloat16), "int4", "cuda")
    assert type(model.model.layers[0].mlp.up_proj.weight) is quantization.Int4TilePackedTo4dTensor
    inputs = {name: value.cuda() for name, value in left_padded(20, 9).items()}
    with pkv_hf.patched(model, route="split"):
        decode_logits(model, inputs)
        report = pkv_hf.report(model)
    assert report.not_fused == ""
    assert report.multiplied == {"int4": 7 * len(model.model.layers)}
