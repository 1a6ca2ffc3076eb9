"""Every example as a user runs it: a process of its own, its status, and what it prints."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from places import ROOT

pytest.importorskip("peft")
pytest.importorskip("openai")
pytest.importorskip("evaluate")

EXAMPLES = ROOT / "examples"
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",  # in float32, where tokens are the same to the last
}
SECONDS = 300
"""That an example may take where others keep the cores busy."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, smollm2, smollm2_tokenizer):
    """The model and its tokenizer, as `--model` takes them."""
    folder = tmp_path_factory.mktemp("smollm2")
    for file in Path(smollm2.name_or_path).iterdir():
        (folder / file.name).symlink_to(file)
    smollm2_tokenizer.save_pretrained(folder)
    return folder


def command(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(EXAMPLES / name), *map(str, arguments)]


def run(name: str, *arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(name, *arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == status, done.stderr
    return done


def assert_on_pages(result: dict[str, object]) -> None:
    assert result["calls_on_pages"] > 0
    assert result["calls_by_transformers"] == 0


def same_on_pages(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    """The last line of stdout, which says that all ran on pages and gave the same tokens."""
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["same_tokens"] is True
    assert_on_pages(result)
    return result


def test_generate(small_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Pages hold what attention has read. " * 8)
    done = run("generate.py", "--model", small_folder, "--text-file", text, "--new-tokens", 12)
    assert same_on_pages(done)["prompt_tokens"] > 70
    assert "last step: sdpa" in done.stdout


def test_chat(small_folder):
    done = run("chat.py", "--model", small_folder, "--questions", "What is with?", "What is as?", "--new-tokens", 8)
    result = same_on_pages(done)
    assert result["turns"] == 4
    assert result["shared_tokens"] > 800
    assert result["calls_on_pages"] <= 1 + 4 * 8
    assert done.stdout.count("assistant ") == 4


def test_batch_evaluation(small_folder):
    done = run(
        "batch_evaluation.py",
        "--model",
        small_folder,
        "--context",
        128,
        "--prompts",
        4,
        "--batch",
        2,
        "--new-tokens",
        6,
    )
    result = same_on_pages(done)
    assert result["perplexity_pages"] == pytest.approx(result["perplexity_transformers"], rel=1e-4)
    assert [line.split()[0] for line in done.stdout.splitlines()[2:4]] == ["transformers", "pages"]
    assert "100%" in done.stderr


def test_lora_then_serve(small_folder, tmp_path):
    adapters = tmp_path / "adapters"
    done = run("lora_then_serve.py", "--model", small_folder, "--steps", 12, "--new-tokens", 8, "--adapters", adapters)
    result = same_on_pages(done)
    assert result["loss_after"] < result["loss_before"]
    assert (adapters / "adapter_model.safetensors").is_file()


@contextlib.contextmanager
def serving(folder: Path, log: Path):
    """`serve.py` as a process, and the address that it prints. It is gone when the context is, whatever happens."""
    with log.open("w") as stderr:
        server = subprocess.Popen(
            command("serve.py", "--model", folder, "--port", 0),
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        line = server.stdout.readline()
        assert line.startswith("on pages at http://"), log.read_text()
        yield server, line.split()[-1]
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def test_the_client_prints_tokens_as_the_server_makes_them(folder, tmp_path):
    with serving(folder, tmp_path / "log") as (server, url):
        client = subprocess.Popen(
            command("client.py", "What is a page?", "--url", url, "--new-tokens", 40),
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
        )
        try:
            pieces, times = [], []
            while piece := os.read(client.stdout.fileno(), 65536):
                pieces.append(piece)
                times.append(time.perf_counter())
            assert client.wait(SECONDS) == 0
        finally:
            client.kill()
            client.wait()
            client.stdout.close()
        *_, text, last = b"".join(pieces).decode().splitlines()
        result = json.loads(last)
        assert text
        assert len(pieces) > 10  # they came one by one
        assert result["pieces"] > 10
        assert result["first_token_s"] < 0.7 * result["last_token_s"]
        assert times[-1] - times[0] > 0.5 * (result["last_token_s"] - result["first_token_s"])

        server.send_signal(signal.SIGTERM)
        printed, _ = server.communicate(timeout=30)
        assert server.returncode == 0
        assert_on_pages(json.loads(printed.splitlines()[-1]))


def test_a_port_that_is_taken_ends_the_server(small_folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("serve.py", "--model", small_folder, "--port", taken.getsockname()[1], status=1)
    assert "address already in use" in done.stderr
