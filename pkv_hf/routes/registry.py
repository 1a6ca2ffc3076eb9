"""All routes, by name: a new one is a file beside this, and an entry here."""

from __future__ import annotations

from pkv_hf.routes.base import Route
from pkv_hf.routes.flashinfer import FlashInfer, FlashInferTensorCores, FlashInferXqa
from pkv_hf.routes.sdpa import Sdpa
from pkv_hf.routes.triton import Split, Workqueue

ROUTES: dict[str, Route] = {
    route.name: route
    for route in (Split(), Workqueue(), FlashInfer(), FlashInferTensorCores(), FlashInferXqa(), Sdpa())
}
