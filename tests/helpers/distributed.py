"""What the tests of devices run in two processes: generation of one model split between them, and of many prompts."""

from __future__ import annotations

import sys

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import AutoModelForCausalLM

import interpreter
import pkv_hf
from pkv_hf.compat import CACHE
from pkv_hf.reporting import explain
from tiny import left_padded, tiny

NEW_TOKENS = 4


def generate(model, lengths):
    prompt = {name: tensor.to(model.device) for name, tensor in left_padded(*lengths).items()}
    return model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True)


def tokens(model, lengths) -> list[list[int]]:
    return generate(model, lengths).sequences.tolist()


def main(folder: str, device: str) -> None:
    interpreter.use()
    state = PartialState(cpu=device == "cpu")
    assert state.num_processes == 2
    assert state.device.type == device
    expected = tokens(tiny("llama").to(state.device), (20, 9))
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    assert tokens(model, (20, 9)) == expected, "transformers' own tensor parallelism"
    for settings in ({}, {"route": "split"}, {"route": "workqueue", "fuse": False}):
        with pkv_hf.patched(model, **settings):
            output = generate(model, (20, 9))
            assert isinstance(output[CACHE], pkv_hf.PagedCache)
            assert output[CACHE].kv_heads == 1  # of two
            assert "1 KV heads" in str(explain(model))
            assert output.sequences.tolist() == expected, settings

    lengths = [(20,), (9,), (14,), (5,), (30,)]  # an odd number: one process has fewer
    model = pkv_hf.patch(tiny("llama").to(state.device), route="split")
    with state.split_between_processes(lengths) as mine:
        parts = gather_object([(part, tokens(model, part)) for part in mine])
    alone = tiny("llama").to(state.device)
    assert parts == [(part, tokens(alone, part)) for part in lengths]
    if state.is_main_process:
        print("both right")
    state.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
