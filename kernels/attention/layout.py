"""What the decode kernels are launched with: checked once for shapes, strides and dtypes that were not seen before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from pkv_hf.kernels.launch import (
    DTYPES,
    Remembered,
    Scales,
    Tile,
    check_pages,
    check_scales,
    choose_tile,
    described,
    device_limits,
    next_power_of_2,
    padded_queries,
)
from pkv_hf.kernels.quantize import LARGEST

LOG2E = math.log2(math.e)

EIGHT_BIT = {torch.int8: 1, torch.float8_e4m3fn: 2}
"""What kernels call the dtypes of quantised pages; 0 are pages of the queries' dtype."""


@dataclass(frozen=True)
class Layout:
    """A launch by its tensors' shapes, strides and dtypes."""

    rows: int
    q_len: int
    num_kv_heads: int
    group: int
    value_dim: int
    """Elements of a head's V, and so of its output."""
    tile: Tile
    block_m: int
    block_dv: int
    strides: tuple[int, ...]
    """Of q (row, head, token), K (page, head), V (page, head) and scales (page, head), as the kernels have them."""
    constants: tuple[Any, ...]
    """G, D, DV, PAGE, TOKENS, BLOCK_M, BLOCK_D, BLOCK_DV, STAGES, EIGHT_BIT, NATIVE, CAP, CHUNKED."""
    merge_constants: tuple[int, int, int, int]
    """G, DV, BLOCK_M, BLOCK_DV."""
    kind: int
    """Stands for all that the kernels are compiled for, and the device."""

    @property
    def items(self) -> int:
        """Pairs of a row and a KV head."""
        return self.rows * self.num_kv_heads

    @property
    def merge_warps(self) -> int:
        """One loads and adds up 32 parts of a query head at once; more have to wait for each other."""
        return max(1, self.block_dv // 128)

    def states(self, slots: int, device: torch.device) -> torch.Tensor:
        """Memory for partial results, float32: acc `[slots, BLOCK_M, BLOCK_DV]`, then m and l `[slots, 2, BLOCK_M]`."""
        return torch.empty(slots * self.block_m * (self.block_dv + 2), dtype=torch.float32, device=device)

    def output(self, q: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """`out`, or a new output `[rows, q_len, H_q, value_dim]`. Raises ValueError for one that q does not fit."""
        shape = (self.rows, self.q_len, self.num_kv_heads * self.group, self.value_dim)
        if out is None:
            return torch.empty(shape, dtype=q.dtype, device=q.device)
        if out.shape != shape or out.dtype != q.dtype or out.device != q.device or out.stride(3) != 1:
            raise ValueError(
                f"out is {out.dtype} {list(out.shape)} on {out.device}: want {q.dtype} {list(shape)} on {q.device}"
            )
        return out


_layouts: Remembered[Layout] = Remembered()
_kinds: dict[tuple, int] = {}


def layout_of(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    scales: Scales | None,
    sinks: torch.Tensor | None,
    softcap: float,
    window: int,
    chunked: bool,
) -> Layout:
    """The layout of a decode launch. Raises ValueError, naming the argument, for what the kernels cannot take."""
    if chunked and window < 1:
        raise ValueError(f"chunked=True with window={window}: pass the tokens of a chunk as the window")
    tensors = (q, k_pages, v_pages, block_table, starts, ends, sinks)
    key = (softcap, chunked, *(described(*tensors) if scales is None else described(*tensors, *scales)))
    layout = _layouts.get(key)
    if layout is None:
        _check(q, k_pages, v_pages, block_table, starts, ends, scales, sinks, softcap)
        layout = _layouts[key] = _layout(q, k_pages, v_pages, scales, sinks, softcap, chunked)
    return layout


def words(pages: torch.Tensor) -> torch.Tensor:
    """Pages as the kernels read them: quantised ones by pairs of elements, int16 `[..., head_dim / 2]`."""
    return pages.view(torch.int16) if pages.dtype in LARGEST else pages


def _layout(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, scales: Scales | None,
    sinks: torch.Tensor | None, softcap: float, chunked: bool,
) -> Layout:  # fmt: skip
    rows, heads, q_len, head_dim = q.shape
    num_kv_heads, page_size, value_dim = k_pages.shape[1], k_pages.shape[2], v_pages.shape[3]
    group = heads // num_kv_heads
    tile = tile_for(q, k_pages, v_pages)
    block_m = padded_queries(q_len * group)
    blocks = [next_power_of_2(head_dim), next_power_of_2(value_dim)]
    if scales is not None:
        blocks = [max(block, 32) for block in blocks]  # products of half the width, of at least 16 elements
    strides = (*q.stride()[:3], *words(k_pages).stride()[:2], *words(v_pages).stride()[:2])
    constants = (
        group, head_dim, value_dim, page_size, tile.tokens, block_m, *blocks, tile.num_stages,
        EIGHT_BIT.get(k_pages.dtype, 0), q.device.type == "cuda", softcap * LOG2E, chunked,
    )  # fmt: skip
    kind = constants, q.dtype, k_pages.dtype, None if sinks is None else sinks.dtype, q.device
    return Layout(
        rows, q_len, num_kv_heads, group, value_dim, tile, block_m, blocks[1],
        (*strides, *(scales[0].stride()[:2] if scales else (0, 0))), constants, (group, value_dim, block_m, blocks[1]),
        _kinds.setdefault(kind, len(_kinds)),
    )  # fmt: skip


def tile_for(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor) -> Tile:
    """The tile of a launch for q `[rows, H_q, q_len, head_dim]` over pages. Raises ValueError for none."""
    query_rows, head_dim = q.shape[2] * (q.shape[1] // k_pages.shape[1]), max(q.shape[3], v_pages.shape[3])
    shared_memory = device_limits(q.device)[1]
    tile = choose_tile(head_dim, q.element_size(), query_rows, shared_memory, k_pages.element_size())
    if tile is None:
        raise ValueError(
            f"{query_rows} queries a KV head with head_dim={head_dim} in {q.dtype} do not fit {shared_memory} bytes "
            "of shared memory: decode fewer tokens at once"
        )
    return tile


def _check(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor, starts: torch.Tensor,
    ends: torch.Tensor, scales: Scales | None, sinks: torch.Tensor | None, softcap: float,
) -> None:  # fmt: skip
    """Raises ValueError, naming the argument, for what the decode kernels cannot take."""
    pages_dtype = q.dtype if k_pages.dtype not in LARGEST else k_pages.dtype
    if q.dtype not in DTYPES or not pages_dtype == k_pages.dtype == v_pages.dtype:
        raise ValueError(
            f"q, k_pages and v_pages are {q.dtype}, {k_pages.dtype}, {v_pages.dtype}: they must share one of {DTYPES}, "
            f"or both pages be one of {tuple(LARGEST)}"
        )
    check_scales(k_pages, v_pages, scales)
    rows = {"block_table": block_table, "starts": starts, "ends": ends}
    check_pages(k_pages, v_pages, {"q": q}, {}, rows)
    num_kv_heads = k_pages.shape[1]
    if q.shape[1] % num_kv_heads or q.shape[1] // num_kv_heads > 16:
        raise ValueError(f"{q.shape[1]} query heads over {num_kv_heads} KV heads: want a whole group of at most 16")
    if not softcap >= 0:
        raise ValueError(f"softcap={softcap}: want the most that a score can be, or 0 for none")
    if sinks is None:
        return
    if sinks.shape != q.shape[1:2] or sinks.dtype not in DTYPES or sinks.stride(0) != 1 or sinks.device != q.device:
        raise ValueError(
            f"sinks are {sinks.dtype} {list(sinks.shape)} on {sinks.device}: want one of {DTYPES}, contiguous, "
            f"[{q.shape[1]}] on {q.device}"
        )


def score_scale(scale: float, softcap: float) -> float:
    """What the kernels scale scores by: to exponents of 2, or to what CAP tanh() makes such of, CAP of `softcap`."""
    return scale / softcap if softcap else scale * LOG2E
