"""Qwen2 and 2.5 (biases, optional sliding layers), and Qwen3 (q and k normed a head)."""

from pkv_hf.patches.family import Family

QWEN2 = Family(model_type="qwen2", attention_class="Qwen2Attention")
QWEN3 = Family(model_type="qwen3", attention_class="Qwen3Attention")
