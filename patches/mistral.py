"""Mistral, with or without its sliding window."""

from pkv_hf.patches.family import Family

MISTRAL = Family(model_type="mistral", prefix="Mistral")
