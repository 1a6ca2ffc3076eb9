"""Other ways to call a model than plain greedy decoding, each compared with transformers alone.

What transformers itself refuses of a model has to be refused alike once it is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers.utils import ModelOutput

import pkv_hf
from pkv_hf.bench.model_types.building import TOKENS, prompts
from pkv_hf.compat import CACHE
from pkv_hf.replaced import STATE

NEW_TOKENS = 6
ALIKE = ON_PAGES, BY_TRANSFORMERS, REFUSED = "on pages", "by transformers", "refused"
"""How a mode ran that is the same patched as unpatched. Of the second, calls were left to transformers' own path; the
third transformers itself refuses."""
TOLERANCE = 1e-4
"""Of logits, relative to the largest one."""


class Outcome(NamedTuple):
    tensors: list[torch.Tensor]
    """The tokens and logits that a mode returned."""
    error: str
    """What it raised instead; empty for nothing."""
    left: bool = False
    """Whether a patched model left some of its calls to transformers."""


def generate(model: Any, inputs: Mapping[str, Any], new_tokens: int = NEW_TOKENS, **settings: Any) -> ModelOutput:
    """Tokens, logits and the cache of so many new tokens, greedily unless `settings` say otherwise. Seeded."""
    torch.manual_seed(0)
    plain = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    output: ModelOutput = model.generate(**inputs, **{**plain, **length, **settings})
    return output


def beams(model: Any) -> ModelOutput:
    return generate(model, prompts(12, 7), num_beams=3)


def chunked_prefill(model: Any) -> ModelOutput:
    """Chunks with a token of each row: a chunk of padding alone is left to transformers."""
    return generate(model, prompts(13, 9), prefill_chunk_size=5)


def two_turns(model: Any) -> ModelOutput:
    """A second turn of several tokens in the cache of the first."""
    inputs = prompts(12, 7)
    first: Any = generate(model, inputs)
    said = torch.randint(*TOKENS, (2, 3), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([first.sequences, said], dim=1)
    new = torch.ones(2, ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
    mask = torch.cat([inputs["attention_mask"], new], dim=1)
    return generate(model, {"input_ids": ids, "attention_mask": mask, CACHE: first[CACHE]})


def sampling(model: Any) -> ModelOutput:
    """Two sequences of each prompt."""
    return generate(model, prompts(12, 7), do_sample=True, num_return_sequences=2)


def prompt_lookup(model: Any) -> ModelOutput:
    ids = prompts(6)["input_ids"].repeat(1, 3)  # what comes again is drafted
    return generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, prompt_lookup_num_tokens=3)


def inputs_embeds(model: Any) -> ModelOutput:
    inputs = prompts(12, 7)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    return generate(model, {"inputs_embeds": embeds, **inputs})


def static_cache(model: Any) -> ModelOutput:
    return generate(model, prompts(12, 7), cache_implementation="static")


def forward(model: Any) -> ModelOutput:
    """Logits without generate()."""
    output: ModelOutput = model(**prompts(12, 12))
    return output


MODES: dict[str, Callable[[Any], ModelOutput]] = {
    "beams": beams,
    "chunked prefill": chunked_prefill,
    "two turns": two_turns,
    "sampling": sampling,
    "prompt lookup": prompt_lookup,
    "inputs_embeds": inputs_embeds,
    "static cache": static_cache,
    "forward": forward,
}


def outcomes(model: Any) -> dict[str, Outcome]:
    """What each mode gives."""
    return {name: _outcome(mode, model) for name, mode in MODES.items()}


def _outcome(mode: Callable[[Any], ModelOutput], model: Any) -> Outcome:
    left = _left(model)
    try:
        return Outcome(_tensors(mode(model)), "", _left(model) > left)
    except Exception as error:  # of transformers' model or of ours: it is the result
        return Outcome([], f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _tensors(output: Any) -> list[torch.Tensor]:
    """The tokens, where there are any, and the logits."""
    return [*([output.sequences] if "sequences" in output else []), *output.logits]


def _left(model: Any) -> int:
    """How many calls a model, if it is patched, has left to transformers."""
    return pkv_hf.report(model).calls.transformers if hasattr(model, STATE) else 0


def compared(model: Any, expected: Mapping[str, Outcome], found: Mapping[str, Outcome]) -> dict[str, str]:
    """How each mode ran, one of `ALIKE`, or what is other patched.

    `model` is unpatched: a mode that it does not repeat either says nothing about pages, and counts as refused.
    """
    result = {}
    for name, outcome in expected.items():
        result[name] = _compared(outcome, found[name])
        if result[name] not in ALIKE and _compared(outcome, _outcome(MODES[name], model)) not in ALIKE:
            result[name] = REFUSED
    return result


def _compared(expected: Outcome, found: Outcome) -> str:
    if expected.error or found.error:
        return REFUSED if expected.error == found.error else f"{found.error or 'no error'} when patched"
    same = [
        ours.shape == theirs.shape and _equal(ours, theirs) for ours, theirs in zip(found.tensors, expected.tensors)
    ]
    if not all(same):
        return "other tokens or logits"
    return BY_TRANSFORMERS if found.left else ON_PAGES


def _equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if not theirs.is_floating_point():
        return torch.equal(ours, theirs)
    return (ours - theirs).abs().max().item() <= TOLERANCE * max(theirs.abs().max().item(), 1.0)
