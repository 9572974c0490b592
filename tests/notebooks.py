"""Execute the notebooks and write them with their outputs: what `make notebooks` runs."""

import asyncio
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"


def execute(notebook):
    """Execute a notebook, and drop what changes from run to run."""
    client = NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": str(FOLDER)}})
    asyncio.run(client.async_execute())  # in a loop of its own, that is closed, on any thread
    for number, cell in enumerate(notebook.cells):
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            for kind, text in output.get("data", {}).items():
                if kind in ("text/plain", "text/html"):  # addresses, and the random ids of styled tables
                    text = re.sub(r"(?<=T_)[0-9a-f]{5}(?=[_\W])", str(number), text)
                    output["data"][kind] = re.sub(r" at 0x[0-9a-f]+", "", text)
    notebook.metadata.language_info = {"name": "python"}


def errors_of(notebook):
    """What the notebook printed as errors or warnings."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [
        output.get("text", output.get("evalue"))
        for output in outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]) if sys.argv[1:] else sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        execute(notebook)
        if errors := errors_of(notebook):
            sys.exit(f"{path.name}: {errors[0]}")
        nbformat.write(notebook, path)
        print(path)
