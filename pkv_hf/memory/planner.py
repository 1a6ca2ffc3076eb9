"""What a patched model's `generate()` needs of a GPU's memory, before it runs: weights, pages, prompt, workspace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from pkv_hf.arguments import memory_size, whole
from pkv_hf.cache.sizes import KV_DTYPES, check_kv_dtype, check_page_size
from pkv_hf.kernels.launch import PROGRAMS_PER_SM, next_power_of_2, padded_queries
from pkv_hf.kernels.products.blocks import scratch
from pkv_hf.kernels.quantize import LARGEST
from pkv_hf.memory.sizes import QUANTISED_BITS, ModelSizes
from pkv_hf.routes.sdpa import MASK_ELEMENTS, takes_grouped_heads
from pkv_hf.tables import table

MIB = 1 << 20
CUBLAS_WORKSPACE = 32 * MIB
"""torch's for one stream, on sm_90; older GPUs take less. A captured step's stream has one of its own."""

CUDA_CONTEXT = 512 * MIB
"""The driver's context and the loaded kernels, outside of torch's allocator; 300 to 600 MiB by GPU and driver."""

CUDA = torch.device("cuda")

PROCESSORS = 132
"""Multiprocessors where there is no GPU to ask: those of an H100. They bound the kernels' partial results."""

LEAST_GPU = 64 * MIB
"""Fewer bytes, as a number, are some other unit by mistake."""

