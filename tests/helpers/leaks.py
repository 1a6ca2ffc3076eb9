"""What a process holds before and after many generate() calls of every kind."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psutil
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import pkv_hf
from pkv_hf.compat import CACHE
from tiny import COMMON, tiny

MIB = 1 << 20
BOUNDS = {
    "rss": 48 * MIB,
    "allocated": 1 * MIB,
    "reserved": 32 * MIB,
    "graph_bytes": 32 * MIB,
    "open_files": 0,
    "threads": 0,
    "caches": 0,
    "steps": 0,
    "graphs": 0,
}
"""How much more may be held at the end than after the warm-up: memory comes in blocks, the rest is counted."""

MODES: tuple[dict[str, Any], ...] = (
    {},
    {"do_sample": True, "top_p": 0.9},
    {"num_beams": 2},
    {"num_return_sequences": 2, "do_sample": True},
    {"prompt_lookup_num_tokens": 3},
    {"return_dict_in_generate": True, "output_scores": True},
    {"eos_token_id": [5, 17, 40, 77]},
)
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"kv_dtype": "int8"},
    {"page_size": 64},
    {"run_ahead": False},
    {"prefix_cache": "256KiB"},
)
REPATCHED_EVERY = 100


@dataclass(frozen=True)
class Held:
    """Bytes and counts at one moment, with no generate() under way."""

    rss: int
    allocated: int
    reserved: int
    graph_bytes: int
    open_files: int
    threads: int
    caches: int
    steps: int
    graphs: int

    def grown(self, before: Held) -> dict[str, int]:
        """By what this is more than before, where that is more than its bound."""
        more = {name: value - asdict(before)[name] for name, value in asdict(self).items()}
        return {name: value for name, value in more.items() if value > BOUNDS[name]}


class Stop(Exception):
    """Raised by a stopping criterion in the middle of a call."""


class Raises(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        raise Stop


class Calls:
    """Random calls of two patched models: shapes, modes, settings, turns, forks, prefixes, errors."""

    def __init__(self, number: int, device: str) -> None:
        self.rng = np.random.default_rng(number)
        self.device = torch.device(device)
        self.models = [
            pkv_hf.patch(tiny(family, num_hidden_layers=2).to(device)) for family in ("llama", "qwen2-windows")
        ]
        self.done = 0

    def __call__(self) -> None:
        if self.done % REPATCHED_EVERY == 0:
            for model in self.models:
                pkv_hf.patch(model, **SETTINGS[int(self.rng.integers(len(SETTINGS)))])
        self.done += 1
        model = self.models[int(self.rng.integers(2))]
        mode = MODES[int(self.rng.integers(len(MODES)))]
        rows = 1 if "prompt_lookup_num_tokens" in mode else int(self.rng.integers(1, 4))
        lengths = self.rng.integers(1, 60, rows)
        settings = {"max_new_tokens": int(self.rng.integers(1, 7)), "do_sample": False, **mode}
        kind = self.rng.random()
        if kind < 0.8:
            model.generate(**self.prompt(lengths), **settings)
        elif kind < 0.86:  # two turns on a cache of the caller's own
            cache = pkv_hf.PagedCache(model.config)
            first = model.generate(**self.prompt(lengths[:1]), **{CACHE: cache}, max_new_tokens=3)
            model.generate(torch.cat([first, first[:, :2]], dim=1), **{CACHE: cache.fork()}, max_new_tokens=3)
        elif kind < 0.92:
            shared = pkv_hf.prefix(model, self.prompt(lengths[:1])["input_ids"])
            for turns in ([[5, 6]], [[5, 6], [7], [8] * 18]):
                model.generate(**shared.inputs(turns), max_new_tokens=2)
        else:
            with contextlib.suppress(Stop):
                model.generate(**self.prompt(lengths), **settings, stopping_criteria=StoppingCriteriaList([Raises()]))

    def prompt(self, lengths: np.ndarray) -> dict[str, torch.Tensor]:
        """Random prompts of these lengths, padded on the left."""
        longest = int(lengths.max())
        ids = torch.from_numpy(self.rng.integers(2, COMMON["vocab_size"], (len(lengths), longest)))
        mask = torch.arange(longest) >= torch.from_numpy(longest - lengths)[:, None]
        return {"input_ids": ids.to(self.device), "attention_mask": mask.long().to(self.device)}

    def held(self) -> Held:
        gc.collect()
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        process, reports = psutil.Process(), [pkv_hf.report(model) for model in self.models]
        return Held(
            rss=process.memory_info().rss,
            allocated=torch.cuda.memory_allocated() if on_gpu else 0,
            reserved=torch.cuda.memory_reserved() if on_gpu else 0,
            graph_bytes=sum(report.graph_bytes for report in reports),
            open_files=process.num_fds(),
            threads=process.num_threads(),
            caches=sum(type(thing) is pkv_hf.PagedCache for thing in gc.get_objects()),
            steps=sum(len(model._pkv_hf_state.static_steps) for model in self.models),
            graphs=sum(report.graphs for report in reports),
        )
