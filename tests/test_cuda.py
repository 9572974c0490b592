"""The executor on a GPU: its rows are those of the CPU bit for bit. Kernels run in numba's simulator here."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, fails

IN_SIMULATOR = """
from conftest import assert_same_tables
from sim import load_workload, sweep

options = dict(ep_sizes=[4, 8], tokens=[2, 9], placements=["linear", "round_robin"], trials=4, bound_layers=0, received="off")
prefill = load_workload("prefill", tokens_per_request=4)
for workload, other in [
    ("chat", {}),
    ("gpqa-tilted", {"trials": 2}),
    (prefill, {"trials": 2}),
    ("chat", {"draws": 3, "trials": 7, "tokens": [2, 5]}),
    ("chat", {"placements": ["random", "linear"], "tokens": [2], "thresholds": [1.1, 2]}),
]:
    results = [sweep(MODEL, workload, **options | other, executor=name) for name in ("threads", "cuda")]
    assert_same_tables(*results)
"""


@pytest.mark.slow
@pytest.mark.parametrize("model", ["'deepseek-v3'", "'mixtral-8x7b'"], ids=["groups", "no groups"])
def test_rows_are_those_of_the_cpu_bit_for_bit(model):
    """All popularities, request effects, draws of several trials, placements of each draw; at toy sizes, in numba's simulator."""
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    program = IN_SIMULATOR.replace("MODEL", model)
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, check=True, timeout=300)


SWEEP = ["sweep", "--ep", 8, "--tokens", 2, "--trials", 16, "--bound-layers", 0, "--executor", "cuda"]


def test_without_a_gpu_there_is_one_clear_line(capsys, tmp_path):
    fails(capsys, [*SWEEP, "--out", tmp_path / "out"], "--executor cuda needs an NVIDIA GPU", "epsim[cuda]")
    assert not (tmp_path / "out").exists()
