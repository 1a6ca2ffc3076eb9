"""Bytes of weights as they are stored, quantised or not, and those that a decode step reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pkv_hf.compat import decoder_of


def stored_bytes(weight: Any) -> int:
    """Bytes of a weight with the scales that it is read by.

    A subclass that wraps tensors (torchao's, a sharded one) has as its `nbytes` those of what it stands for, and
    bitsandbytes keeps the scales of 4-bit weights beside them.
    """
    if hasattr(weight, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(weight, name)) for name in weight.__tensor_flatten__()[0])
    state, scales = getattr(weight, "quant_state", None), 0
    while state is not None:  # scales can be quantised themselves
        scales += state.absmax.nbytes
        state = getattr(state, "state2", None)
    return weight.nbytes + scales if isinstance(weight, torch.Tensor) else 0  # else what a wrapper knows of its mesh


def weight_bytes(model: Any) -> int:
    """Bytes of all parameters, and of buffers that are weights."""
    return sum(map(stored_bytes, _weights(model).values()))


def _weights(model: nn.Module) -> dict[int, torch.Tensor]:
    """By identity, a model's parameters, and the buffers of layers that keep packed weights in such (GPTQ)."""
    found: dict[int, torch.Tensor] = {id(weight): weight for weight in model.parameters()}
    for module in model.modules():
        if "qweight" in module._buffers:
            found |= {id(buffer): buffer for buffer in module.buffers(recurse=False) if buffer.ndim > 1}
    return found


def step_weight_bytes(model: Any) -> int:
    """Bytes of the weights that a decode step reads: those of the decoder and the head, not of towers beside it.

    Every expert counts, and the embedding table only where it is the head too, since a step reads a few of its rows.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    read = _weights(decoder_of(model))
    read.pop(id(embedding), None)
    if isinstance(head, nn.Module):
        read |= _weights(head)
    return sum(map(stored_bytes, read.values()))
