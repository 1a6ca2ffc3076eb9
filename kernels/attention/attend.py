"""A range of one item's tiles, over pages of the queries' dtype or of 8 bits, by the kernels of every route."""

from __future__ import annotations

import triton
import triton.language as tl

from pkv_hf.kernels.attention.tile import add_sinks, attend_tiles
from pkv_hf.kernels.attention.tile8 import attend_tiles_8bit


@triton.jit
def attend(q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, sinks_ptr, table_ptr, next_page, kv_head, start, end, q_len,
           window, first_tile, num_tiles, ends_row, scale, stride_kp, stride_kh, stride_vp, stride_vh, stride_sp,
           stride_sh, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr,
           BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, STAGES: tl.constexpr, EIGHT_BIT: tl.constexpr,
           NATIVE: tl.constexpr, CAP: tl.constexpr, CHUNKED: tl.constexpr):  # fmt: skip
    """(m, l, acc) of q, as `load_queries` has a row's and KV head's, over tiles [first_tile, first_tile + num_tiles).

    table_ptr is at the row, and next_page what `first_pages` gives of it.

    Sinks, where there are any, belong to the range that `ends_row`: one range of a row's tiles does, if it has tiles.
    """
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh
    if EIGHT_BIT:
        m_i, l_i, acc = attend_tiles_8bit(
            q, k_ptr, v_ptr, k_scale_ptr + kv_head * stride_sh, v_scale_ptr + kv_head * stride_sh, table_ptr,
            next_page, start, end, q_len, window, first_tile, num_tiles, scale, stride_kp, stride_vp, stride_sp,
            G, D, DV, PAGE, TOKENS, BLOCK_M, BLOCK_DV, STAGES, CAP, CHUNKED, EIGHT_BIT == 2, NATIVE,
        )  # fmt: skip
    else:
        m_i, l_i, acc = attend_tiles(
            q, k_ptr, v_ptr, table_ptr, next_page, start, end, q_len, window, first_tile, num_tiles, scale, stride_kp,
            stride_vp, G, D, DV, PAGE, TOKENS, BLOCK_M, BLOCK_DV, STAGES, CAP, CHUNKED,
        )  # fmt: skip
    if sinks_ptr is not None:
        m_i, l_i, acc = add_sinks(m_i, l_i, acc, sinks_ptr + kv_head * G, ends_row, G, BLOCK_M)
    return m_i, l_i, acc
