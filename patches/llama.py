"""Llama, and the models that ship as it (SmolLM2, TinyLlama, InternLM3, ...)."""

from pkv_hf.origins import Family

LLAMA = Family(folder="llama", prefix="Llama")
