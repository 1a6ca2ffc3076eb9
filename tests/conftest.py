import gc
import importlib.util
import logging
import os
import sys
import tempfile

from places import ROOT

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched; read when transformers is imported

import pytest
import torch
import transformers
from filelock import FileLock

import interpreter

interpreter.use()
from tiny import tiny  # noqa: E402

transformers.utils.logging.enable_propagation()  # so that pytest's caplog sees what it and pkv_hf say
SCRIPTS = ROOT / "scripts"
calibrations = tempfile.TemporaryDirectory(prefix="pkv_hf-tests-")
os.environ["PKV_HF_CACHE"] = calibrations.name  # none of this machine's user
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # what was imported stays: collections, of which the tests ask for many, need not look at it again


@pytest.fixture(autouse=True)
def fresh_pages_hold_nan(monkeypatch):
    """New pages hold what memory held before: here NaN, so that a test sees every read of what nothing wrote."""
    from pkv_hf.cache.pool import NULL_PAGE, PagePool

    allocate = PagePool._allocate

    def poisoned(self, *args):
        tensor = allocate(self, *args)
        fresh = tensor[:, NULL_PAGE + 1 :]
        if fresh.is_floating_point() and fresh.dtype.itemsize > 1:
            fresh.fill_(float("nan"))
        else:
            fresh.view(torch.uint8).fill_(0x7F)  # NaN in float8; in int8 the NaN is the scale's
        return tensor

    monkeypatch.setattr(PagePool, "_allocate", poisoned)


@pytest.fixture(autouse=True)
def checks_of_one_run(monkeypatch):
    """A tiny layer is judged by as many runs as a large one, since the interpreter is slow, and by the same numbers
    whatever ran before."""
    from pkv_hf.patches import check, reading

    monkeypatch.setattr(check, "JUDGED", 1)
    reading._generator.manual_seed(0)


@pytest.fixture(autouse=True)
def verbosity():
    """Sets how much transformers says. After each test that is as before, whatever a command has set."""
    library, ours = transformers.utils.logging, logging.getLogger("pkv_hf")
    before = library.get_verbosity(), ours.level
    yield library.set_verbosity
    library.set_verbosity(before[0])
    ours.setLevel(before[1])


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """SmolLM2-135M, fp32, on the CPU: real weights. Tests leave it unpatched."""
    from transformers import LlamaForCausalLM

    from pkv_hf.bench.inputs.smollm2 import load_smollm2

    base = tmp_path_factory.getbasetemp()  # a worker's, in that of the run
    saved = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2"
    with FileLock(f"{saved}.lock"):  # one worker expands the weights, the others read what it has saved
        if not saved.exists():
            load_smollm2().save_pretrained(saved)
    return LlamaForCausalLM.from_pretrained(saved)


@pytest.fixture(scope="session")
def pydoc_ids():
    """Token ids of a real text, `[1, about 113,000]`."""
    from pkv_hf.bench.inputs.smollm2 import load_tokenizer, pydoc_text

    return load_tokenizer()(pydoc_text(), return_tensors="pt").input_ids


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    from pkv_hf.bench.inputs.smollm2 import load_tokenizer

    return load_tokenizer()


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory, smollm2_tokenizer):
    """A folder for `--model`: a tiny random model with SmolLM2's tokenizer, for what does not ask for its text."""
    folder = tmp_path_factory.mktemp("small")
    sizes = {"vocab_size": len(smollm2_tokenizer), "max_position_embeddings": 8192, "tie_word_embeddings": True}
    tiny("llama", **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=2).save_pretrained(folder)
    smollm2_tokenizer.save_pretrained(folder)
    return folder


def script(name):
    """A script as a module, which finds what lies beside it as it does when it is run."""
    if str(SCRIPTS) not in sys.path:
        sys.path.append(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script's main() with arguments; returns its status and the lines of stdout; `run.stderr` is stderr."""

    def run(name, *arguments):
        module = script(name)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        status = module.main()
        printed = capsys.readouterr()
        run.stderr = printed.err
        return status, printed.out.splitlines()

    run.load = script
    return run
