"""What launches share: checks of arguments, tile shapes by shared memory, and what is known of a device."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TypeVar

import torch

from pkv_hf.kernels.quantize import LARGEST

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

MOST_HEAD_DIM = 512


def is_head_dim(elements: int) -> bool:
    """Whether the attention kernels take heads of so many elements."""
    return elements % 16 == 0 and 16 <= elements <= MOST_HEAD_DIM


PROGRAMS_PER_SM = 2
"""Programs that share a multiprocessor, in every route."""


@dataclass(frozen=True)
class Tile:
    """A tile of K or V: `tokens` tokens of one KV head, and how the loop over tiles is compiled."""

    tokens: int
    num_warps: int
    num_stages: int


@functools.cache
def choose_tile(
    head_dim: int, itemsize: int, query_rows: int, shared_memory: int, kv_itemsize: int | None = None
) -> Tile | None:
    """The tile of a launch that fits `shared_memory` bytes, None where the queries leave no room for any.

    `head_dim` is the larger one of K's and V's, `itemsize` that of the queries, `kv_itemsize` that of the pages where
    it is another.
    `num_stages - 1` tiles of K and of V are in flight at once, beside the padded queries and a tile's weights; at the
    end the accumulator passes through the same memory. sm_90 and sm_100, which alone have more than 164 KiB, multiply
    64 rows and more of a half type asynchronously: the tile that is read stays, the weights are elsewhere, and what is
    unpacked of 8 bits lies beside. So does one operand of float32 that was of 8 bits.
    Products of float32 take their operands from registers, which 8192 elements over 8 warps leave enough of.
    """
    width = next_power_of_2(head_dim)
    kv_itemsize = itemsize if kv_itemsize is None else kv_itemsize
    block_m = padded_queries(query_rows)
    asynchronous = itemsize == 2 and block_m >= 64 and shared_memory > 164 * 1024
    for tokens, stages in ((64, 3), (64, 2), (32, 2), (16, 2)):
        if itemsize == 4:
            tokens = min(tokens, 8192 // width)
        elif width * kv_itemsize <= 128 and tokens == 64:
            tokens = 128
        in_flight, weights = (stages, 0) if asynchronous else (stages - 1, block_m * tokens * 4)
        loop = 2 * in_flight * tokens * width * kv_itemsize + block_m * width * itemsize + weights
        if kv_itemsize < itemsize:
            loop += (2 if asynchronous else itemsize == 4) * tokens * width * itemsize
        if max(loop, block_m * width * 4 + 8192) + 2048 <= shared_memory:
            return Tile(tokens, 4 if itemsize == 2 and width <= 256 and block_m * width <= 8192 else 8, stages)
    return None


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def padded_queries(query_rows: int) -> int:
    """Rows of a query block as `tl.dot` takes them: a power of two, at least 16."""
    return max(16, next_power_of_2(query_rows))


@functools.cache
def _properties(index: int) -> tuple[int, int, tuple[int, int]]:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin, capability


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()


FIRST_CAPABILITY = {torch.bfloat16: (8, 0), torch.float8_e4m3fn: (8, 9)}
"""The first compute capability that multiplies bfloat16, and that converts float8_e4m3; all have the other dtypes."""


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU, (9, 0) for sm_90; above all of them for the interpreter's CPU."""
    return _properties(_index(device))[2] if device.type == "cuda" else (99, 0)


def has_dtypes(device: torch.device, *dtypes: torch.dtype | None) -> bool:
    """Whether kernels run with all of these dtypes on a device."""
    return all(capability(device) >= FIRST_CAPABILITY.get(dtype, (0, 0)) for dtype in dtypes)


def device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory a block can have; the interpreter's CPU is a small made-up GPU."""
    return _properties(_index(device))[:2] if device.type == "cuda" else (2, 227 * 1024)


MERGED_AT_ONCE = 32
"""Partial results that a merge loads at once."""


def splits_for(items: int, tiles: int, processors: int) -> int:
    """How many parts to cut each of `items` (row, KV head) pairs of `tiles` tiles into, to fill the device.

    A merge goes around for parts beyond a multiple of what it loads at once, which costs more than they gain.
    """
    most = PROGRAMS_PER_SM * processors // items
    if most > MERGED_AT_ONCE:
        most -= most % MERGED_AT_ONCE
    return max(1, min(tiles, most))


REMEMBERED = 4096
"""Shapes and strides that are known to be good; every cache has strides of its own."""

Value = TypeVar("Value")


class Remembered(dict[tuple, Value]):
    """What was worked out for tensors as `described`; forgets all of it where that gets too much."""

    def __setitem__(self, key: tuple, value: Value) -> None:
        if len(self) >= REMEMBERED:
            self.clear()
        super().__setitem__(key, value)


def described(*tensors: torch.Tensor | None) -> tuple:
    """All that checks of tensors depend on."""
    return tuple(
        None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors
    )


