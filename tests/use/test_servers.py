"""What stands between people and generate(): pipelines, transformers' server and its chat, with the model patched."""

from __future__ import annotations

import threading
import time

import huggingface_hub
import pytest
import transformers
from huggingface_hub import InferenceClient
from transformers.cli import chat
from transformers.cli.serve import Serve

import pkv_hf
from pkv_hf import PagedCache
from pkv_hf.compat import CACHE
from tiny import assert_on_pages, byte_tokenizer, tiny

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "bytes"
    tokenizer = byte_tokenizer(pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    tiny("llama", vocab_size=257, pad_token_id=256).save_pretrained(folder)
    return folder


@pytest.fixture
def calls(monkeypatch):
    """The caches that decoders are called with while patched."""
    seen = []
    forward = pkv_hf.patch.__globals__["decoder_forward"]

    def noted(self, *args, **kwargs):
        seen.append(kwargs.get(CACHE))
        return forward(self, *args, **kwargs)

    monkeypatch.setitem(pkv_hf.patch.__globals__, "decoder_forward", noted)
    return seen


def assert_served(model, calls):
    assert calls
    assert all(isinstance(cache, PagedCache) for cache in calls)
    assert_on_pages(model)


@pytest.mark.contract
def test_a_pipeline_over_batches(folder, calls):
    generator = transformers.pipeline("text-generation", model=str(folder), batch_size=2)
    prompts = ["One, two, three", "A much longer prompt, for padding on the left", "Four"]
    settings = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    conversation = [{"role": "user", "content": "Which page?"}]
    expected = generator(prompts, **settings), generator(conversation, num_beams=2, **settings)
    pkv_hf.patch(generator.model)
    assert (generator(prompts, **settings), generator(conversation, num_beams=2, **settings)) == expected
    assert_served(generator.model, calls)


@pytest.fixture
def server(folder, monkeypatch):
    """transformers' server in this process, its address, and the model that it has loaded."""
    server = Serve(force_model=str(folder), device="cpu", port=0, non_blocking=True)
    while not server.server.started:
        time.sleep(0.01)
    port = server.server.servers[0].sockets[0].getsockname()[1]
    (loaded,) = server._model_manager.loaded_models.values()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # its client calls localhost
    yield f"http://localhost:{port}/v1", loaded.model
    server.kill_server()


MESSAGES = [{"role": "user", "content": "Say something about pages."}]


def test_the_server_answers_as_without_pages(folder, server, calls):
    url, model = server
    client = InferenceClient(base_url=url)
    settings = {"model": str(folder), "max_tokens": 20, "temperature": 0.0}

    def answers():
        whole = client.chat_completion(MESSAGES, **settings)
        parts = [
            part.choices[0].delta.content or "" for part in client.chat_completion(MESSAGES, stream=True, **settings)
        ]
        return whole.choices[0].message.content, whole.usage.completion_tokens, parts

    expected = answers()
    assert expected[1] == 20
    assert len(expected[2]) > 3
    pkv_hf.patch(model)
    assert answers() == expected
    assert_served(model, calls)


def test_requests_at_the_same_time(folder, server):
    """The server takes them one after another, on a thread of its own."""
    url, model = server
    settings = {"model": str(folder), "max_tokens": 12, "temperature": 0.0}
    messages = [[{"role": "user", "content": f"Question number {i}"}] for i in range(3)]

    def answer(i, found):
        found[i] = InferenceClient(base_url=url).chat_completion(messages[i], **settings).choices[0].message.content

    def answers():
        found: dict[int, str] = {}
        threads = [threading.Thread(target=answer, args=(i, found)) for i in range(3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        return found

    expected = answers()
    assert len(set(expected.values())) == 3
    pkv_hf.patch(model)
    assert answers() == expected
    assert_on_pages(model)


def test_a_chat_of_two_turns(folder, server, calls, monkeypatch):
    url, model = server
    monkeypatch.setattr(chat.RichInterface, "confirm", lambda *_: False)
    flags = ["max_new_tokens=15", "do_sample=False"]

    def answers():
        said, typed = [], iter(["A first question?", "And a second one.", "!exit"])
        stream_output = chat.RichInterface.stream_output

        async def noted(self, stream):
            said.append(await stream_output(self, stream))
            return said[-1]

        with monkeypatch.context() as patched:
            patched.setattr(chat.RichInterface, "input", lambda _: next(typed))
            patched.setattr(chat.RichInterface, "stream_output", noted)
            chat.Chat(str(folder), url, flags)
        return said

    expected = answers()
    assert len(expected) == 2
    assert len(set(expected)) == 2
    pkv_hf.patch(model)
    assert answers() == expected
    assert_served(model, calls)
