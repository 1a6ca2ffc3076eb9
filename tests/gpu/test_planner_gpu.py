"""The planner against runs under a cap: the longest prompt that it promises runs, and takes that."""

from __future__ import annotations

import gc

import pytest
import torch

import pkv_hf
from pkv_hf.bench.benchmark import load, prompts

pytestmark = pytest.mark.gpu

NEW_TOKENS = 24
WITHIN = 1.1
"""What the planner's sums hold to."""

CASES = {
    "whole": (False, {}, {}),
    "in chunks": (False, {"prefill_chunk_size": 2048}, {}),
    "int8 pages": (False, {}, {"kv_dtype": "int8"}),
    "4-bit weights": (True, {}, {}),
}
"""Whether weights are in 4 bits, settings of `generate`, and of `patch`."""


@pytest.fixture(autouse=True, scope="module")
def unfragmented():
    """Sums say nothing of gaps between blocks: with segments that grow there are none to speak of."""
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    yield
    torch.cuda.memory._set_allocator_settings("expandable_segments:False")


@pytest.fixture
def cap():
    """Caps what torch may take of the GPU, in bytes."""
    total = torch.cuda.get_device_properties(0).total_memory
    yield lambda nbytes: torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total))
    torch.cuda.set_per_process_memory_fraction(1.0)


def release() -> int:
    """Bytes that are in use once all that can be is given back."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("case", CASES)
def test_the_longest_prompt_planned_runs_under_a_cap_and_takes_what_was_planned(case, cap):
    four_bits, generate, patch = CASES[case]
    if four_bits:
        pytest.importorskip("bitsandbytes")
    others = release()
    model = pkv_hf.patch(load("llama-3.2-1b", torch.bfloat16, "cuda", four_bits), **patch)
    settings = {"gpu_memory": "6GiB", "max_new_tokens": NEW_TOKENS, **generate, **patch}
    longest = pkv_hf.plan(model, prompt_tokens=1, **settings).max_prompt_tokens
    assert longest > 10_000
    planned = pkv_hf.plan(model, prompt_tokens=longest, **settings)
    assert planned.fits

    def run(length):
        inputs = prompts("llama-3.2-1b", model, [length])
        model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, **generate)

    run(100)  # compiles, and from the second call on captures
    release()
    cap(others + planned.allocated * WITHIN)
    torch.cuda.reset_peak_memory_stats()
    run(longest)
    assert pkv_hf.report(model).graph_bytes > 0
    took = torch.cuda.max_memory_allocated() - others
    assert took == pytest.approx(planned.allocated, rel=WITHIN - 1)
    release()
    with pytest.raises(torch.OutOfMemoryError):  # the cap is one
        run(2 * longest)
