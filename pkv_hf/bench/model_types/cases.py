"""The cases: every model type that transformers maps to a causal or a multimodal LM, and variants of some."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pkv_hf.bench.model_types.variants import VARIANTS

MAPPINGS = {
    AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    AutoModelForImageTextToText: modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    AutoModelForMultimodalLM: modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
}


@dataclass(frozen=True)
class Case:
    model_type: str
    class_name: str
    auto_class: Any
    """The class of transformers that makes such a model of its configuration."""
    variant: str = ""
    fields: dict[str, Any] = field(default_factory=dict, hash=False)
    """What the variant gives its configuration."""

    @property
    def name(self) -> str:
        return f"{self.model_type} ({self.variant})" if self.variant else self.model_type


def all_cases() -> list[Case]:
    """By model type; the variants of one after its default, where the installed transformers has it."""
    cases: dict[tuple[str, str], Case] = {}
    for auto_class, mapping in MAPPINGS.items():
        for model_type, class_name in mapping.items():
            cases.setdefault((model_type, class_name), Case(model_type, class_name, auto_class))
    first = {case.model_type: case for case in reversed(cases.values())}
    variants = [
        Case(model_type, first[model_type].class_name, first[model_type].auto_class, name, fields)
        for model_type, name, fields in VARIANTS
        if model_type in first
        and all(value in CONFIG_MAPPING for part, value in fields.items() if part.endswith("_config"))
    ]
    return sorted([*cases.values(), *variants], key=lambda case: (case.model_type, case.class_name, case.variant))
