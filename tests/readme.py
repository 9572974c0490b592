"""Tables of the READMEs, each as the command above it prints it: `python tests/readme.py` writes them (`make tables`).

A table stands between <!-- table: epsim ... --> and <!-- end -->, and a test holds the two equal.
"""

import contextlib
import functools
import io
import os
import re
import shlex
import sys
from pathlib import Path

from sim.cli import main

ROOT = Path(__file__).parent.parent
PATHS = [ROOT / "README.md", *sorted(ROOT.glob("[a-z]*/README.md"))]
BLOCK = re.compile(r"(<!-- table: epsim (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


@functools.cache
def printed(command):
    """What a command of epsim prints, run in the root of the repository."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.chdir(ROOT):
        if status := main(shlex.split(command)):
            raise SystemExit(f"epsim {command}: exit status {status}")
    return out.getvalue()


def tables():
    """Path, command and text of every table."""
    return [(path, block[2], block[3]) for path in PATHS for block in BLOCK.finditer(path.read_text())]


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "80")
    for path in PATHS:
        text = path.read_text()
        new = BLOCK.sub(lambda block: block[1] + printed(block[2]) + block[4], text)
        path.write_text(new)
        print(f"{path.relative_to(ROOT)}: {'changed' if new != text else 'unchanged'}", file=sys.stderr)
