"""Wrong arguments of every public function: the exact error, naming the argument, and nothing changed."""

from __future__ import annotations

import importlib.util
import inspect
import re
import time

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pkv_hf
from pkv_hf.compat import CACHE
from tiny import COMMON, byte_tokenizer, tiny

STEP = {
    "device": torch.device("cpu"), "dtype": torch.float32, "kv_dtype": torch.float32, "q_len": 1, "group": 2,
    "kv_heads": 2, "head_dim": 64, "page_size": 16, "layers": 2, "rows": 2, "tokens": 9, "longest": 5, "padded": True,
    "windowed": False, "autocast": False, "captured": False, "named": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def filled(model):
    cache = pkv_hf.PagedCache(model.config)
    for layer in range(3):
        cache.update(torch.zeros(2, 2, 5, 16), torch.zeros(2, 2, 5, 16), layer)
    return cache


def states(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


PATCH = [
    *[({"route": value}, re.escape(f"route={value!r} is not one of")) for value in ("fast", None, 3, ["auto"])],
    *[({"page_size": value}, f"page_size={value!r} is not one of") for value in (0, 17, 512, 16.0, "16", None, True)],
    *[({"kv_dtype": value}, re.escape(f"kv_dtype={value!r} is not one of")) for value in ("int4", torch.int64, 8, [1])],
    *[({"prefix_cache": x}, "prefix_cache=") for x in ("", "many", "0GiB", 0, -1, 1.5, True, b"1GiB")],
    *[({name: "no"}, f"{name}='no' is neither True nor False") for name in ("cuda_graphs", "run_ahead", "fuse")],
]
PLAN = {"prompt_tokens": 5, "gpu_memory": "1GiB"}
PLAN_COUNTS = ("batch", "max_new_tokens", "prefill_chunk_size")
NO_MODEL = (None, 3, "llama", torch.nn.Linear(2, 2))
CALLS = [
    *[("patch", lambda m, s=s: pkv_hf.patch(m, **s), ValueError, says) for s, says in PATCH],
    *[("patch", lambda m, x=x: pkv_hf.patch(x), pkv_hf.UnsupportedModelError, "not a transformers") for x in NO_MODEL],
    *[("patched", lambda m, s=s: pkv_hf.patched(m, **s).__enter__(), ValueError, says) for s, says in PATCH[::4]],
    *[("prefix", lambda m, x=x: pkv_hf.prefix(x, [1]), pkv_hf.UnsupportedModelError, "not a tra") for x in NO_MODEL],
    *[("report", lambda m, x=x: pkv_hf.report(x), ValueError, "is not patched: call") for x in NO_MODEL],
    *[("explain", lambda m, x=x: pkv_hf.explain(x), ValueError, "is not patched: call") for x in NO_MODEL],
    *[
        ("PagedCache", lambda m, s=s: pkv_hf.PagedCache(m.config, **s), ValueError, says)
        for s, says in (
            *PATCH[4:15],
            *[({"max_length": x}, f"max_length={x!r} is not a whole number") for x in (0, -1, 2.5, "x", True)],
        )
    ],
    *[("PagedCache", lambda m, x=x: pkv_hf.PagedCache(x), ValueError, "config is a ") for x in NO_MODEL],
    *[
        ("PagedCache.update", lambda m, k=k, v=v: filled(m).update(k, v, 0), ValueError, says)
        for k, v, says in (
            (states(2, 5, 16), states(2, 5, 16), r"key_states is \[2, 5, 16\]"),
            (states(2, 2, 5, 16), states(2, 2, 3, 16), r"value_states \[2, 2, 3, 16\]"),
            (states(2, 3, 1, 16), states(2, 3, 1, 16), "key_states has 3 heads of 16, but .* 2 of 16"),
            (states(2, 2, 1, 8), states(2, 2, 1, 8), "key_states has 2 heads of 8"),
            (states(3, 2, 1, 16), states(3, 2, 1, 16), "batch 3, but the PagedCache holds 2 rows"),
            (None, states(2, 2, 1, 16), "key_states is a NoneType"),
            (states(2, 2, 1, 16), states(2, 2, 1, 16).tolist(), "value_states is a list"),
            (states(2, 2, 1, 16).int(), states(2, 2, 1, 16), "key_states is torch.int32"),
            (states(2, 0, 1, 16), states(2, 0, 1, 16), r"key_states is \[2, 0, 1, 16\]"),
            (states(2, 2, 1, 0), states(2, 2, 1, 0), r"key_states is \[2, 2, 1, 0\]"),
        )
    ],
    *[
        ("PagedCache.update", lambda m, x=x: filled(m).update(*[states(2, 2, 1, 16)] * 2, x), IndexError, f"idx={x!r}")
        for x in (3, -1, "x", None, 0.0)
    ],
    *[
        ("PagedCache.start", lambda m, rows=rows, pads=pads: filled(m).start(rows, np.array(pads)), ValueError, says)
        for rows, pads, says in (
            (0, [], "rows=0"), (-1, [], "rows=-1"), (2, [1], "pads="), (2, [1, -1], "pads="), (2, [1.0, 2.0], "pads="),
            (2, 3, "pads="), (2, [[1], [2]], "pads="),
        )
    ],
    *[
        ("PagedCache.truncate", lambda m, x=x: filled(m).truncate(x), ValueError, f"length={x!r}")
        for x in (-3, 1.5, None)
    ],
    *[
        ("PagedCache.expect_copies", lambda m, x=x: filled(m).expect_copies(*x), ValueError, says)
        for x, says in (((0,), "copies=0"), ((1.5,), "copies=1.5"), ((2, -1), "shared=-1"))
    ],
    *[
        ("PagedCache.crop", lambda m, x=x: filled(m).crop(x), ValueError, f"tokens_to_remove={x!r} .*holds 5")
        for x in (1, -6, "x", None, -1.5, True)
    ],
    *[
        (name, lambda m, name=name, x=x: getattr(filled(m), name.split(".")[1])(x), ValueError, "indices ")
        for name in ("PagedCache.batch_select_indices", "PagedCache.reorder_cache")
        for x in (None, [0], torch.tensor([0j]), torch.tensor(0), torch.tensor([[0]]), torch.tensor([0.5]),
                  torch.tensor([True]),
                  torch.tensor([], dtype=torch.long), torch.tensor([False, False]))
    ],
    *[
        ("PagedCache.batch_select_indices", lambda m, x=x: filled(m).batch_select_indices(x), IndexError, "of 2 rows")
        for x in (torch.tensor([2]), torch.tensor([-3]))
    ],
    *[
        ("PagedCache.batch_repeat_interleave", lambda m, x=x: filled(m).batch_repeat_interleave(x), ValueError, repr(x))
        for x in (0, -1, 1.5, None, "2", True)
    ],
    *[
        ("prefix", lambda m, x=x: pkv_hf.prefix(m, x), ValueError, "text_or_ids ")
        for x in ("text", None, 5, [], [[]], [[1], [2]], [1.5], ["a"], [-1], [128], {"a": 1}, [[[1]]], [None], b"ab",
                  torch.tensor(5), torch.ones(2, device="meta"),
                  torch.ones(2, dtype=torch.long).to_sparse(), torch.ones(1, 3), torch.zeros(2, 2, 2, dtype=torch.long))
    ],
    *[
        ("prefix", lambda m, x=x: pkv_hf.prefix(m, "text", x), ValueError, f"tokenizer={x!r} does")
        for x in (3, "gpt2", {})
    ],
    *[
        ("prefix", lambda m, x=x, t=t: pkv_hf.prefix(m, x, t), ValueError, "text_or_ids is no text that the ")
        for x, t in (("abc", len), ("abc", lambda text: [1, 2]), (["a", 5], byte_tokenizer()))
    ],
    *[
        ("prefix", lambda m, x=x: pkv_hf.prefix(x, [1, 2]), pkv_hf.UnsupportedModelError, "no causal LM")
        for x in (
            transformers.ViTModel(transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)),
            transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=8, d_ff=8, num_layers=1, d_kv=8)),
        )
    ],
    *[
        ("Prefix.inputs", lambda m, x=x: pkv_hf.prefix(m, [3]).inputs(x), ValueError, "continuations ")
        for x in ("text", None, 5, [], [[1], []], [-1], [128], [[1], [2, 128]], torch.zeros(1, 1, 1, dtype=torch.long))
    ],
    *[
        ("Prefix.cache", lambda m, x=x: pkv_hf.prefix(m, [3]).cache(x), ValueError, f"rows={x!r}")
        for x in (0, -1, 1.5, None, "2")
    ],
    *[
        ("StepShape", lambda m, s=s: pkv_hf.explain(pkv_hf.StepShape(**{**STEP, **s})), ValueError, says)
        for s, says in (
            *[({name: 0}, f"{name}=0") for name in ("q_len", "group", "kv_heads", "head_dim", "page_size", "layers")],
            ({"rows": 0}, "rows=0"), ({"longest": 0}, "longest=0"), ({"q_len": 1.5}, "q_len=1.5"),
            ({"tokens": 4}, "tokens=4 of 2 rows"), ({"tokens": 11}, "tokens=11 of 2 rows"),
            ({"device": torch.device("cuda", 97)}, "device=cuda:97 is not on this machine"),
            ({"page_size": 17}, "page_size=17"), ({"dtype": torch.int8}, "dtype=torch.int8"),
            ({"kv_dtype": torch.int64}, "kv_dtype=torch.int64"), ({"device": "cpu"}, "device='cpu'"),
            ({"dtype": "float32"}, "dtype='float32'"),
        )
    ],
    *[
        ("plan", lambda m, s=s: pkv_hf.plan(m.config, **{**PLAN, **s}), ValueError, says)
        for s, says in (
            *PATCH[4:15],
            *[({"prompt_tokens": x}, "prompt_tokens=") for x in (0, [], 1.5, "12", None, True, b"ab")],
            *[({name: x}, f"{name}=") for name in PLAN_COUNTS for x in (0, 2.5, "1")],
            *[({"gpu_memory": x}, "gpu_memory=") for x in ("much", "infGiB", -1, [], 0, True, 16)],
            *[({"dtype": x}, "dtype=") for x in ("float16", torch.int8)],
            *[({"weight_bits": x}, re.escape(f"weight_bits={x!r}")) for x in (16, "4", [4], 4.0, True)],
        )
    ],
    *[
        ("plan", lambda m, x=x: pkv_hf.plan(x, **PLAN), pkv_hf.UnsupportedModelError, says)
        for x, says in (*[(x, "not a transformers") for x in NO_MODEL], (transformers.ViTConfig(), "ViTConfig"),
                        (transformers.T5Config(), "T5"))
    ],
    ("clear_prefix_cache", lambda m: pkv_hf.clear_prefix_cache(torch.nn.Linear(2, 2)), ValueError, "is not patched"),
    ("PagedCache", lambda m: pkv_hf.PagedCache(transformers.PreTrainedConfig()), ValueError, "names no decoder layers"),
    ("plan", lambda m: pkv_hf.plan(m, dtype=torch.float16, **PLAN), ValueError, "are for a configuration"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "call", "error", "says"), CALLS, ids=[f"{i}-{c[0]}" for i, c in enumerate(CALLS)])
