"""What launches share: checks of arguments, tile shapes by shared memory, and what is known of a device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Tile:
    """A tile of K or V: `tokens` tokens of one KV head, and how the loop over tiles is compiled."""

    tokens: int
    num_warps: int
    num_stages: int


def choose_tile(head_dim: int, itemsize: int, query_rows: int, shared_memory: int) -> Tile | None:
    """The tile of a launch that fits `shared_memory` bytes, None where the queries leave no room for any.

    `num_stages - 1` tiles of K and of V are in flight at once, beside the padded queries and a tile's weights; at the
    end the accumulator passes through the same memory.
    """
    width = next_power_of_2(head_dim)
    block_m = padded_queries(query_rows)
    for tokens, stages in ((64, 3), (64, 2), (32, 2), (16, 2)):
        if width <= 64 and tokens == 64:
            tokens = 128
        pipeline = 2 * (stages - 1) * tokens * width * itemsize
        loop = pipeline + block_m * (width * itemsize + tokens * 4)
        if max(loop, block_m * width * 4 + 8192) + 2048 <= shared_memory:
            return Tile(tokens, 4 if block_m * width <= 8192 else 8, stages)
    return None


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def padded_queries(query_rows: int) -> int:
    """Rows of a query block as `tl.dot` takes them: a power of two, at least 16."""
    return max(16, next_power_of_2(query_rows))


@functools.cache
def _properties(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory a block can have; the interpreter's CPU is a small made-up GPU."""
    if device.type != "cuda":
        return 4, 227 * 1024
    return _properties(device.index if device.index is not None else torch.cuda.current_device())


def tile_for(q: torch.Tensor, k_pages: torch.Tensor) -> Tile:
    """The tile of a launch for q `[rows, H_q, q_len, head_dim]` over pages of q's dtype. Raises ValueError for none."""
    query_rows = q.shape[2] * (q.shape[1] // k_pages.shape[1])
    shared_memory = device_limits(q.device)[1]
    tile = choose_tile(q.shape[3], q.element_size(), query_rows, shared_memory)
    if tile is None:
        raise ValueError(
            f"{query_rows} queries a KV head with head_dim={q.shape[3]} in {q.dtype} do not fit {shared_memory} bytes "
            "of shared memory: decode fewer tokens at once"
        )
    return tile


def check(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor,
    starts: torch.Tensor, ends: torch.Tensor,
) -> None:  # fmt: skip
    """Raises ValueError, naming the argument, for tensors that the kernels cannot take."""
    if q.dtype not in DTYPES or not q.dtype == k_pages.dtype == v_pages.dtype:
        raise ValueError(
            f"q, k_pages and v_pages are {q.dtype}, {k_pages.dtype}, {v_pages.dtype}: they must share one of {DTYPES}"
        )
    if k_pages.shape != v_pages.shape:
        raise ValueError(f"k_pages {list(k_pages.shape)} and v_pages {list(v_pages.shape)} differ in shape")
    num_kv_heads, page_size, head_dim = k_pages.shape[1:]
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if pages.stride(3) != 1 or pages.stride(2) != head_dim:
            raise ValueError(f"{name} has strides {pages.stride()}: a head's tokens of one page must be contiguous")
    if q.shape[3] != head_dim or q.stride(3) != 1:
        raise ValueError(f"q is {list(q.shape)} with strides {q.stride()}: want a contiguous head_dim of {head_dim}")
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise ValueError(f"head_dim={head_dim} is not a multiple of 16 from 16 to 256")
    if page_size & (page_size - 1) or not 16 <= page_size <= 256:
        raise ValueError(f"page_size={page_size} is not a power of two from 16 to 256")
    if q.shape[1] % num_kv_heads or q.shape[1] // num_kv_heads > 16:
        raise ValueError(f"{q.shape[1]} query heads over {num_kv_heads} KV heads: want a whole group of at most 16")
    for name, tensor in (("block_table", block_table), ("starts", starts), ("ends", ends)):
        if tensor.dtype != torch.int32 or len(tensor) != len(q) or tensor.stride(-1) != 1:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}: want contiguous int32, {len(q)} rows")
