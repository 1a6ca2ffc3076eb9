"""FlashInfer's decode paths as routes: same pages, same appends, the library's kernels for attention."""

from __future__ import annotations

import numpy as np
import torch

from pkv_hf.cache.layer import PagedLayer
from pkv_hf.cache.table import BlockTable
from pkv_hf.kernels.flashinfer import PLANNED_GROUPS, XQA_CAPABILITIES, XQA_PAGE_SIZES, Planned, Xqa
from pkv_hf.kernels.launch import capability
from pkv_hf.routes.base import Accepted, Bounds, Rejected, Scores, StepShape, installed
from pkv_hf.routes.costs import Work
from pkv_hf.routes.triton import Triton


class _FlashInfer(Triton):
    """What the three paths share. Pages are appended by our kernels."""

    def supports(self, shape: StepShape) -> Accepted | Rejected:
        if not installed("flashinfer"):
            return Rejected("flashinfer is not installed")
        if reason := self.refuses(shape):
            return Rejected(reason)
        if shape.q_len > 1:
            return Rejected(f"{shape.q_len} queries a row, FlashInfer's decode takes one")
        if shape.dtype not in (torch.float16, torch.bfloat16):
            return Rejected(f"{shape.dtype} is not one of float16, bfloat16")
        if shape.head_dim not in (64, 128, 256):
            return Rejected(f"head_dim {shape.head_dim} is not one of 64, 128, 256")
        if shape.value_dim != shape.head_dim:
            return Rejected(f"keys have head_dim {shape.head_dim}, values {shape.value_dim}: FlashInfer takes one")
        if shape.softcap or shape.sinks or shape.chunked:
            return Rejected("FlashInfer is given no sinks, no soft-cap and no chunks")
        if shape.kv_dtype != shape.dtype:
            return Rejected(f"queries are {shape.dtype}, pages {shape.kv_dtype}")
        if shape.padded:
            return Rejected("left padding: FlashInfer's rows begin where a page does")
        if shape.windowed:
            return Rejected("pages behind a sliding window are not held")
        if shape.device.type != "cuda":
            return Rejected(f"FlashInfer needs a GPU, the step is on {shape.device.type}")
        return super().supports(shape)

    def refuses(self, shape: StepShape) -> str:
        """Why this path in particular does not take a step, empty where it does."""
        raise NotImplementedError


class FlashInfer(_FlashInfer):
    """The planned wrapper on CUDA cores. It is planned on the host, once a step, and not captured."""

    name = "flashinfer"
    tensor_cores = False

    def refuses(self, shape: StepShape) -> str:
        if shape.captured:
            return "planned on the host at every step, which no CUDA graph does: pass cuda_graphs=False"
        if not self.tensor_cores and shape.group not in PLANNED_GROUPS:
            return f"{shape.group} query heads a KV head, it is compiled for {PLANNED_GROUPS}"
        return ""

    def work(self, shape: StepShape) -> Work:
        programs = 2 * shape.processors
        return shape.work(-(-shape.tokens * shape.kv_heads // programs), 2, programs)

    def decode(self, layer: PagedLayer, q: torch.Tensor, scores: Scores, bounds: Bounds) -> torch.Tensor:
        table = layer.table
        key = (self.name, q.device)
        planned = table.held_by_routes.get(key)
        if planned is None:
            planned = table.held_by_routes[key] = Planned(q.device, tensor_cores=self.tensor_cores)
        kind = q.shape[1], *layer.pages[0].shape[1:], scores.scale
        if bounds.plans.get(key) != kind:  # of the step's layers, which are mostly alike
            pages = table.pages[:, : -(-bounds.end // table.page_size)]
            indices = torch.from_numpy(pages.reshape(-1).copy()).to(q.device)
            planned.plan(indices, np.full(table.rows, bounds.end), q, layer.pages[0], scores.scale)
            bounds.plans[key] = kind
        return planned.run(q, *layer.pages)


class FlashInferTensorCores(FlashInfer):
    """The planned wrapper on tensor cores."""

    name = "flashinfer_tc"
    tensor_cores = True


class FlashInferXqa(_FlashInfer):
    """The plan-free path: a rectangle of rows and parts of the longest one, which can be captured."""

    name = "flashinfer_xqa"

    def refuses(self, shape: StepShape) -> str:
        if shape.page_size not in XQA_PAGE_SIZES:
            return f"page_size {shape.page_size} is not one of {XQA_PAGE_SIZES}"
        on_gpu = shape.device.type == "cuda"
        if on_gpu and capability(shape.device)[0] not in XQA_CAPABILITIES:
            return "XQA runs on sm_90, sm_100 and sm_120"
        return ""

    def work(self, shape: StepShape) -> Work:
        items = shape.rows * shape.kv_heads
        splits = max(1, round(shape.processors / items))
        return shape.work(-(-shape.longest // splits), 1, items * splits if splits > 1 else 0)

    def prepare(self, table: BlockTable, device: torch.device) -> None:
        if (self.name, device) not in table.held_by_routes:
            table.held_by_routes[self.name, device] = Xqa(device)

    def decode(self, layer: PagedLayer, q: torch.Tensor, scores: Scores, bounds: Bounds) -> torch.Tensor:
        self.prepare(layer.table, q.device)
        xqa = layer.table.held_by_routes[self.name, q.device]
        return xqa.run(q, *layer.pages, layer.table.on(q.device)[0], bounds.on(q.device)[1], scores.scale)