def test_wrong_arguments_are_named(model, name, call, error, says):
    before = set(model.__dict__)
    with pytest.raises(error, match=says) as raised:
        call(model)
    assert type(raised.value) is error
    assert set(model.__dict__) == before


def test_every_public_function_is_in_the_table():
    functions = {name for name in pkv_hf.__all__ if inspect.isfunction(getattr(pkv_hf, name))}
    assert functions - {"unpatch"} <= {name for name, *_ in CALLS}  # unpatch leaves what it does not know as it is
    assert pkv_hf.unpatch(torch.nn.Linear(2, 2)) is not None


def outcome(call):
    """What a call returns, or the type of what it raises; not an assertion, nor a device's error."""
    try:
        return call()
    except Exception as error:
        raised = error
    if isinstance(raised, AssertionError) or re.search("CUDA|device-side", str(raised)):
        raise raised
    return type(raised)


@pytest.fixture(scope="module")
def models():
    """By route, of the same weights, what is not patched under None; and what each makes of a plain call."""
    routes = ("auto", "split") if importlib.util.find_spec("triton") else ("auto",)
    made = {route: tiny("llama", num_hidden_layers=1) for route in (None, *routes)}
    for route in routes:
        pkv_hf.patch(made[route], route=route)
    return made, plain(made[None])


