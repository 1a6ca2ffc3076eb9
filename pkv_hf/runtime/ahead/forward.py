"""The forwards of the run-ahead loop: on static buffers where those are known to do what the model does, else its own.

At the first step after the prompt the model's own code says what it gives its decoder: tokens or their embeddings, and
positions. That the decoder makes the same of the tokens alone, that positions go on by one, and what logits are of its
hidden states, is tried once for each look at the modules (`_checked`), before it is believed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch

from pkv_hf import compat
from pkv_hf.cache.paged import PagedCache
from pkv_hf.errors import NotServed
from pkv_hf.policy.choose import CHOOSE_EVERY
from pkv_hf.replaced import original
from pkv_hf.routes.base import Route
from pkv_hf.runtime.admission import Admitted, admit, extra_arguments
from pkv_hf.runtime.ahead.greedy import Greedy
from pkv_hf.runtime.ahead.logits import Logits, answered, find, hidden_size
from pkv_hf.runtime.captured.static import StaticStep
from pkv_hf.runtime.choice import choose_route
from pkv_hf.runtime.evidence import Look
from pkv_hf.runtime.forward import run_static, static_of
from pkv_hf.runtime.state import PatchState
from pkv_hf.runtime.step import KeptTensors

SPECIAL = ("_token_id", "_token_index", "_token_ids")
"""What the names of settings end with that are tokens, of which a model may make something of its own."""


def updated(model: Any, outputs: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments after a step, as transformers' loops ask for them."""
    kwargs: dict[str, Any] = model._update_model_kwargs_for_generation(
        outputs, model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder
    )
    return kwargs


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
        self._head: Logits | None = None

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
        asking = _Asking(self.model, self.state, self.cache, self.model_kwargs, sequences.ids)
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
        self._head, look.not_ahead = look.ahead[given]
        if self._head is None:
            return
        admitted = self._admitted
        route = choose_route(self.state, self.cache, admitted.starts, 1, admitted.device, admitted.dtype)
        self.static = self._static(route, sequences)
        self._positions = call.get("position_ids")
        if self._positions is None:
            self._positions = torch.tensor([[admitted.begin]], device=admitted.device)

    def _static(self, route: Route, sequences: Sequences) -> StaticStep | None:
        step = static_of(self.state, self._admitted, route, self._head, self.greedy)
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


class _Asking:
    """What a model gives its decoder at the step that is to come, by the model's own code; no layer runs."""

    def __init__(
        self, model: Any, state: PatchState, cache: PagedCache, model_kwargs: dict[str, Any], input_ids: torch.Tensor
    ) -> None:
        self.model, self.decoder, self.cache = model, state.known.decoder, cache
        self.model_kwargs, self.input_ids = model_kwargs, input_ids
        assert state.known.output_type is not None
        self.output_type = state.known.output_type
        weight = next(self.decoder.parameters())
        size = (len(input_ids), 1, hidden_size(model, self.decoder))
        self.zeros = torch.zeros(size, dtype=weight.dtype, device=weight.device)
        self.inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
        self.call, self.output = self.ask()

    def ask(self, hidden: torch.Tensor | None = None, **others: Any) -> tuple[dict[str, Any] | None, Any]:
        """The decoder's arguments, None for no call or several; what the model returns where it answers `hidden`."""
        answer = self.zeros if hidden is None else hidden
        fields: dict[str, Any] = {"last_hidden_state": answer, compat.CACHE: self.cache}
        return answered(self.model, self.decoder, {**self.inputs, **others}, lambda call: self.output_type(**fields))

    def checked(self, extras: list[str]) -> tuple[Logits | None, str]:
        """What logits are of hidden states, or why steps by tokens alone are not known to do what the model does.

        `extras` are arguments of the decoder that such a step leaves out.
        """
        kept = KeptTensors(self.model)
        try:
            if reason := self._positions_move() or self._more_than_tokens(extras):
                return None, reason
            return find(self.model, self.decoder, self._own_logits, len(self.input_ids))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return None, f"{type(self.model).__name__} fails where its decoder is tried: {error!r}"
        finally:
            kept.restore()

    def _own_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.ask(hidden)[1].logits
        return logits

    def _positions_move(self) -> str:
        """Why the decoder's positions are not known to go on by one at each step; empty where they do."""
        assert self.call is not None
        now = self.call.get("position_ids")
        if now is None:
            return ""  # the decoder counts what the cache holds
        if self.inputs.get("position_ids") is None:
            return "" if bool((now == self.cache.get_seq_length()).all()) else "its positions are the model's own"
        kwargs = updated(self.model, self.output, dict(self.model_kwargs))
        longer = torch.cat([self.input_ids, self.input_ids[:, -1:]], dim=1)
        later = self.model.prepare_inputs_for_generation(longer, next_sequence_length=1, **kwargs)
        call, _ = self.ask(position_ids=later.get("position_ids"))
        then = None if call is None else call.get("position_ids")
        return "" if then is not None and torch.equal(then, now + 1) else "its positions do not go on by one a step"

    def _more_than_tokens(self, extras: list[str]) -> str:
        """Why the decoder, given tokens alone, is not known to compute what it does by what the model gives it."""
        for tokens in self._tokens():
            call, _ = self.ask(input_ids=tokens)
            if call is None:
                return f"{type(self.model).__name__} does not call its decoder for every token"
            same = (
                self._same_states(call, tokens)
                if extras or call.get("input_ids") is None
                else (torch.equal(call["input_ids"], tokens))
            )
            if not same:
                given = ", ".join(extras) or "inputs_embeds"
                return f"its decoder makes something else of tokens than of {given} that the model makes of them"
        return ""

    def _same_states(self, call: dict[str, Any], tokens: torch.Tensor) -> bool:
        """Whether the decoder returns the same hidden states by a call's arguments and by tokens, without a cache."""
        forward = original(self.decoder, "forward")
        alone: dict[str, Any] = {"attention_mask": None, "use_cache": False, compat.CACHE: None}
        theirs = forward(**{**call, **alone}).last_hidden_state
        ours = forward(input_ids=tokens, position_ids=call.get("position_ids"), **alone).last_hidden_state
        tolerance = 4 * torch.finfo(theirs.dtype).eps
        return torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))

    def _tokens(self) -> Iterator[torch.Tensor]:
        """Tokens to try, int64 `[rows, 1]` each: two at random, and all that a setting names."""
        rows, size = self.input_ids.shape[0], self.decoder.get_input_embeddings().weight.shape[0]
        draw = torch.Generator().manual_seed(0)  # one of our own: the caller's is left where it was
        special = {token for token in _named_tokens(self.model.config.to_dict()) if 0 <= token < size}
        tokens = torch.tensor([*torch.randint(size, (2,), generator=draw).tolist(), *sorted(special)])
        for chunk in tokens.split(rows):
            yield chunk.repeat(-(-rows // len(chunk)))[:rows, None].to(self.input_ids.device)


def _named_tokens(settings: Mapping[str, Any]) -> Iterator[int]:
    """The tokens that a configuration and those inside it name."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _named_tokens({str(key): each for key, each in value.items()})
        elif name.endswith(SPECIAL):
            yield from (each for each in (value if isinstance(value, (list, tuple)) else [value]) if type(each) is int)
