"""Qwen2 and 2.5 (biases, optional sliding layers), and Qwen3 (q and k normed a head)."""

from pkv_hf.origins import Family

QWEN2 = Family(folder="qwen2", prefix="Qwen2")
QWEN3 = Family(folder="qwen3", prefix="Qwen3")