def plain(model):
    return model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False)


INPUTS = {
    "batch": st.sampled_from([0, 1, 1, 2]),
    "length": st.sampled_from([0, 1, 2, 7, 17, COMMON["max_position_embeddings"] - 1]),
    "ids": st.sampled_from(["in range", "in range", "in range", "too large", "negative"]),
    "mask": st.sampled_from(["none", "ones", "random", "halves", "negative", "zeros", "bool", "short", "4-D", "nan"]),
    "positions": st.sampled_from(["none", "none", "jumps", "beyond", "negative", "short"]),
    "new_tokens": st.sampled_from([1, 3, 0, -1]),
    "number": st.integers(0, 1000),
}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(**INPUTS)
def test_a_call_ends_as_transformers_own_does(models, batch, length, ids, mask, positions, new_tokens, number):
    generator = torch.Generator().manual_seed(number)
    call = {"input_ids": torch.randint(2, 128, (batch, length), generator=generator)}
    if ids != "in range" and batch * length:
        call["input_ids"][-1, -1] = 128 if ids == "too large" else -129
    ones = torch.ones(batch, length, dtype=torch.long)
    bits = torch.randint(0, 2, (batch, length), generator=generator)
    masks = {
        "none": None, "ones": ones, "random": bits, "halves": bits * 0.5, "negative": -ones, "zeros": 0 * ones,
        "bool": bits.bool(), "short": ones[:, 1:], "4-D": ones[:, None, None].float(), "nan": ones * float("nan"),
    }  # fmt: skip
    if masks[mask] is not None:
        call["attention_mask"] = masks[mask]
    counted = torch.arange(length)[None]
    jumps = {"jumps": counted * 3 + 7, "beyond": counted + 10**6, "negative": counted - 50, "short": counted[:, 1:]}
    if positions != "none":
        call["position_ids"] = jumps[positions]
    begun = time.monotonic()
    of_route, of_plain = models
    theirs, *of_ours = (
        outcome(lambda model=model: model.generate(**call, max_new_tokens=new_tokens, do_sample=False))
        for model in of_route.values()
    )
    assert time.monotonic() - begun < 60
    for ours in of_ours:
        assert type(ours) is type(theirs), (ours, theirs)
        if isinstance(theirs, type):
            assert ours in (theirs, ValueError)  # ours may name what theirs only runs into
        else:
            assert torch.equal(ours, theirs)
    assert all(torch.equal(plain(model), of_plain) for route, model in of_route.items() if route)


