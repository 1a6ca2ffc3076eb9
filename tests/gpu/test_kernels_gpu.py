"""What only a GPU can show of the kernels: long rows, large pools, and that lengths never compile anew."""

from __future__ import annotations

import dataclasses
import secrets

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from pkv_hf.kernels.check import DTYPES, ROUTES, Case, build, measure, random_case, run

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


@pytest.mark.parametrize("route", ROUTES)
def test_growing_lengths_compile_nothing(route):
    from pkv_hf.kernels import split, workqueue

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
