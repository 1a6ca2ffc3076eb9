"""Patches a tiny model and generates, with what is installed and nothing else: run where no test tool is."""

from __future__ import annotations

import torch
import transformers
import triton

import pkv_hf
from pkv_hf.kernels import append, elementwise, linear
from pkv_hf.kernels.attention import split, workqueue

KERNELS = (append, elementwise, linear, split, workqueue)  # importing them is part of the check


def main() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    ids = torch.randint(1, 128, (2, 40))
    for settings in ({}, {"num_beams": 2}, {"do_sample": True}):
        call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, **settings}
        torch.manual_seed(1)
        expected = model.generate(ids, **call)
        with pkv_hf.patched(model):
            torch.manual_seed(1)
            assert torch.equal(model.generate(ids, **call), expected), settings
            report = pkv_hf.report(model)
            assert report.calls.pages, settings
            assert not report.calls.transformers, settings
            assert not report.left, settings
    versions = {package.__name__: package.__version__ for package in (torch, transformers, triton)}
    print(f"pkv_hf from {pkv_hf.__file__}, with {versions}: on pages")


if __name__ == "__main__":
    main()