MOST_ROWS = 1 << 20
"""More are not looked for."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one GPU, by what they are for. `print()`, a REPL and a notebook show the table."""

    gpu_memory: int
    batch: int
    prompt_tokens: int
    """Of the longest row."""
    max_new_tokens: int
    weights: int
    pages: int
    """K and V, as `generate()` reserves them, the null page of each layer included, and linear-attention states."""
    prefill: int
    """The largest intermediate results of one layer while it takes the prompt."""
    workspace: int
    """cuBLAS's workspaces, the decode kernels' partial results, copies of linear-attention states, masks of a prompt
    in chunks."""
    graphs: int
    """Intermediate results of a decode step, which its CUDA graph keeps; logits and parts of products included."""
    context: int = CUDA_CONTEXT
    max_prompt_tokens: int = 0
    """The longest prompt of `batch` equal rows that fits, by memory alone, with the new tokens; 0 where none does."""
    max_batch: int = 0
    """The most rows of `prompt_tokens` that fit; 0 where none does."""

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated()` is to show."""
        return self.weights + self.pages + self.prefill + self.workspace + self.graphs

    @property
    def total(self) -> int:
        return self.allocated + self.context

    @property
    def fits(self) -> bool:
        return self.total <= self.gpu_memory

    def __repr__(self) -> str:
        parts = ("weights", "pages", "prefill", "workspace", "graphs", "context", "total", "gpu_memory")
        rows = [(name.replace("gpu_memory", "GPU"), f"{getattr(self, name) / 2**30:,.2f}") for name in parts]
        asked = f"{self.batch} x {self.prompt_tokens:,} tokens and {self.max_new_tokens:,} new ones"
        return "\n".join([
            f"{asked} {'fit' if self.fits else 'do not fit'}",
            table(("", "GiB"), rows),
            f"longest prompts, {self.batch} at a time, by memory alone: {self.max_prompt_tokens:,} tokens",
            f"most rows of {self.prompt_tokens:,} tokens: {self.max_batch:,}",
        ])  # fmt: skip


def plan(
    model_or_config: nn.Module | PreTrainedConfig,
    *,
    prompt_tokens: int | Sequence[int],
    max_new_tokens: int = 256,
    batch: int = 1,
    gpu_memory: int | str | None = None,
    dtype: torch.dtype | None = None,
    weight_bits: int | None = None,
    kv_dtype: torch.dtype | str | None = None,
    page_size: int = 16,
    prefill_chunk_size: int | None = None,
) -> MemoryPlan:
    """What `generate()` of a patched model takes on one GPU, and how long a prompt and how large a batch would fit.

    Sums of first principles, not measurements: the peak that torch reports is within a tenth of `allocated` in every
    case recorded under benchmarks/results. Gaps between blocks come on top, by a tenth and more where the GPU is nearly
    full; `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True` keeps them small.

    Args:
        model_or_config: a causal LM, patched or not, whose weights count as they are; or a configuration.
        prompt_tokens: tokens of each of `batch` prompts, or the lengths of left-padded prompts one by one.
        max_new_tokens: as for `generate`, which reserves pages for them from the start.
        batch: rows, where `prompt_tokens` is one number.
        gpu_memory: bytes, 64 MiB or more, or a string such as "15GiB"; None for the present GPU's.
        dtype: of a configuration's weights, and of activations; None for the configuration's own.
        weight_bits: 4 or 8 where a configuration's linear layers are to be loaded quantised; None for `dtype`.
        kv_dtype, page_size: as for `patch`.
        prefill_chunk_size: as for `generate`; None for the whole prompt at once.

    Raises ValueError for anything else, and UnsupportedModelError (a ValueError) for what `patch` would refuse.
    """
    several = isinstance(prompt_tokens, Sequence) and not isinstance(prompt_tokens, (str, bytes))
    lengths: list[Any] = list(prompt_tokens) if several else [prompt_tokens]  # type: ignore[arg-type]
    lengths = [whole("prompt_tokens", length, 1, "pass tokens") for length in lengths or [0]]
    batch = whole("batch", batch, 1, "pass rows")
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 1, "pass tokens")
    if prefill_chunk_size is not None:
        prefill_chunk_size = whole("prefill_chunk_size", prefill_chunk_size, 1, "pass tokens, or None")
    if not several:
        lengths *= batch
    elif batch not in (1, len(lengths)):
        raise ValueError(f"batch={batch}, but prompt_tokens names {len(lengths)} rows: leave batch out")
    check_page_size(page_size)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={dtype!r} is no floating dtype: pass torch.float16 say, or None")
    if weight_bits is not None and (type(weight_bits) is not int or weight_bits not in QUANTISED_BITS):
        raise ValueError(f"weight_bits={weight_bits!r} is not one of {list(QUANTISED_BITS)}, or None for dtype")
    check_kv_dtype(kv_dtype)
    memory = _gpu_bytes(gpu_memory)
    sizes = ModelSizes.of(model_or_config, dtype, weight_bits)
    settings = (max_new_tokens, kv_dtype, page_size, prefill_chunk_size)

    def planned(rows: list[int]) -> MemoryPlan:
        return _planned(sizes, memory, rows, *settings)

    made = planned(lengths)
    return replace(
        made,
        max_prompt_tokens=_largest(lambda n: planned([n] * len(lengths)).fits),
        max_batch=_largest(lambda n: planned([max(lengths)] * n).fits, MOST_ROWS),
    )


def _gpu_bytes(gpu_memory: int | str | None) -> int:
    if gpu_memory is None:
        if not torch.cuda.is_available():
            raise ValueError("gpu_memory=None asks for this GPU's, and there is none: pass bytes, or '15GiB' say")
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    nbytes = memory_size("gpu_memory", gpu_memory, "15GiB")
    if not isinstance(gpu_memory, str) and nbytes < LEAST_GPU:
        raise ValueError(f"gpu_memory={nbytes} is {nbytes:,} bytes: pass '16GiB' say")
    return nbytes


def _largest(fits: Any, most: int = 1 << 32) -> int:
    """The largest number that fits, by bisection; 0 for none, and `most` or less however many do."""
    low, high = 0, 1
    while fits(high) and high < most:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _planned(
    sizes: ModelSizes,
    memory: int,
    lengths: list[int],
    max_new_tokens: int,
    kv_dtype: Any,
    page_size: int,
    chunk: int | None,
) -> MemoryPlan:
    longest, width = max(lengths), sizes.dtype.itemsize
    whole = chunk is None or chunk >= longest
    tokens = sum(lengths) if whole else len(lengths) * (chunk or 0)
    return MemoryPlan(
        gpu_memory=memory,
        batch=len(lengths),
        prompt_tokens=longest,
        max_new_tokens=max_new_tokens,
        weights=sizes.weights,
        pages=_pages(sizes, lengths, max_new_tokens, kv_dtype, page_size),
        prefill=tokens * _token_elements(sizes) * width,
        workspace=2 * CUBLAS_WORKSPACE
        + _partials(sizes)
        + 2 * len(lengths) * sizes.states  # second buffers, and a copy of the first decode step
        + (0 if whole else _over_pages(sizes, longest)),
        graphs=len(lengths) * (4 * sizes.hidden + 3 * sizes.intermediate) * width
        + len(lengths) * sizes.vocabulary * (width + 4)  # and float32 scores
        + scratch(len(lengths), _processors()),
    )


def _pages(sizes: ModelSizes, lengths: list[int], max_new_tokens: int, kv_dtype: Any, page_size: int) -> int:
    """As `BlockTable` reserves them: to the last position but one, but for pages of padding alone."""
    dtype = sizes.dtype if kv_dtype is None else KV_DTYPES[kv_dtype]
    longest = max(lengths)
    reserved = math.ceil((longest + max_new_tokens - 1) / page_size)
    nbytes = len(lengths) * sizes.states
    for layer in sizes.layers:
        dims = layer.key_dim + layer.value_dim
        token = layer.kv_heads * (dims * dtype.itemsize + 2 * 4 * (dtype in LARGEST))
        if layer.window:
            pages = len(lengths) * min(reserved, math.ceil(layer.window / page_size) + 1)
        else:
            pages = sum(reserved - (longest - length) // page_size for length in lengths)
        nbytes += (pages + 1) * page_size * token
    return nbytes


def _token_elements(sizes: ModelSizes) -> int:
    """The most that a layer of a prompt holds for a token.

    Beside the embeddings, which the decoder's forward keeps, that is in the MLP the layer's input, the residual,
    its norm, gate, up and their product; in attention q, k, v and q's products with cosines and sines, or K and V
    repeated for every query head and the result; in a norm two float32 copies. Cosines and sines come on top.
    """
    query, states = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    mlp = 4 * sizes.hidden + 3 * sizes.intermediate
    attention = 3 * sizes.hidden + 4 * query + 2 * states
    norm = 3 * sizes.hidden + 2 * sizes.hidden * 4 // sizes.dtype.itemsize
    return max(mlp, attention, norm) + 2 * sizes.head_dim


def _partials(sizes: ModelSizes) -> int:
    """Of the decode routes, float32: as many (row, head, part) items as programs, of one padded query block."""
    programs = PROGRAMS_PER_SM * _processors()
    block = padded_queries(sizes.heads // sizes.kv_heads)
    return 2 * programs * block * (next_power_of_2(sizes.head_dim) + 2) * 4


def _over_pages(sizes: ModelSizes, length: int) -> int:
    """Later chunks of a prompt: K and V of one row repeated for every query head, where torch's attention cannot
    read grouped heads, and behind a window a block's mask as bias."""
    windows = any(sizes.windows)
    grouped = torch.cuda.is_available() and takes_grouped_heads(sizes.dtype, CUDA, masked=windows)
    repeated = 0 if grouped else 2 * length * sizes.heads * sizes.head_dim
    masks = MASK_ELEMENTS if windows else 0
    return (repeated + masks) * sizes.dtype.itemsize + masks


def _processors() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else PROCESSORS
