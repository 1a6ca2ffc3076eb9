"""Tiny random models of a case, and what they are asked to go on from."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pkv_hf.bench.model_types.cases import Case
from pkv_hf.bench.model_types.shrinking import shrink

SPREAD = 0.2
"""Of weights: enough for attention that is sharp, and for norms and biases that show."""

TOKENS = (2, 200)
"""The tokens of prompts: none is special."""


def build(case: Case) -> Any:
    """A model of random weights, float32, in eval mode: the same in every process."""
    config = shrink(CONFIG_MAPPING[case.model_type], case.fields)
    torch.manual_seed(0)
    model = case.auto_class.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                drawn = torch.empty_like(parameter).normal_(0, SPREAD, generator=generator)
                if parameter.ndim < 2 and not name.endswith(".bias"):  # norms, sinks, decays: around where they begin
                    drawn += parameter
                parameter.copy_(drawn)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):  # of experts' scores
                buffer.normal_(0, SPREAD, generator=generator)
    return model


def prompts(*lengths: int) -> dict[str, torch.Tensor]:
    """Prompts of these lengths, padded on the left. They are text, also for models that take images or sound."""
    ids = torch.randint(*TOKENS, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : max(lengths) - length] = 0
        mask[row, : max(lengths) - length] = 0
    return {"input_ids": ids, "attention_mask": mask}
