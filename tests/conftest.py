"""What tests share: where data lies, toy models and traffic, a command that fails in one line, tables that are equal.

Tests that want the larger reference data look for it beside the checkout, and skip without it.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

# The workers of `pytest -n` share the processors; set before numpy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pandas as pd
import pytest
from hypothesis import settings

from sim.cli import main
from sim.kernels import is_cold
from sim.model import ModelSpec, load_model
from sim.traffic import RecordedTraffic

# The first example of a kernel compiles it; and the same examples every time, so that a failure is one for everybody.
settings.register_profile("epsim", deadline=None, derandomize=True)
settings.load_profile("epsim")

ROOT = Path(__file__).parent.parent
VECTORS = Path(__file__).parent / "vectors"
TINY = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "n_routed_experts": 32,
    "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 4, "first_k_dense_replace": 1,
}  # fmt: skip


def pytest_configure(config):
    """Compile the kernels before the workers of `pytest -n` start: they share a cache, and would all compile the same."""
    if config.getoption("numprocesses", None) and is_cold():
        environment = os.environ | {"PYTHONPATH": str(ROOT)}  # these sources, whatever is installed
        subprocess.run([sys.executable, ROOT / "tests/compile.py"], env=environment, cwd=ROOT, check=True)


LONGEST = (
    "notebooks traffic bounds cost capacity sampler cuda sweep advice cluster readme rare cli layer figures precision claims"
).split()


def pytest_collection_modifyitems(items):
    """The longest files first, so that `make test` does not wait for one at the end."""
    of_file = [f"test_{name}.py" for name in LONGEST]
    items.sort(key=lambda item: of_file.index(item.path.name) if item.path.name in of_file else len(of_file))


def pytest_collection_finish():
    """Modules and tests stay to the end: the garbage collector need not go through them again and again."""
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data."""
    folder = Path(os.environ.get("EPSIM_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("the shared reference data does not lie beside this checkout")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Config file of a model with 3 MoE layers of 32 experts, small enough to be computed for real."""
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(TINY))
    return path


def plain(n_experts, n_group=1):
    """A model of which only the experts and their groups matter."""
    return ModelSpec("plain", n_experts, top_k=1, n_group=n_group, topk_group=1)


def load_config(folder, config, name="config.json"):
    """The model of a config, a dictionary or text, through a file in a folder."""
    path = folder / name
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return load_model(path)


def record_of(ids, lengths, name="file:x"):
    """Recorded traffic of ids [tokens, layers, top_k], in sequences of some lengths."""
    by_layer = np.ascontiguousarray(np.asarray(ids).transpose(1, 0, 2).astype(np.int16))
    return RecordedTraffic(name, "decode", by_layer, np.concatenate([[0], np.cumsum(lengths)]), "digest")


def write(path, *, lines=None, **arrays):
    """A traffic file: JSON lines, an .npy of one array, or an .npz of several."""
    if lines is not None:
        path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    elif path.suffix == ".npy":
        np.save(path, next(iter(arrays.values())))
    else:
        np.savez_compressed(path, **arrays)
    return path


def run(*words):
    """Exit status of a command, called in process."""
    return main([str(word) for word in words])


def fails(capsys, words, *parts, status=2):
    """The command fails with one line that has the parts, and no traceback."""
    assert run(*words) == status, words
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if not line.startswith("note:")]
    assert len(errors) == 1, (words, lines)
    assert errors[0].startswith("epsim")
    for part in parts:
        assert str(part) in errors[0]


def assert_same_tables(a, b):
    """Two results of sweeps are equal to the last digit."""
    for name in ("summary", "tail", "counts"):
        pd.testing.assert_frame_equal(getattr(a, name), getattr(b, name))


def assert_nothing_overlaps(figure):
    """Title and legend lie over no axes, nor over each other, and the title ends within the figure."""
    figure.draw_without_rendering()
    around = [part.get_window_extent() for part in (figure._suptitle, *figure.legends)]
    boxes = [*around, *(ax.get_window_extent() for ax in figure.axes)]
    for i, box in enumerate(around):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
    assert around[0].x1 <= figure.bbox.x1
