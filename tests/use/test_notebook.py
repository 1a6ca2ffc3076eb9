"""The notebook runs from top to bottom, here on a CPU with its small sizes, and shows what it gave on a GPU."""

from __future__ import annotations

import pytest

from pkv_hf.bench.results.resume import digest
from places import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = ROOT / "notebooks" / "colab.ipynb"


def test_it_shows_what_its_cells_gave_on_a_gpu():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    recorded = notebook.metadata["pkv_hf"]
    assert recorded["sources"] == digest([cell.source for cell in cells])  # else: scripts/record_notebook.py
    assert not recorded["gpu"].startswith("none")
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    printed = "".join(output.get("text", "") for output in outputs)
    for words in (recorded["gpu"], "new ones fit", "tokens/s", "the same tokens after loading: True", " captured, "):
        assert words in printed
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_it_runs_from_top_to_bottom(monkeypatch, small_folder):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the small sizes
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (chosen,) = [cell for cell in notebook.cells if 'MODEL = "smollm2"' in cell.source]
    chosen.source = chosen.source.replace('MODEL = "smollm2"', f"MODEL = {str(small_folder)!r}")
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": NOTEBOOK.parent}})
    client.execute()  # raises with a cell's traceback
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    for words in (
        "no GPU: small sizes",
        "64 tokens and 8 new ones fit",
        "step 2: ",
        "perplexity of held-out text",
        "the same tokens after loading: True",
        "Name a keyword. '",
    ):
        assert words in printed, printed
    assert printed.count("last step: sdpa") == 2
    assert any("image/png" in output.get("data", {}) for output in outputs), "no plot"
