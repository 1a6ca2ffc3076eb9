"""Exceptions out of what `generate()` calls at every step."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList


class At:
    """Raises an error at its n-th call."""

    def __init__(self, n: int, error: type[BaseException]) -> None:
        self.left, self.error = n, error

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error("now")


def faulty(where: str, at: At, model) -> dict:
    """Settings of generate() in which `where` calls `at` at every step."""

    class Streamer:
        def put(self, value):
            at()

        def end(self):
            pass

    class Processor(LogitsProcessor):
        def __call__(self, input_ids, scores):
            at()
            return scores

    class Criterion(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            at()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    if where == "streamer":
        return {"streamer": Streamer()}
    if where == "processor":
        return {"logits_processor": LogitsProcessorList([Processor()])}
    if where == "criterion":
        return {"stopping_criteria": StoppingCriteriaList([Criterion()])}
    model.model.layers[1].mlp.register_forward_hook(lambda *_: at())
    return {}
