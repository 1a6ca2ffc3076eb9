"""Model families: a spec each, by transformers' `model_type`."""

from pkv_hf.patches.family import Family
from pkv_hf.patches.llama import LLAMA
from pkv_hf.patches.mistral import MISTRAL
from pkv_hf.patches.qwen import QWEN2, QWEN3

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}
