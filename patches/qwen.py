"""Qwen2 and 2.5 (biases, optional sliding layers), and Qwen3 (q and k normed a head)."""

from pkv_hf.patches.family import Family

QWEN2 = Family(model_type="qwen2", prefix="Qwen2")
QWEN3 = Family(model_type="qwen3", prefix="Qwen3")
