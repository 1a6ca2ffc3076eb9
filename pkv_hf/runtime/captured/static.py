"""One decode step of a cache over buffers that stay where they are: run as it is, or captured once and replayed."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch

from pkv_hf import compat
from pkv_hf.cache import linear
from pkv_hf.cache.paged import PagedCache
from pkv_hf.kernels.reference import NextStep
from pkv_hf.replaced import original
from pkv_hf.routes.base import Bounds, Route
from pkv_hf.runtime.ahead.found import StandIn
from pkv_hf.runtime.ahead.greedy import Selection
from pkv_hf.runtime.ahead.logits import Logits
from pkv_hf.runtime.captured.graphs import CaptureError, GraphMemories, GraphMemory
from pkv_hf.runtime.fusion import Fusion
from pkv_hf.runtime.step import Step, launching_on

NOTHING: dict[str, torch.Tensor] = {}

UNKNOWN = -1
"""Where the ends on the device stand before a run has ended: while one is queued, or was interrupted."""


def run_decoder(
    decoder: Any, inputs: torch.Tensor, positions: torch.Tensor, step: Step, head: Logits | None,
    along: dict[str, torch.Tensor] = NOTHING,
) -> torch.Tensor:  # fmt: skip
    """Hidden states `[B, q_len, hidden]` by a decoder's own forward, whose layers a step may fuse; or `head`'s logits.

    Inputs are tokens (int64 `[B, q_len]`) or their embeddings (floating `[B, q_len, hidden]`); positions are int64
    `[..., B, q_len]`, with as many planes before the rows as the decoder is given (mRoPE has three or four). `along`
    are other arguments of the decoder, `[B, q_len, ...]`.
    """
    name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
    call: dict[str, Any] = {name: inputs, "position_ids": positions, "attention_mask": None, "use_cache": True}
    output = original(decoder, "forward")(**call, **along, **{compat.CACHE: step.cache})
    return output.last_hidden_state if head is None else head(output.last_hidden_state, step.fusion.product)


class StaticStep:
    """Decodes `q_len` tokens a row over static buffers, through a CUDA graph where one is asked for.

    A graph holds addresses: it is captured anew when a block table or a pool has moved, or a row outgrows what its
    launches were sized for. Positions and ends advance on the device, at the end of every step; the host writes them
    only where its own count differs, as after a crop, or where a run did not end. Belongs to one cache, which it does
    not hold, and holds no weights: caches outlive models.
    """

    def __init__(
        self,
        decoder: Any,
        head: Logits | None,
        route: Route,
        q_len: int,
        fusion: Fusion,
        stand_in: StandIn | None = None,
    ) -> None:
        self._decoder = weakref.ref(decoder)
        self.head = head
        """What makes logits of the hidden states, where the step computes them."""
        self.selection: Selection | None = None
        """What takes the next tokens by the logits, where the step does: it goes on with them, `q_len` 1."""
        self.route = route
        self.q_len = q_len
        self._fusion = weakref.ref(fusion)
        weight = next(decoder.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self._stand_in = stand_in
        """Tokens that another stands for in the decoder."""
        self._others = torch.tensor([] if stand_in is None else stand_in.tokens, device=self.device)
        self.horizon = 0
        self.captures = 0
        self.lacks_memory = False
        """Whether memory ran out when it was to be captured."""
        self._memory: GraphMemory | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: torch.Tensor | None = None
        self._addresses: tuple[Any, ...] = ()
        self.inputs: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.along: dict[str, torch.Tensor] = {}
        self._starts: np.ndarray | None = None  # what `starts` on the device holds; None before there are buffers
        self._end = UNKNOWN  # what `ends` on the device stand at, and `positions` with them

    def run(
        self,
        cache: PagedCache,
        inputs: torch.Tensor | None,
        positions: torch.Tensor | None,
        starts: np.ndarray,
        memories: GraphMemories | None,
        along: dict[str, torch.Tensor] = NOTHING,
    ) -> torch.Tensor:
        """Appends tokens to the cache; returns what `run_decoder` does, or `selection`, in a buffer of the graph.

        `inputs` are the tokens, int64 `[B, q_len]`, or their embeddings, floating `[B, q_len, hidden]`; None for those
        that the last run took.
        `positions` are `[..., 1 or B, q_len]`; None continues from the step before. `starts` are first real positions.
        `memories` are what to capture into, None to run without a graph. `along` are other arguments of the decoder,
        `[B, q_len, ...]`.

        Raises CaptureError, with the cache as it was, where a graph was wanted and the forward cannot be captured.
        Whatever else interrupts it leaves the cache as it was, too. `PagedCache.take_back` takes a step back.
        """
        begin = cache.get_seq_length()
        end = begin + self.q_len
        stood_at, self._end = self._end, UNKNOWN
        # torch forbids to write outside of inference mode what was made inside
        with torch.inference_mode(False), torch.no_grad(), launching_on(self.device):
            # Outside of the graph: states are known to be copied before it may run, wherever that is interrupted.
            before = cache.last_step.begin(cache)
            try:
                self._place(cache, begin, end)
                self._fill_buffers(inputs, positions, starts, end, stood_at)
                self._fill_along(along)
                output = self._body(cache, begin) if memories is None else self._replay(cache, begin, memories)
                for layer in cache.paged_layers:
                    layer.length = end
                cache.last_step.end(before)
            except BaseException as error:
                cache.go_back(before)
                if isinstance(error, CaptureError):  # the buffers are filled, and a capture runs nothing
                    self._end = end
                raise
        self._end = end + self.q_len
        return output

    def _fill_buffers(
        self, inputs: torch.Tensor | None, positions: torch.Tensor | None, starts: np.ndarray, end: int, stood_at: int
    ) -> None:
        """Writes what the step reads, where the device does not hold it already: its ends stand at `stood_at`."""
        if self._starts is None:
            self.starts = torch.zeros(len(starts), dtype=torch.int32, device=self.device)
            self.ends = torch.zeros_like(self.starts)
        if self._starts is None or not np.array_equal(starts, self._starts):
            self._starts = starts
            self.starts.copy_(torch.from_numpy(starts.astype(np.int32)))
            self.drop()  # sizes of launches depend on the shortest padding
        if end != stood_at:
            if positions is None:
                raise RuntimeError(f"the cache came to hold {end - self.q_len} tokens while its next step was queued")
            self.ends.fill_(end)
        if positions is not None:
            shape = (*positions.shape[:-2], len(starts), self.q_len)
            self.positions = self._buffer(self.positions, shape, torch.int64)
            self.positions.copy_(positions)
        if inputs is not None:
            self.inputs = self._buffer(self.inputs, tuple(inputs.shape), inputs.dtype)
            self.inputs.copy_(inputs)

    def _fill_along(self, along: dict[str, torch.Tensor]) -> None:
        if along.keys() != self.along.keys():
            self.along = {}
            self.drop()
        for name, value in along.items():
            self.along[name] = self._buffer(self.along.get(name), tuple(value.shape), value.dtype)
            self.along[name].copy_(value)

    def _buffer(self, held: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A buffer of a shape and dtype: the one that is held, or a fresh one where that is of another."""
        if held is not None and held.shape == shape and held.dtype == dtype:
            return held
        self.drop()  # a graph reads the one before
        return torch.zeros(shape, dtype=dtype, device=self.device)

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def _place(self, cache: PagedCache, begin: int, end: int) -> None:
        """Makes pages for positions [begin, end), and forgets a graph of addresses or sizes that have changed."""
        if end > self.horizon:
            self.horizon = max(1 << (end - 1).bit_length(), *(table.expected for table in cache.tables.values()))
            self.drop()
        addresses: list[Any] = []
        for table in cache.tables.values():
            table.prepare(begin, end)
            self.route.prepare(table, self.device)
            addresses.append(table.pool.version)
            addresses += (tensor.data_ptr() for tensor in table.on(self.device))
        addresses += linear.addresses(cache.linear_layers)
        if tuple(addresses) != self._addresses:
            self._addresses = tuple(addresses)
            self.drop()

    def _body(self, cache: PagedCache, begin: int, captured: bool = False) -> torch.Tensor:
        assert self._starts is not None
        assert self.inputs is not None
        assert self.positions is not None
        mirrors = {self.device: (self.starts, self.ends)}
        bounds = Bounds(self._starts, begin, self.q_len, self.horizon, mirrors)
        decoder = self._decoder()
        assert decoder is not None
        fusion = self._fusion()
        assert fusion is not None  # it lives as long as the look that this step was made by
        with Step(cache, bounds, self.route, decoder.config, captured=captured, fusion=fusion) as step:
            output = run_decoder(decoder, self._decoded(), self.positions, step, self.head, self.along)
        if self.selection is not None:
            return self.selection(output, NextStep(self.inputs, self.positions, self.ends))
        self.ends.add_(self.q_len)
        self.positions.add_(self.q_len)
        return output

    def _decoded(self) -> torch.Tensor:
        """The inputs as the decoder takes them."""
        assert self.inputs is not None
        if self._stand_in is None:
            return self.inputs
        return torch.where((self.inputs[..., None] == self._others).any(-1), self._stand_in.by, self.inputs)

    def drop(self) -> None:
        """Gives up the graph and its memory."""
        self._graph = self._output = None

    def _replay(self, cache: PagedCache, begin: int, memories: GraphMemories) -> torch.Tensor:
        """Replays the step's graph, captured before where it cannot be replayed in this thread, on this stream."""
        memory = memories.here(self.device)
        graph, output = self._graph, self._output  # another thread's look at the model may drop them meanwhile
        if graph is None or output is None or memory is not self._memory:
            self.drop()
            states = linear.addresses(cache.linear_layers)
            graph, output = memory.capture(lambda: self._body(cache, begin, captured=True))
            if linear.addresses(cache.linear_layers) != states:
                raise CaptureError("the model puts its linear-attention states elsewhere at each step")
            self._memory, self._graph, self._output = memory, graph, output
            self.captures += 1
        graph.replay()
        return output
