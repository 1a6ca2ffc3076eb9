"""FlashInfer's three paged decode paths: planned on CUDA cores or on tensor cores, and plan-free (XQA).

All take one query a row, rows from position 0 on, and pages of any strides that K and V share. What they need beside
their inputs (128 MiB of workspace) is held by the object that runs them; one object is used by one stream at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

WORKSPACE_NBYTES = 128 << 20
SEMAPHORE_NBYTES = 8 << 20

PLANNED_GROUPS = (1, 2, 3, 4, 6, 8, 16)
"""Query heads a KV head that the CUDA-core kernel is compiled for; tensor cores and XQA take any."""
XQA_PAGE_SIZES = (16, 32, 64, 128)
XQA_CAPABILITIES = (9, 10, 12)
"""Major compute capabilities that XQA runs on."""


class Planned:
    """`BatchDecodeWithPagedKVCacheWrapper`: `plan` once a step from lengths on the host, then `run` for every layer.

    With `rows` and `max_pages` (pages of all rows together, at most) its buffers stay in place: a CUDA graph of `run`
    can be replayed after another `plan` of as many rows.
    """

    def __init__(
        self, device: torch.device, *, tensor_cores: bool, rows: int | None = None, max_pages: int | None = None
    ) -> None:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        buffers: dict[str, Any] = {}
        if rows is not None and max_pages is not None:
            buffers = {
                "use_cuda_graph": True,
                "paged_kv_indptr_buffer": torch.zeros(rows + 1, dtype=torch.int32, device=device),
                "paged_kv_indices_buffer": torch.zeros(max_pages, dtype=torch.int32, device=device),
                "paged_kv_last_page_len_buffer": torch.ones(rows, dtype=torch.int32, device=device),
            }
        workspace = torch.zeros(WORKSPACE_NBYTES, dtype=torch.uint8, device=device)
        self.wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=tensor_cores, **buffers)
        self._copied = torch.cuda.Event()

    def plan(
        self, indices: torch.Tensor, lengths: np.ndarray, q: torch.Tensor, k_pages: torch.Tensor, scale: float
    ) -> None:
        """Plans a step: `indices` are the rows' pages end to end (int32), `lengths` their tokens, on the host."""
        self._copied.synchronize()  # the library's one pinned buffer: the last plan's copy has to have left it
        page_size = k_pages.shape[2]
        counts = -(-lengths // page_size)
        self.wrapper.plan(
            torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)),
            indices,
            torch.from_numpy((lengths - (counts - 1) * page_size).astype(np.int32)),
            q.shape[1],
            k_pages.shape[1],
            k_pages.shape[3],
            page_size,
            q_data_type=q.dtype,
            kv_data_type=k_pages.dtype,
            sm_scale=scale,
        )
        self._copied.record()

    def run(self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor) -> torch.Tensor:
        """Attention of q `[rows, H_q, 1, head_dim]` over the planned pages, as `[rows, 1, H_q, head_dim]`."""
        return self.wrapper.run(q[:, :, 0], (k_pages, v_pages))[:, None]


class Xqa:
    """`xqa_batch_decode_with_kv_cache`: block table and lengths stay on the device, so that it can be captured."""

    def __init__(self, device: torch.device) -> None:
        self.workspace = torch.zeros(WORKSPACE_NBYTES + SEMAPHORE_NBYTES, dtype=torch.uint8, device=device)

    def run(
        self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
        block_table: torch.Tensor, ends: torch.Tensor, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        """Attention of q `[rows, H_q, 1, head_dim]` over positions [0, ends[row]), as `[rows, 1, H_q, head_dim]`."""
        from flashinfer.decode import xqa_batch_decode_with_kv_cache

        longest = block_table.shape[1] * k_pages.shape[2]
        return xqa_batch_decode_with_kv_cache(
            q[:, :, 0].contiguous(), (k_pages, v_pages), self.workspace, block_table, ends, longest,
            bmm1_scale=scale, kv_layout="HND",
        )[:, None]  # fmt: skip
