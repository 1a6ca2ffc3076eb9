"""Why models are not on pages, in the few words that many of them share."""

from __future__ import annotations

import re

SHARED = {
    # patch() raises
    r"is an encoder-decoder": "encoder-decoder",
    r"every layer of \w+ keeps a \w*LinearAttention\w*": "recurrent layers alone: pages would hold nothing",
    r"keeps a \w+": "layers that cache something else than keys and values (indexers)",
    r"latent attention": "latent attention",
    r"no module of its \w+ goes through|takes no '\w+', which is what": "attention or cache by the model's own code",
    r"get_decoder\(\) returned|is not a causal LM that generates": "no decoder that transformers' generate() runs",
    r"changes the layers of its cache": "layers that run several times, each with a cache of its own",
    # left to transformers
    r"asks attention for s_aux": "attention sinks",
    r"asks attention for \w+=": "arguments of attention that are not known",
    r"has a mask that is more than causal": "masks of its own",
    r"attends to other keys and values": "keys or values changed after the cache",
    r"attends to a window of": "a window other than its cache keeps",
    r"the cache is a \w+, not a PagedCache": "its generate() makes a cache of another kind",
    r"does not go through transformers' cache": "attention or cache by the model's own code",
    # transformers alone fails
    r"requires the \w+ library": "needs a package that is not installed here",
    r"pixel_values|input_features": "does not generate from text alone",
    r"^cannot be built": "the tiny model cannot be built",
    r"^cannot be run unpatched": "the tiny model does not generate",
    # layers are not fused
    r"the residual stream alone|norms stand where|layers return more|is written into": "layers of another form",
    r"is not understood: |is understood$|given what its layer computes": "parts of layers that are not understood",
    r"not one list of modules|not called one by one|does not run on tokens alone": "layers that are not run one by one",
    # steps do not run ahead
    r"makes something else of tokens|not call its decoder": "its decoder is given more than tokens",
    r"its positions ": "positions that the model counts",
    r"are not its output embeddings'|has no output embeddings": "logits of more than its hidden states",
    r"is not transformers' own$": "a generate() of its own",
    # layers are not captured
    r"its decoder is given |returns more than hidden states": "its decoder is given, or returns, more than tokens",
    r"does not compile \w+ in one graph|takes no position_ids": "transformers does not compile it in one graph",
    r"states that a crop may take back": "states that a crop may take back",
    r"changes with the length": "RoPE that changes with the length",
    r"length of its cache on the host": "it reads the length of its cache on the host",
    # our kernels do not serve the layers
    r"head_dim \d+ is not a multiple": "heads of a size that our kernels do not take",
}
"""By what is found in a message; the first one counts."""


def shared(reason: str) -> str:
    """A reason in the words that it shares with others; itself where nothing like it is known."""
    return next((words for pattern, words in SHARED.items() if re.search(pattern, reason)), reason)
