"""Decode speed of `generate()`: one case by several engines, beside the time that the step's bytes need at least."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from pkv_hf.arguments import needs
from pkv_hf.bench import logits
from pkv_hf.bench.inputs.models import check_positions, loading
from pkv_hf.bench.inputs.shapes import SHAPES
from pkv_hf.bench.inputs.smollm2 import load_smollm2, load_tokenizer, pydoc_text
from pkv_hf.bench.inputs.weights import LIBRARIES, quantised, with_lora
from pkv_hf.bench.measure import Run, run_generate
from pkv_hf.errors import UsageError
from pkv_hf.patching import patched
from pkv_hf.reporting import report

WARM_STEPS = 4
"""Steps after the first token that a summary leaves out."""


@dataclass(frozen=True)
class Summary:
    """What one engine took for a case."""

    run: Run
    setup_s: float
    """The engine's whole first call, what it compiles and allocates included."""
    ran: dict[str, Any]
    """What `report` says of its last step, by the fields of a record; a route of None for transformers' own."""
    first_step: tuple[torch.Tensor, torch.Tensor] | None = None
    """Its tokens and logits, as `logits.first_step` returns them."""

    def figures(self) -> dict[str, Any]:
        """Its fields of a record: times in milliseconds (`setup_s` in seconds), memory in GiB (`kv_bytes` in bytes)."""
        p20, p50, p80 = np.percentile(self.run.step_s[WARM_STEPS:], (20, 50, 80)) * 1e3
        return {
            **self.ran,
            "step_ms_p20": float(p20),
            "step_ms_p50": float(p50),
            "step_ms_p80": float(p80),
            "first_token_ms": self.run.first_token_s * 1e3,
            "peak_gib": self.run.peak_bytes / 2**30,
            "kv_bytes": self.run.kv_bytes,
            "setup_s": self.setup_s,
        }


def load(
    name: str,
    dtype: torch.dtype,
    device: str,
    weights: str | None = None,
    lora: int | None = None,
    option: str = "--model",
) -> Any:
    """A model by a name in `SHAPES`, `smollm2`, a hub id or a folder; in eval mode on the device.

    `weights` names how they are quantised, and `lora` is the rank of random adapters that are not merged.
    Raises UsageError, naming the command's option, for what cannot be loaded.
    """
    needs(*[LIBRARIES.get(weights, "bitsandbytes")] if weights else (), *["peft"] * bool(lora))
    with loading(f"{option} {name}{f' --weights {weights}' if weights else ''}", name):
        state = None
        if name == "smollm2":
            model: Any = load_smollm2(dtype=dtype)
        elif name not in SHAPES:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        elif weights:
            model, state = SHAPES[name].drawn(dtype, device)
        else:
            model = SHAPES[name].build(dtype, device)
        model = quantised(model, weights, device, state) if weights else model.eval().to(device)
        return with_lora(model, lora) if lora else model


