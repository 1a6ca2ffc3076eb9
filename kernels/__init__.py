"""Paged attention: a torch reference and Triton kernels. Knows tensors, nothing of transformers.

Shapes and names are the same everywhere. Pools `k_pages`, `v_pages` are `[num_pages, H_kv, page_size, head_dim]`;
position `p` of row `b` is in page `block_table[b, p // page_size]` (int32 `[rows, max_pages]`), and page 0 is the null
page. Tokens [starts[b], ends[b]) of a row are live (int32 `[rows]`); the `q_len` queries of a row are its last ones, so
that query `t` is at position `ends[b] - q_len + t` and attends from `starts[b]` (or its window) to itself.

Importing this package imports no Triton; the modules with kernels do.
"""