def check_pages(
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    states: dict[str, torch.Tensor],
    values: dict[str, torch.Tensor],
    rows: dict[str, torch.Tensor],
) -> None:
    """Raises ValueError, naming the argument, for tensors that the kernels cannot take.

    `states` are queries or keys `[rows, heads, q_len, head_dim]` of K's head_dim, `values` are of V's, `rows` the block
    table and the bounds.
    """
    if k_pages.shape[:3] != v_pages.shape[:3]:
        raise ValueError(
            f"k_pages {list(k_pages.shape)} and v_pages {list(v_pages.shape)} differ in shape, not in head_dim alone"
        )
    page_size = k_pages.shape[2]
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        head_dim = pages.shape[3]
        if pages.stride(3) != 1 or pages.stride(2) != head_dim:
            raise ValueError(f"{name} has strides {pages.stride()}: a head's tokens of one page must be contiguous")
        if not is_head_dim(head_dim):
            raise ValueError(f"{name} has head_dim={head_dim}, not a multiple of 16 from 16 to {MOST_HEAD_DIM}")
    if page_size & (page_size - 1) or not 16 <= page_size <= 256:
        raise ValueError(f"page_size={page_size} is not a power of two from 16 to 256")
    count = 0
    for pages, of_pages in ((k_pages, states), (v_pages, values)):
        for name, tensor in of_pages.items():
            count = count or len(tensor)
            if len(tensor) != count or tensor.shape[3] != pages.shape[3] or tensor.stride(3) != 1:
                raise ValueError(
                    f"{name} is {list(tensor.shape)} with strides {tensor.stride()}: want {count} rows and a "
                    f"contiguous head_dim of {pages.shape[3]}"
                )
    check_rows(rows, count)
    for name, tensor in (states | values | rows).items():
        if tensor.device != k_pages.device:
            raise ValueError(f"{name} is on {tensor.device}, the pages on {k_pages.device}: move one to the other")


def check_rows(rows: dict[str, torch.Tensor], count: int) -> None:
    """Raises ValueError for what is not contiguous int32 of `count` rows."""
    for name, tensor in rows.items():
        if tensor.dtype != torch.int32 or len(tensor) != count or tensor.stride(-1) != 1:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}: want contiguous int32, {count} rows")


Scales = tuple[torch.Tensor, torch.Tensor]
"""Of quantised K and V pages, each float32 `[num_pages, H_kv, page_size]`; see `quantize`."""


def check_scales(k_pages: torch.Tensor, v_pages: torch.Tensor, scales: Scales | None) -> None:
    """Raises ValueError, naming the argument, unless quantised pages, and only those, come with their scales."""
    quantized = k_pages.dtype in LARGEST
    if quantized != (scales is not None):
        raise ValueError(f"scales are {'missing' if quantized else 'given'} for pages of {k_pages.dtype}")
    if scales is None:
        return
    for name, tensor, pages in zip(("k_scales", "v_scales"), scales, (k_pages, v_pages)):
        if tensor.shape != pages.shape[:3] or tensor.dtype != torch.float32 or tensor.stride(2) != 1:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}: want float32 "
                f"{list(pages.shape[:3])}, a page's contiguous"
            )
    if scales[0].stride() != scales[1].stride():
        raise ValueError(f"k_scales and v_scales differ in strides: {scales[0].stride()} and {scales[1].stride()}")


def check_rope(
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    states: dict[str, torch.Tensor],
    held: dict[str, torch.Tensor],
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    scales: Scales | None,
) -> None:
    """Raises ValueError, naming the argument, for what `append.rope_append` cannot take."""
    q, k, v = states.values()
    check_pages(k_pages, v_pages, {"q": q, "k": k}, {"v": v}, held)
    check_scales(k_pages, v_pages, scales)
    if k.shape != v.shape or k.shape[1] != k_pages.shape[1] or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"k is {list(k.shape)} and v {list(v.shape)}: want both with {k_pages.shape[1]} heads, {q.shape[2]} tokens"
        )
    heads = q.shape[3], q.shape[3]
    whole = q.shape[1] * q.shape[3], k.shape[1] * q.shape[3]
    if norms and not norms[0].dtype == norms[1].dtype == q.dtype:
        raise ValueError(f"norms are {norms[0].dtype} and {norms[1].dtype}, q {q.dtype}: want the same")
    if norms and (norms[0].numel(), norms[1].numel()) not in (heads, whole):
        found = norms[0].numel(), norms[1].numel()
        raise ValueError(f"norms are of {found} elements: want {heads}, of a head, or {whole}, of all heads")


def check_angles(q: torch.Tensor, angles: dict[str, torch.Tensor | None], rotary: int) -> None:
    """Raises ValueError, naming the argument, unless cos and sin fit q and what is turned of its heads."""
    if rotary % 2 or not 0 <= rotary <= q.shape[3]:
        raise ValueError(f"rotary={rotary} is not an even number from 0 to head_dim, {q.shape[3]}")
    cos = angles["cos"]
    for name, tensor in angles.items() if rotary else ():
        if cos is None or tensor is None:
            raise ValueError(f"{name} is None: want it, or rotary=0")
        alike = len(tensor) == len(cos) and tensor.stride()[len(cos) == 1 :] == cos.stride()[len(cos) == 1 :]
        if len(tensor) not in (1, len(q)) or tensor.shape[1:] != (q.shape[2], rotary) or not alike:
            raise ValueError(
                f"{name} is {list(tensor.shape)} with strides {tensor.stride()}: want {[q.shape[2], rotary]} for one "
                "row or all, cos and sin alike"
            )
        if tensor.dtype != cos.dtype or tensor.dtype not in (q.dtype, torch.float32) or tensor.stride(2) != 1:
            raise ValueError(f"{name} is {tensor.dtype}: want q's {q.dtype} or float32, as the other, contiguous")
