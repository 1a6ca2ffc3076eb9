"""What only a GPU can show of the kernels: long rows, large pools, and that lengths never compile anew."""

from __future__ import annotations

import dataclasses
import secrets

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from pkv_hf.kernels.append import append, rope_append
from pkv_hf.kernels.checks.attention import DTYPES, ROUTES, Case, build, measure, random_case, run
from pkv_hf.kernels.checks.fuzz_layers import batches, judge

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_to_131072_tokens(dtype, route):
    seed = secrets.randbits(32)
    rng = np.random.default_rng(seed)
    for longest in (200, 3000, 30_000, 131_072, 131_072):
        case = random_case(rng, longest, dtype)
        result = measure(case, route, "cuda")
        assert result.written, (seed, case)
        assert result.error <= 2 * result.sdpa_error, (seed, case, result)


def test_appends_and_layers_to_16384():
    seed = secrets.randbits(32)
    for cases in batches(np.random.default_rng(seed), 160, 10, 16_384):
        for case in cases:
            outcome = judge(case, "cuda")
            assert not outcome.failed, (seed, outcome)


@pytest.mark.parametrize("route", ROUTES)
def test_pools_beyond_2_31_elements(route):
    case = Case(
        starts=(0,) * 9, ends=(131_072,) * 9, num_kv_heads=8, group=2, head_dim=256, page_size=16, dtype=torch.float16,
        seed=secrets.randbits(31),
    )  # fmt: skip
    assert 9 * 131_072 * 8 * 256 > 2**31
    result = measure(case, route, "cuda")
    assert result.written
    assert result.error <= 2 * result.sdpa_error, result


@pytest.mark.parametrize("roped", [False, True], ids=["", "roped"])
def test_appending_beyond_2_31_elements(roped):
    """The last page of a pool of more elements than 32 bits count, written and nothing beside it."""
    heads, page_size, head_dim = 8, 16, 256
    pages = 2**31 // (heads * page_size * head_dim) + 100
    for head_major in (True, False):
        shape = (heads, pages) if head_major else (pages, heads)
        pools = [torch.zeros((*shape, page_size, head_dim), dtype=torch.float16, device="cuda") for _ in range(2)]
        k_pages, v_pages = (pool.transpose(0, 1) if head_major else pool for pool in pools)
        assert k_pages.numel() > 2**31
        table = torch.tensor([[3, pages - 1]], dtype=torch.int32, device="cuda")
        ends, first_held = (torch.tensor([bound], dtype=torch.int32, device="cuda") for bound in (20, 0))
        k, v = (torch.randn(1, heads, 2, head_dim, dtype=torch.float16, device="cuda") for _ in range(2))
        if roped:  # by angles of 0
            ones, zeros = torch.ones(1, 2, head_dim, dtype=k.dtype, device="cuda"), torch.zeros_like(k[:, 0])
            rope_append(k_pages, v_pages, k, k, v, ones, zeros, table, first_held, ends)
        else:
            append(k_pages, v_pages, k, v, table, first_held, ends)
        for states, paged in ((k, k_pages), (v, v_pages)):
            assert torch.equal(paged[pages - 1, :, 2:4], states[0])
            paged[pages - 1, :, 2:4] = 0
            assert not paged.any()
        del pools, k_pages, v_pages, paged


@pytest.mark.parametrize("route", ROUTES)
def test_outputs_are_the_same_to_the_bit_in_every_run(route):
    """Merging goes by place: which program comes first counts for nothing."""
    case = Case(
        starts=(0, 5, 0, 900), ends=(4096, 333, 20_000, 901), num_kv_heads=8, group=4, head_dim=128, page_size=16,
        dtype=torch.bfloat16, seed=secrets.randbits(31),
    )  # fmt: skip
    inputs = build(case, "cuda")
    out = torch.empty(4, 1, 32, 128, dtype=case.dtype, device="cuda")
    first = run(case, route, inputs, out).clone()
    for _ in range(100):
        out.fill_(float("nan"))
        assert torch.equal(run(case, route, inputs, out), first)


@pytest.mark.parametrize("route", ROUTES)
def test_growing_lengths_compile_nothing(route):
    from pkv_hf.kernels.attention import split, workqueue

    kernels = [
        split.split_kernel, split.merge_splits_kernel, workqueue.workqueue_kernel, workqueue.merge_items_kernel
    ]  # fmt: skip

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    case = Case(starts=(0, 3), ends=(9, 10), num_kv_heads=2, group=4, head_dim=64, page_size=16, dtype=torch.float16)
    before = None
    for length in (9, 16, 17, 100, 1024, 1025, 4999):
        step = dataclasses.replace(case, ends=(length, length + 1), parts=5)
        inputs = build(step, "cuda")
        run(step, route, inputs, torch.empty(2, 1, 8, 64, dtype=torch.float16, device="cuda"))
        before = compiled() if before is None else before
    assert compiled() == before
