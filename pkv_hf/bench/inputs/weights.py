"""Weights of models as they are stored, by name, and adapters around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import BitsAndBytesConfig


def _bits4(dtype: torch.dtype, nested: bool) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=dtype,
    )


WEIGHTS: dict[str, Callable[[torch.dtype], BitsAndBytesConfig]] = {
    "nf4": lambda dtype: _bits4(dtype, nested=False),
    "nf4-nested": lambda dtype: _bits4(dtype, nested=True),
    "int8": lambda dtype: BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
}
"""How transformers quantises linear layers but the head, which compute in a dtype: NF4 (Dettmers et al. 2023), with
scales quantised too where they are nested, and int8 with a scale a row (Dettmers et al. 2022) without outliers."""

WORDS = {"nf4": "NF4 weights", "nf4-nested": "NF4 weights with nested scales", "int8": "int8 weights"}
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
