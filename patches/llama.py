"""Llama, and the models that ship as it (SmolLM2, TinyLlama, ...)."""

from pkv_hf.patches.family import Family

LLAMA = Family(model_type="llama", prefix="Llama")
