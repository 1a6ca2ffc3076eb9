"""Mistral, with or without its sliding window."""

from pkv_hf.origins import Family

MISTRAL = Family(folder="mistral", prefix="Mistral")
