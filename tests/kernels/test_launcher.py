"""Which launches share a compiled kernel, by a stand-in for Triton's: the interpreter compiles nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pkv_hf.kernels.launcher import Launcher

GRID = (3, 2, 1)


class Kernel:
    """Takes x_ptr, y_ptr, count (not specialised), stride, BLOCK; notes what went through it and what went past it."""

    def __init__(self):
        names = ("x_ptr", "y_ptr", "count", "stride", "BLOCK")
        self.params = [
            SimpleNamespace(name=name, num=i, is_constexpr=name == "BLOCK", do_not_specialize=name == "count")
            for i, name in enumerate(names)
        ]
        self.looked_at, self.past = [], []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.looked_at.append((grid, arguments, options))
            return {grid: lambda *arguments: self.past.append(arguments)}

        return launch


@pytest.fixture
def kernel():
    return Kernel()


@pytest.mark.parametrize("fp_fusion", [True, False])
def test_the_second_launch_of_a_kind_is_not_looked_at(kernel, fp_fusion):
    launch, x, y = Launcher(kernel, fp_fusion=fp_fusion), torch.zeros(64), torch.zeros(64)
    launch("kind", GRID, (x, y), (5, 32), (128,), num_warps=4)
    launch("kind", GRID, (x, y), (7, 48), (128,), num_warps=4)
    assert kernel.looked_at == [(GRID, (x, y, 5, 32, 128), {"num_warps": 4, "enable_fp_fusion": fp_fusion})]
    assert kernel.past == [(x.data_ptr(), y.data_ptr(), 7, 48, 128)]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("another kind", {"kind": "other"}),
        ("a pointer that is not aligned", {"x": torch.zeros(64)[1:]}),
        ("a size that is no multiple of 16", {"stride": 33}),
        ("a size beyond 32 bits", {"stride": 2**31}),
    ],
)
def test_what_triton_compiles_anew_for_is_looked_at(kernel, name, change):
    def run(kind="kind", x=torch.zeros(64), stride=32):  # noqa: B008
        launch(kind, GRID, (x, x), (5, stride), (128,))

    launch = Launcher(kernel, fp_fusion=True)
    run()
    run(**change)
    assert len(kernel.looked_at) == 2, name
    run()
    assert len(kernel.past) == 1


def test_misaligned_launches_are_never_remembered(kernel):
    launch, x = Launcher(kernel, fp_fusion=True), torch.zeros(64)[1:]
    for _ in range(3):
        launch("kind", GRID, (x, x), (5, 32), (128,))
    assert len(kernel.looked_at) == 3


def test_a_tensor_that_is_not_there_stays_none(kernel):
    launch, x = Launcher(kernel, fp_fusion=True), torch.zeros(64)
    for _ in range(2):
        launch("kind", GRID, (x, None), (5, 32), (128,))
    assert kernel.looked_at[0][1] == (x, None, 5, 32, 128)
    assert kernel.past == [(x.data_ptr(), None, 5, 32, 128)]
