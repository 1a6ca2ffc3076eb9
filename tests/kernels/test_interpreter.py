"""What the interpreter of kernels is made to see."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")


@triton.jit
def copy(source_ptr, target_ptr, count, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(target_ptr + i, tl.load(source_ptr + i, mask=i < count), mask=i < count)


@pytest.mark.parametrize(("source", "target"), [(9, 8), (8, 9)])
def test_addresses_beyond_a_tensor_are_no_addresses(source, target):
    whole = torch.arange(64.0)
    copy[(1,)](whole[:9], torch.empty(9), 9, BLOCK=16)
    with pytest.raises(Exception, match="of no tensor given"):
        copy[(1,)](whole[:source], torch.empty(32)[:target], 9, BLOCK=16)
