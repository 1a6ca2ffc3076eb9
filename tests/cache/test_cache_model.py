"""Random sequences of cache operations: a paged cache holds what transformers' dense one does, every page counted."""

from __future__ import annotations

import pytest

import cache_machine


@pytest.mark.parametrize("machine", cache_machine.MACHINES)
def test_random_operations(machine):
    assert cache_machine.run(machine, examples=100, steps=40) > 2000