@torch.no_grad()
def test_lengths_beyond_the_models_positions_go_as_far_as_transformers_goes():
    model = tiny("llama", max_position_embeddings=32)
    ids = torch.randint(2, 128, (1, 30))
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    with pkv_hf.patched(model):
        assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), expected)


def test_a_learned_position_beyond_the_table_raises_as_transformers_does():
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, word_embed_proj_dim=32,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).eval()
    ids = torch.randint(2, 64, (1, 14))
    errors = []
    for _ in range(2):
        errors.append(outcome(lambda: model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)))
        pkv_hf.patch(model)
    assert isinstance(errors[0], type)
    assert errors[0] is errors[1]


def test_whole_numbers_of_numpy_are_numbers(model):
    numbers = {"prompt_tokens": np.int64(5), "batch": np.int32(2), "gpu_memory": np.int64(1 << 30)}
    assert pkv_hf.plan(model, **numbers) == pkv_hf.plan(model, prompt_tokens=5, batch=2, gpu_memory=1 << 30)
    ids = np.array([5, 6])
    assert pkv_hf.prefix(model, list(ids)).ids.tolist() == [[5, 6]]
    cache = filled(model)
    cache.update(states(2, 2, 1, 16), states(2, 2, 1, 16), np.int64(0))
    assert cache.layers[0].length == 6


def test_a_limit_that_no_memory_holds_is_one_that_is_never_reached(model):
    cache = pkv_hf.PagedCache(model.config, max_length=10**30)
    cache.update(states(1, 2, 1, 16), states(1, 2, 1, 16), 0)
    assert cache.get_seq_length() == 1


def test_a_plan_for_more_memory_than_there_is_ends(model):
    assert pkv_hf.plan(model, prompt_tokens=5, gpu_memory="64000GiB").max_batch >= 1 << 15


def test_a_cache_that_changes_under_a_call_is_named():
    pytest.importorskip("triton")
    model = pkv_hf.patch(tiny("llama", num_hidden_layers=1), route="split")
    cache = pkv_hf.PagedCache(model.config)

    class Resetting:
        def put(self, tokens):
            if cache.get_seq_length() > 4:
                cache.reset()

        def end(self):
            pass

    with pytest.raises(RuntimeError, match="came to hold 0 tokens"):
        model.generate(
            torch.tensor([[5, 6, 7]]), **{CACHE: cache}, streamer=Resetting(), max_new_tokens=6, do_sample=False
        )
