import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_blocks_hold_nan(monkeypatch):
    """New room for kept pages holds what memory held before: here NaN, as fresh pages in all tests."""
    from pkv_hf.runtime.prefix_cache import blocks

    room = blocks._room

    def poisoned(*args):
        return room(*args).fill_(float("nan"))

    monkeypatch.setattr(blocks, "_room", poisoned)


@pytest.fixture
def same():
    """Calls generate() of a patched model, and fails where its tokens are not those that an unpatched twin gives."""

    def check(model, twin, inputs, **settings):
        settings = {"max_new_tokens": 6, "do_sample": False, **settings}
        torch.manual_seed(0)
        expected = twin.generate(**inputs, **settings)
        torch.manual_seed(0)
        given = model.generate(**inputs, **settings)
        given, expected = (getattr(output, "sequences", output) for output in (given, expected))
        assert torch.equal(given, expected)
        return given

    return check
