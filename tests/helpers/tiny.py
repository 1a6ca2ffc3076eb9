"""Tiny random models of the four families, big enough that greedy tokens wander."""

from __future__ import annotations

import copy

import tokenizers
import torch
import transformers
from tokenizers import decoders, pre_tokenizers, processors

import pkv_hf
from pkv_hf.compat import CACHE

COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "qwen2": ("Qwen2", {}),
    "qwen2-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


def tiny(name: str, seed: int = 0, **overrides: object) -> transformers.PreTrainedModel:
    """A model by its name in `FAMILIES`, as `randomized` makes it."""
    family, settings = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **settings, **overrides})
    return randomized(getattr(transformers, f"{family}ForCausalLM"), config, seed)


def randomized(
    model_class: type[transformers.PreTrainedModel], config: transformers.PreTrainedConfig, seed: int = 0
) -> transformers.PreTrainedModel:
    """A model with weights large enough for sharp attention, norms and biases that show, fp32, in eval mode."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("bias"):
                parameter.normal_(0, 0.2)
            else:  # a norm's weight, around 1 or, where the norm adds 1, around 0
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def assert_on_pages(model: torch.nn.Module) -> None:
    """A patched model's decoder has run, on pages every time."""
    report = pkv_hf.report(model)
    assert report.calls.pages, report
    assert not report.calls.transformers, report
    assert not report.left


def byte_tokenizer(**special: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with a token for every byte, 256 of them, then the special ones; with a bos_token texts begin so."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special.values()))
    if "bos_token" in special:
        bos = special["bos_token"], tokenizer.token_to_id(special["bos_token"])
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def left_padded(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of random prompts of these lengths in tokens, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    input_ids = torch.randint(2, COMMON["vocab_size"], (len(lengths), longest), generator=generator)
    mask = torch.ones_like(input_ids)
    for row, length in enumerate(lengths):
        input_ids[row, : longest - length] = COMMON["pad_token_id"]
        mask[row, : longest - length] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


def with_prefix_cache(name, budget="4MiB", **options):
    """A patched model with a prefix cache, and its twin without anything."""
    twin = tiny(name)
    return pkv_hf.patch(copy.deepcopy(twin), prefix_cache=budget, **options), twin


def prefix_use(model):
    return pkv_hf.report(model).prefix_cache


def one(*parts):
    """A prompt of one row, of lists of tokens."""
    ids = torch.tensor([[token for part in parts for token in part]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def padded(*rows):
    """Rows of tokens, padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def tokens(count, seed):
    return left_padded(count, seed=seed)["input_ids"][0].tolist()


def on_gpu(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """`left_padded`, on a GPU."""
    return {name: tensor.cuda() for name, tensor in left_padded(*lengths, seed=seed).items()}


def decode_logits(model: transformers.PreTrainedModel, inputs: dict[str, torch.Tensor], steps: int = 3) -> torch.Tensor:
    """Logits `[steps, B, vocab]`, float64, of a fixed continuation, a token at a time, after the prompt."""
    cache = pkv_hf.PagedCache(model.config)
    mask = inputs["attention_mask"]
    model(**inputs, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    logits = []
    for step in range(steps):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = mask.sum(dim=1, keepdim=True) - 1
        token = torch.full_like(mask[:, :1], 5 + step)
        out = model(token, attention_mask=mask, position_ids=positions, **{CACHE: cache}, use_cache=True)
        logits.append(out.logits[:, -1].double())
    return torch.stack(logits)
