"""Shared fixtures. Tests that want the larger reference data look for it beside the checkout, and skip without it."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("MPLBACKEND", "Agg")

# The first example of a kernel compiles it; and the same examples every time, so that a failure is one for everybody.
settings.register_profile("epsim", deadline=None, derandomize=True)
settings.load_profile("epsim")

ROOT = Path(__file__).parent.parent
VECTORS = Path(__file__).parent / "vectors"


@pytest.fixture
def shared() -> Path:
    folder = Path(os.environ.get("EPSIM_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("the shared reference data does not lie beside this checkout")
    return folder
