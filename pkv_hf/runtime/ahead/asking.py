"""What a model gives its decoder, tried before it is believed: that the decoder makes the same of the tokens alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from pkv_hf import compat
from pkv_hf.cache.paged import PagedCache
from pkv_hf.replaced import original
from pkv_hf.runtime.ahead.found import Found, StandIn
from pkv_hf.runtime.ahead.logits import answered, find, hidden_size
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


class Asking:
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

    def checked(self, extras: list[str]) -> Found:
        """What steps by tokens alone have to do, or why they are not known to do what the model does.

        `extras` are arguments of the decoder that such a step leaves out.
        """
        kept = KeptTensors(self.model)
        try:
            if reason := self._positions_move():
                return Found(why=reason)
            stand_in, reason = self._tokens_alone(extras)
            if reason:
                return Found(why=reason)
            logits, reason = find(self.model, self.decoder, self._own_logits, len(self.input_ids))
            return Found(logits, stand_in, reason)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return Found(why=f"{type(self.model).__name__} fails where its decoder is tried: {error!r}")
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

    def _tokens_alone(self, extras: list[str]) -> tuple[StandIn | None, str]:
        """The token that stands for others, None for none; why the decoder, given tokens alone, is not known to compute
        what it does by what the model gives it, empty where it does."""
        special, drawn = self._tokens()
        given = ", ".join(extras) or "inputs_embeds"
        more = f"its decoder makes something else of tokens than of {given} that the model makes of them"
        found = self._same(drawn, drawn, extras)
        if found is None or not all(found):
            return None, more if found else f"{type(self.model).__name__} does not call its decoder for every token"
        found = self._same(special, special, extras)
        others = [token for token, same in zip(special, found or []) if not same]
        if found is not None and not others:
            return None, ""
        by: Any = getattr(self.model.config.get_text_config(decoder=True), "pad_token_id", None)
        if found is None or type(by) is not int or not all(self._same(others, [by] * len(others), extras) or [False]):
            return None, more
        return StandIn(tuple(others), by), ""

    def _same(self, tokens: list[int], others: list[int], extras: list[str]) -> list[bool] | None:
        """For each of the tokens whether the decoder, given another in its place, computes what it does by what the
        model gives it; None where the model does not call it just once."""
        rows, found = len(self.input_ids), []
        for at in range(0, len(tokens), rows):
            theirs, ours = (self._rows(each[at : at + rows]) for each in (tokens, others))
            call, _ = self.ask(input_ids=theirs)
            if call is None:
                return None
            if extras or call.get("input_ids") is None:
                same = self._same_states(call, ours)
            else:
                same = (call["input_ids"] == ours).all(dim=1)
            found += same[: len(tokens) - at].tolist()
        return found

    def _rows(self, tokens: list[int]) -> torch.Tensor:
        """Tokens as the rows of a step, int64 `[rows, 1]`, again from the first on where there are fewer."""
        rows = len(self.input_ids)
        return torch.tensor(tokens * -(-rows // len(tokens)), device=self.input_ids.device)[:rows, None]

    def _same_states(self, call: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
        """bool `[rows]`: where the decoder, without a cache, returns the same by a call's arguments and by tokens."""
        forward = original(self.decoder, "forward")
        alone: dict[str, Any] = {"attention_mask": None, "use_cache": False, compat.CACHE: None}
        theirs = forward(**{**call, **alone}).last_hidden_state
        ours = forward(input_ids=tokens, position_ids=call.get("position_ids"), **alone).last_hidden_state
        tolerance = 4 * torch.finfo(theirs.dtype).eps
        near = torch.isclose(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))
        return near.flatten(1).all(dim=1)

    def _tokens(self) -> tuple[list[int], list[int]]:
        """Tokens to try: all that a setting names, and two at random."""
        size = self.decoder.get_input_embeddings().weight.shape[0]
        draw = torch.Generator().manual_seed(0)  # one of our own: the caller's is left where it was
        special = {token for token in _named_tokens(self.model.config.to_dict()) if 0 <= token < size}
        return sorted(special), torch.randint(size, (2,), generator=draw).tolist()


def _named_tokens(settings: Mapping[str, Any]) -> Iterator[int]:
    """The tokens that a configuration and those inside it name."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _named_tokens({str(key): each for key, each in value.items()})
        elif name.endswith(SPECIAL):
            yield from (each for each in (value if isinstance(value, (list, tuple)) else [value]) if type(each) is int)