def prompts(name: str, model: Any, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Prompts of these lengths, left-padded: real text for smollm2 (which goes round), else random tokens."""
    longest = max(lengths)
    if name == "smollm2":
        source = load_tokenizer()(pydoc_text(), return_tensors="pt").input_ids[0]
    else:
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.get_text_config().vocab_size
        source = torch.randint(2, vocabulary, (sum(lengths),), generator=generator)
        source[torch.isin(source, media_tokens(model.config))] = 2
    input_ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    taken = 0
    for row, length in enumerate(lengths):
        input_ids[row, longest - length :] = source[torch.arange(taken, taken + length) % len(source)]
        mask[row, longest - length :] = 1
        taken += length
    return {"input_ids": input_ids.to(model.device), "attention_mask": mask.to(model.device)}


def media_tokens(config: Any) -> torch.Tensor:
    """Tokens that stand for an image, or what is around one: a text of them alone would lack its image."""
    plain = ("pad_token_id", "bos_token_id", "eos_token_id")
    named = [value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))
             and name not in plain]  # fmt: skip
    return torch.tensor([value for value in named if isinstance(value, int)], dtype=torch.long)


def load_draft(name: str, tokens: int, dtype: torch.dtype, model: Any) -> Any:
    """A model by its name, to draft for another: that many tokens in every round, however sure it is.

    Raises UsageError for what cannot be loaded, or has another vocabulary.
    """
    draft = load(name, dtype, model.device, option="--assistant")
    sizes = [each.config.get_text_config().vocab_size for each in (draft, model)]
    if sizes[0] != sizes[1]:
        raise UsageError(f"--assistant {name} has {sizes[0]} tokens in its vocabulary, the model {sizes[1]}: pass one "
                         "of the same tokens")  # fmt: skip
    draft.generation_config.update(num_assistant_tokens=tokens, num_assistant_tokens_schedule="constant")
    draft.generation_config.assistant_confidence_threshold = 0.0
    return draft


def check_lengths(model: Any, cases: list[list[int]], new_tokens: int) -> None:
    """Raises UsageError for prompts that, with what is generated after them, the model has no positions for."""
    for length in map(max, cases):
        what = f"--lengths {length} and --new-tokens {new_tokens}, {length + new_tokens} tokens,"
        check_positions(model, length + new_tokens, what, rescales=False)


@dataclass(frozen=True)
class Engine:
    """A way to run `generate()`: its settings for that, and for `patch` where it is a patched one."""

    generate: dict[str, Any] = field(default_factory=dict)
    patch: dict[str, Any] | None = None


ENGINES: dict[str, Engine] = {
    "dynamic": Engine(),
    "static-compile": Engine(generate={"cache_implementation": "static"}),
    "patched": Engine(patch={}),
    "patched-split": Engine(patch={"route": "split"}),
    "patched-workqueue": Engine(patch={"route": "workqueue"}),
    "patched-no-fuse": Engine(patch={"fuse": False}),
    "patched-no-run-ahead": Engine(patch={"run_ahead": False}),
    "patched-no-graphs": Engine(patch={"cuda_graphs": False}),
    "patched-pages-only": Engine(patch={"cuda_graphs": False, "run_ahead": False, "fuse": False}),
}
"""All are measured on their second call of a case."""


def measure(
    model: Any, inputs: dict[str, torch.Tensor], new_tokens: int, engine: str, judged: bool = False, **mode: Any
) -> Summary:
    """Runs a case twice by an engine; `mode` is what `generate()` is given for another mode than greedy decoding.

    Where it is to be `judged`, a third call notes the logits of its first step.
    """
    settings = ENGINES[engine]
    with contextlib.ExitStack() as stack:
        if settings.patch is not None:
            for each in (model, mode.get("assistant_model")):
                if each is not None:
                    stack.enter_context(patched(each, **settings.patch))
        model._previous_max_cache_length = -1  # generate() makes a static cache as long as that of an earlier case
        torch.compiler.reset()
        started = time.perf_counter()
        run_generate(model, inputs, new_tokens, **settings.generate, **mode)
        setup = time.perf_counter() - started
        run = run_generate(model, inputs, new_tokens, **settings.generate, **mode)
        step = logits.first_step(model, inputs, new_tokens, **settings.generate) if judged else None
        return Summary(run, setup, ran(model) if settings.patch is not None else UNPATCHED, step)


UNPATCHED = {"route": None}


def ran(model: Any) -> dict[str, Any]:
    """How a patched model's last step ran, and why no better."""
    said = report(model)
    how = {name: getattr(said, name) for name in ("last_step", "not_fused", "not_captured")}
    return {"route": said.route, **how, "left": list(said.left)}


def read_bandwidth(device: str) -> float:
    """Bytes a second that the device reads, the fastest of summing a large tensor: its clocks take a while to rise."""
    elements = 1 << 30 if device == "cuda" else 1 << 26
    data = torch.ones(elements, dtype=torch.float32, device=device)
    times = []
    for _ in range(20):
        _synchronize(device)
        started = time.perf_counter()
        data.sum()
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return data.nbytes / min(times)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
