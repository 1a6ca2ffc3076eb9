"""The loop that every decode kernel shares: one KV head's group of queries over a range of a row's tiles."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))

PART = tl.constexpr(64)
"""Elements that one product takes of float32 heads of more than 128. It adds them up one after the other, and its error
grows with their number: over 512 attention errs about three times as much as with cuBLAS's products."""


@triton.jit
def first_seen(start, end, q_len, window, CHUNKED: tl.constexpr):
    """The first position that any of a row's queries attends to: of a window, or of a chunk of that many tokens."""
    if CHUNKED:
        start += tl.maximum(end - q_len - start, 0) // window * window
    elif window > 0:
        start = tl.maximum(start, end - q_len - window + 1)
    return start


@triton.jit
def tile_range(start, end, q_len, window, TOKENS: tl.constexpr, CHUNKED: tl.constexpr):
    """First tile and number of tiles that a row's queries attend to. Tiles count from position 0."""
    first = first_seen(start, end, q_len, window, CHUNKED) // TOKENS
    return first, tl.maximum(tl.cdiv(end, TOKENS) - first, 0)


@triton.jit
def load_queries(q_ptr, row, kv_head, q_len, stride_qb, stride_qh, stride_qt,
                 G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """The query block of a KV head: row m is query m // G of head kv_head * G + m % G; 0 beyond.

    It is a tuple: parts [BLOCK_M, PART] of large float32 heads, else one [BLOCK_M, BLOCK_D].
    """
    WIDTH: tl.constexpr = PART if q_ptr.dtype.element_ty == tl.float32 and BLOCK_D > 128 else BLOCK_D
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, WIDTH)
    offsets = (kv_head * G + m % G) * stride_qh + (m // G) * stride_qt
    parts: tl.tuple = ()
    for begin in tl.static_range(0, D, WIDTH):
        mask = (m < q_len * G)[:, None] & (d + begin < D)[None, :]
        parts += (tl.load(q_ptr + row * stride_qb + offsets[:, None] + (d + begin)[None, :], mask=mask, other=0.0),)
    return parts


@triton.jit
def add_compensated(total, part, lost):
    """total + part, and what rounding that sum loses, given what was lost before."""
    part -= lost
    after = total + part
    return after, (after - total) - part


@triton.jit
def add_scaled(products, scale):
    """The sum of a tuple of products, each scaled before: Triton would make one long product of a plain sum of them."""
    total = products[0] * scale
    for part in tl.static_range(1, len(products)):
        total += products[part] * scale
    return total


@triton.jit
def _tanh(x):
    """To 2 units in the last place: by a series near 0, where the difference beyond would cancel."""
    square = x * x
    series = -0.33333150 + square * (0.13325988 + square * (-0.05305301 + square * 0.01725713))  # fitted to [0, 1/2]
    t = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    beyond = (1.0 - t) / (1.0 + t)
    return tl.where(square < 0.25, x + x * square * series, tl.where(x < 0, -beyond, beyond))


@triton.jit
def cap_scores(s, CAP: tl.constexpr):
    """CAP tanh(s) of scores s that were scaled by `score_scale`; as they are where CAP is 0."""
    if CAP > 0:
        s = CAP * _tanh(s)
    return s


@triton.jit
def mask_scores(s, n, live, positions, start, window, CHUNKED: tl.constexpr):
    """Scores s [BLOCK_M, TOKENS] of queries at `positions` and tokens at n, -inf where a query cannot see a token."""
    seen = live[None, :] & (n[None, :] <= positions[:, None])
    if CHUNKED:
        first = start + (positions - start) // window * window
        seen = seen & (n[None, :] >= first[:, None])
    elif window > 0:
        seen = seen & (n[None, :] > positions[:, None] - window)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def softmax_step(m_i, s):
    """m, the largest of m_i and scores s [BLOCK_M, TOKENS]; weights 2^(s - m); the factor 2^(m_i - m) of old sums."""
    m_new = tl.maximum(m_i, tl.max(s, 1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # no token seen so far: exp2(-inf - 0) = 0, not NaN
    return m_new, tl.exp2(s - m_safe[:, None]), tl.exp2(m_i - m_safe)


@triton.jit
def first_pages(table_ptr, start, end, q_len, window, first_tile, PAGE: tl.constexpr, TOKENS: tl.constexpr,
                CHUNKED: tl.constexpr):  # fmt: skip
    """The pages of the tokens of a range's first tile; table_ptr is at the row."""
    n = first_tile * TOKENS + tl.arange(0, TOKENS)
    lowest = first_seen(start, end, q_len, window, CHUNKED)
    return tl.load(table_ptr + n // PAGE, mask=(n >= lowest) & (n < end), other=0)


@triton.jit
def attend_tiles(q, k_ptr, v_ptr, table_ptr, next_page, start, end, q_len, window, first_tile, num_tiles,
                 scale, stride_kp, stride_vp,
                 G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, STAGES: tl.constexpr,
                 CAP: tl.constexpr, CHUNKED: tl.constexpr):  # fmt: skip
    """Online softmax (Milakov & Gimelshein 2018) in base 2 over tiles [first_tile, first_tile + num_tiles).

    q is the tuple of `load_queries`. k_ptr and v_ptr point at the KV head in page 0, table_ptr at the row of the block
    table, of which next_page is what `first_pages` gives. Returns (m, l, acc), fp32: the largest score, the sum of
    weights and the weighted sum of V; m is -inf where a query saw no token. float32 sums are compensated (Kahan 1965):
    over a thousand tiles their own rounding would outweigh all else.
    """
    COMPENSATED: tl.constexpr = q[0].dtype == tl.float32
    WIDTH: tl.constexpr = q[0].shape[1]
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if COMPENSATED:
        l_lost = l_i
        lost = acc
    d = tl.arange(0, WIDTH)
    dv = tl.arange(0, BLOCK_DV)
    positions = end - q_len + tl.arange(0, BLOCK_M) // G
    lowest = first_seen(start, end, q_len, window, CHUNKED)
    for tile in tl.range(first_tile, first_tile + num_tiles, num_stages=STAGES):
        n = tile * TOKENS + tl.arange(0, TOKENS)
        live = (n >= lowest) & (n < end)
        # Pages are looked up a tile ahead: loads that depend on a load of their own iteration are pipelined less.
        page = next_page.to(tl.int64)
        after = n + TOKENS
        next_page = tl.load(table_ptr + after // PAGE, mask=after < end, other=0)
        slot = ((n % PAGE) * D).to(tl.int64)
        products: tl.tuple = ()
        for part in tl.static_range(len(q)):
            at = d + part * WIDTH
            mask = live[:, None] & (at < D)[None, :]
            k = tl.load(k_ptr + (page * stride_kp + slot)[:, None] + at[None, :], mask=mask, other=0.0)
            products += (tl.dot(q[part], tl.trans(k), input_precision="ieee"),)
        s = cap_scores(add_scaled(products, scale), CAP)
        m_i, p, alpha = softmax_step(m_i, mask_scores(s, n, live, positions, start, window, CHUNKED))
        slot = ((n % PAGE) * DV).to(tl.int64)
        mask = live[:, None] & (dv < DV)[None, :]
        v = tl.load(v_ptr + (page * stride_vp + slot)[:, None] + dv[None, :], mask=mask, other=0.0)
        l_i = l_i * alpha
        acc = acc * alpha[:, None]
        if COMPENSATED:
            l_i, l_lost = add_compensated(l_i, tl.sum(p, 1), l_lost * alpha)
            acc, lost = add_compensated(acc, tl.dot(p, v, input_precision="ieee"), lost * alpha[:, None])
        else:
            l_i += tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc)
    return m_i, l_i, acc


@triton.jit
def add_sinks(m_i, l_i, acc, sinks_ptr, holds, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Adds the sink of each query head, a score without a value, to a softmax that `holds` it; sinks_ptr points at the
    first one's of the KV head's group."""
    m = tl.arange(0, BLOCK_M)
    mask = (m >= 0) & holds
    sinks = tl.load(sinks_ptr + m % G, mask=mask, other=float("-inf")).to(tl.float32) * LOG2E
    m_new = tl.maximum(m_i, sinks)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m_i - m_safe)
    return m_new, l_i * alpha + tl.exp2(sinks - m_safe), acc * alpha[:, None]


@triton.jit
def store_output(out_ptr, row, kv_head, l_i, acc, q_len, stride_ob, stride_ot, stride_oh,
                 G: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """acc / l to the output [rows, q_len, H_q, DV]; 0 for queries that saw no token."""
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_DV)
    out = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    offsets = (m // G) * stride_ot + (kv_head * G + m % G) * stride_oh
    mask = (m < q_len * G)[:, None] & (d < DV)[None, :]
    tl.store(out_ptr + row * stride_ob + offsets[:, None] + d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
