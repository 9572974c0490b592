"""The notebooks run from top to bottom, on a small budget, without errors or warnings; as committed they have outputs."""

from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
from conftest import ROOT

from notebooks import FOLDER, errors_of, execute

PATHS = sorted(FOLDER.glob("*.ipynb"))
assert [path.name[:2] for path in PATHS] == ["01", "02", "03", "04"]


@pytest.fixture(scope="module")
def executed():
    """The notebooks as futures, executed side by side: a kernel mostly waits for one core."""
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(PATHS)) as pool:
        patch.setenv("EPSIM_EFFORT", "0.05")
        patch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
        patch.setenv("PYTHONPATH", str(ROOT))  # these sources, whatever is installed
        yield {path: pool.submit(execute, path) for path in PATHS}


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebooks_run(path, executed):
    assert not errors_of(executed[path].result())


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebooks_are_committed_with_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    assert not errors_of(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert sum(bool(cell.outputs) for cell in code) >= len(code) // 2
