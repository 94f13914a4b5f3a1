"""The notebooks run from the first cell to the last."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FIRST, *OTHERS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
NOTEBOOKS = [FIRST, *(pytest.param(path, marks=pytest.mark.slow) for path in OTHERS)]

SMALLER = {
    "minutes = 1  #": "minutes = 0.05  #",
    "train, minutes=minutes,": "train, channels=(16, 16), minutes=minutes,",
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if path.stem == "00_generate":
        # A test cannot train for a minute, nor draw that many samples with as wide a network.
        for cell in code:
            for given, small in SMALLER.items():
                cell.source = cell.source.replace(given, small)
        assert all(sum(small in cell.source for cell in code) == 1 for small in SMALLER.values())
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


@pytest.mark.parametrize("path", [FIRST, *OTHERS], ids=lambda path: path.stem)
def test_what_a_notebook_shows_is_whole_and_free_of_warnings(path):
    """Every cell was run, in order; a warning would name a folder of whoever ran it."""
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.get("name", output.output_type) for cell in code for output in cell.outputs}
    assert not kinds & {"stderr", "error"}
