"""Runs notebooks/colab.ipynb from top to bottom and saves what it shows: on a GPU, so that the page has its numbers.

What goes to stderr (progress, warnings) is left out. The tests compare the saved sources' digest with the cells', so
that a cell that changes is run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pkv_hf.arguments import needs
from pkv_hf.bench.results.records import OUT_FOLDER, environment, output
from pkv_hf.bench.results.resume import digest
from pkv_hf.errors import status

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "colab.ipynb"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=output, default=f"{OUT_FOLDER}/{NOTEBOOK.name}", help="default: %(default)s")
    arguments = parser.parse_args()
    return status("record_notebook", lambda: record(arguments.out))


def record(out: Path) -> None:
    needs("nbclient", "nbformat", "ipykernel", "matplotlib", "peft")
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        cell.metadata.pop("execution", None)  # when each cell ran
    notebook.metadata["pkv_hf"] = {**environment(), "sources": digest([cell.source for cell in cells])}
    out.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, out)
    print(json.dumps({"notebook": str(out), **notebook.metadata["pkv_hf"]}))


if __name__ == "__main__":
    raise SystemExit(main())
