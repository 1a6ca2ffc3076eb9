"""Weights of models as they are stored, by name, and adapters around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig


def _bits4(dtype: torch.dtype, nested: bool) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=dtype,
    )


def _int4(dtype: torch.dtype) -> TorchAoConfig:
    """In torchao's one order that a GPU multiplies without further packages, which is of bfloat16."""
    from torchao.quantization import Int4WeightOnlyConfig

    if dtype != torch.bfloat16:
        raise ValueError(f"weights of int4 with {dtype}: torchao's tiles are of bfloat16 alone")
    return TorchAoConfig(Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))


WEIGHTS: dict[str, Callable[[torch.dtype], BitsAndBytesConfig | TorchAoConfig]] = {
    "nf4": lambda dtype: _bits4(dtype, nested=False),
    "nf4-nested": lambda dtype: _bits4(dtype, nested=True),
    "int8": lambda dtype: BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    "int4": _int4,
}
"""How transformers quantises linear layers but the head, which compute in a dtype: NF4 (Dettmers et al. 2023), with
scales quantised too where they are nested, and int8 with a scale a row (Dettmers et al. 2022) without outliers, by
bitsandbytes; int4 with a scale and a zero point for 128 inputs by torchao, in tinygemm's tiles."""

LIBRARIES = {"int4": "torchao"}
"""Packages that quantise, where that is not bitsandbytes."""

TRAINED = ("nf4", "nf4-nested", "int8")
"""Weights that PEFT trains adapters on."""

WORDS = {
    "nf4": "NF4 weights", "nf4-nested": "NF4 weights with nested scales", "int8": "int8 weights",
    "int4": "int4 weights",
}  # fmt: skip
"""What tables call them."""


def quantised(model: Any, weights: str, device: Any, state: dict[str, Any] | None = None) -> Any:
    """A model of the same class on the device, whose linear layers but the head are quantised as `WEIGHTS` names.

    They are quantised one by one. What they are made of is the model's, or `state`, by the names of its state dict.
    """
    made = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict() if state is None else state,
        dtype=model.dtype,
        device_map=device,
        quantization_config=WEIGHTS[weights](model.dtype),
    )
    made.generation_config = model.generation_config
    return made.eval()


def with_lora(model: Any, rank: int) -> Any:
    """The model with an adapter of PEFT's around each linear layer but the head: A and B are random, alpha is 8."""
    import peft

    settings = peft.LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, settings).eval().get_base_model()
