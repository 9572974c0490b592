"""The notebooks run from top to bottom, on a small budget, without errors or warnings; as committed they have outputs."""

from copy import deepcopy

import nbformat
import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_notebook

from notebooks import FOLDER, errors_of, execute

NOTEBOOKS = [nbformat.read(path, as_version=4) for path in sorted(FOLDER.glob("*.ipynb"))]
assert len(NOTEBOOKS) == 4


@pytest.mark.slow
def test_notebooks_run(monkeypatch):
    """In one kernel that forgets every name between them: a good part of a short run is its start."""
    monkeypatch.setenv("EPSIM_EFFORT", "0.04")
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # these sources, whatever is installed
    cells = [deepcopy(cell) for each in NOTEBOOKS for cell in (*each.cells, new_code_cell("%reset -f"))]
    for i, cell in enumerate(cells):
        cell.id = str(i)
    whole = new_notebook(cells=cells)
    execute(whole)
    assert not errors_of(whole)


def test_notebooks_are_committed_with_outputs():
    for notebook in NOTEBOOKS:
        assert not errors_of(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(cell.execution_count for cell in code)
        assert sum(bool(cell.outputs) for cell in code) >= len(code) // 2
