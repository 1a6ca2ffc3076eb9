"""The forwards of the run-ahead loop: on static buffers where those are known to do what the model does, else its own.

At the first step after the prompt the model's own code says what it gives its decoder: tokens or their embeddings, and
positions. That the decoder makes the same of the tokens alone, that positions go on by one, and what logits are of its
hidden states, is tried once for each look at the modules (`asking`), before it is believed.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from pkv_hf import compat
from pkv_hf.cache.paged import PagedCache
from pkv_hf.errors import NotServed
from pkv_hf.policy.choose import CHOOSE_EVERY
from pkv_hf.routes.base import Route
from pkv_hf.runtime.admission import Admitted, admit, extra_arguments
from pkv_hf.runtime.ahead.asking import Asking, updated
from pkv_hf.runtime.ahead.found import Found
from pkv_hf.runtime.ahead.greedy import Greedy
from pkv_hf.runtime.captured.static import StaticStep
from pkv_hf.runtime.choice import choose_route
from pkv_hf.runtime.evidence import Look
from pkv_hf.runtime.forward import run_static, static_of
from pkv_hf.runtime.state import PatchState


class Sequences(Protocol):
    """The rows' tokens, as `loop` has them."""

    newest: torch.Tensor
    """Every row's newest token, and 1 for every row that goes on: int64 `[2, rows]`."""

    @property
    def ids(self) -> torch.Tensor:
        """int64 `[rows, tokens]`, the prompt included."""
        ...

    @property
    def length(self) -> int:
        """Tokens of a row, the prompt included."""
        ...


class Forward:
    """The forward of the steps after the prompt, which the cache holds: logits of every row's newest token."""

    def __init__(
        self, model: Any, state: PatchState, model_kwargs: dict[str, Any], greedy: Greedy | None = None
    ) -> None:
        self.model, self.state, self.model_kwargs = model, state, model_kwargs
        self.greedy = greedy
        """What steps on static buffers select by themselves, where the call's selection is such."""
        self.cache: Any = model_kwargs.get(compat.CACHE)
        """What the last forward left: models whose RoPE changes with the length begin anew there."""
        self.static: StaticStep | None = None
        """The step that runs, None for the model's own forward."""
        self._decided = False
        self._positions: torch.Tensor | None = None  # those of the step to come; None where they count on the device
        self._admitted: Admitted
        self._look: Look  # what steps are made by lives as long as it, and anybody may look at the model anew
        self._found = Found()

    @property
    def selects(self) -> bool:
        """Whether the step that runs takes the next tokens by itself."""
        return self.static is not None and self.static.selection is not None

    def __call__(self, sequences: Sequences) -> torch.Tensor:
        """Logits `[rows, 1, vocabulary]` of every row's newest token; or what follows it, as `Selection` gives it."""
        begins = not self._decided
        if begins:
            self._decide(sequences)
        elif self.static is not None and self.cache.get_seq_length() % CHOOSE_EVERY == 0:
            self._choose_again(sequences)
        if self.static is None:
            return self._by_model(sequences.ids)
        positions, self._positions = self._positions, None
        if self.static.selection is not None:
            self.static.selection.go_on(sequences.length)
        inputs = None if self.selects and positions is None else sequences.newest[0][:, None]
        try:
            output = run_static(self.state, self.static, self.cache, inputs, positions, self._admitted.starts)
        except NotServed as error:
            if not begins:
                raise
            self.static = None  # and the cache is as it was
            self.state.say(str(error))
            return self._by_model(sequences.ids)
        self.state.counts.add("pages")
        return output

    def _by_model(self, input_ids: torch.Tensor) -> torch.Tensor:
        """A step as transformers' loop takes it."""
        inputs = self.model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **self.model_kwargs)
        outputs = self.model(**inputs, return_dict=True)
        self.model_kwargs = updated(self.model, outputs, self.model_kwargs)
        self.cache = self.model_kwargs.get(compat.CACHE)
        logits: torch.Tensor = outputs.logits
        return logits

    def _decide(self, sequences: Sequences) -> None:
        """Takes a static step for the steps to come, where one is known to do what the model does."""
        known = self.state.known
        if True not in known.served or known.output_type is None or not isinstance(self.cache, PagedCache):
            known.look().not_ahead = "no decode step of hidden states alone was served yet"
            return  # the next one may be
        self._decided = True
        look = known.look()
        if look.not_static or known.may_keep_states:
            return
        asking = Asking(self.model, self.state, self.cache, self.model_kwargs, sequences.ids)
        call = asking.call
        if call is None:
            look.not_ahead = f"the forward of {type(self.model).__name__} does not call its decoder just once"
            return
        extras = extra_arguments(call)
        plain = {name: value for name, value in call.items() if name not in extras}
        plain.update(input_ids=sequences.newest[0][:, None], inputs_embeds=None)
        try:
            self._admitted = admit(known.decoder, self.state, plain)
        except NotServed:
            return  # as the model's own forward will find
        given = frozenset(name for name, value in call.items() if value is not None)
        if given not in look.ahead:
            look.ahead[given] = asking.checked(extras)
        self._found = look.ahead[given]
        look.not_ahead = self._found.why
        if self._found.logits is None:
            return
        admitted = self._admitted
        route = choose_route(self.state, self.cache, admitted.starts, 1, admitted.device, admitted.dtype)
        self.static = self._static(route, sequences)
        self._positions = call.get("position_ids")
        if self._positions is None:
            self._positions = torch.tensor([[admitted.begin]], device=admitted.device)

    def _static(self, route: Route, sequences: Sequences) -> StaticStep | None:
        step = static_of(self.state, self._admitted, route, self._found, self.greedy)
        self._look = self.state.known.look()
        if not isinstance(step, StaticStep):
            return None
        if step.selection is not None:
            assert self.greedy is not None
            step.selection.begin(self.greedy, sequences.newest[1])
        return step

    def _choose_again(self, sequences: Sequences) -> None:
        """Takes another route's step where rows have grown into another route's lengths."""
        assert self.static is not None
        starts = self._admitted.starts
        route = choose_route(self.state, self.cache, starts, 1, self.static.device, self.static.dtype)
        if route.name != self.static.route.name:
            other = self._static(route, sequences)
            if other is not None:
                assert self.static.positions is not None
                self._positions = self.static.positions.clone()
                self.static = other
