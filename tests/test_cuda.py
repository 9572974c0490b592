"""The executor on a GPU: its rows are those of the CPU bit for bit. Kernels run in numba's simulator here."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, fails

from sim.sweeps import device

IN_SIMULATOR = """
from dataclasses import replace
from conftest import assert_same_tables
from sim import load_workload, sweep
from sim.sweeps import device

options = dict(ep_sizes=[4, 8], tokens=[2, 9], placements=["linear", "round_robin"], trials=2, bound_layers=0, received="off")
prefill = replace(load_workload("prefill"), tokens_per_request=4)
for model, n_gpus, workload, other in (
    ("deepseek-v3", 1, "chat", {}),
    ("deepseek-v3", 1, "gpqa-tilted", {"tokens": [2]}),
    ("deepseek-v3", 1, prefill, {}),
    ("deepseek-v3", 1, "chat", {"draws": 3, "trials": 7, "tokens": [2, 5]}),
    ("deepseek-v3", 1, "chat", {"placements": ["random", "linear"], "tokens": [2], "thresholds": [1.1, 2]}),
    ("mixtral-8x7b", 2, "chat", {"trials": 4}),
):
    device.count_devices = lambda: n_gpus
    results = [sweep(model, workload, **options | other, executor=name) for name in ("threads", "cuda")]
    assert_same_tables(*results)
"""


@pytest.mark.slow
def test_rows_are_those_of_the_cpu_bit_for_bit():
    """All popularities, request effects, draws of several trials, placements of each draw, no groups, two GPUs; at toy sizes, in
    numba's simulator.
    """
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    subprocess.run([sys.executable, "-c", IN_SIMULATOR], env=environment, cwd=ROOT, check=True, timeout=300)


SWEEP = ["sweep", "--ep", 8, "--tokens", 2, "--trials", 16, "--bound-layers", 0, "--executor", "cuda"]


def test_without_a_gpu_there_is_one_clear_line(capsys, tmp_path):
    fails(capsys, [*SWEEP, "--out", tmp_path / "out"], "--executor cuda needs an NVIDIA GPU", "epsim[cuda]")
    assert not (tmp_path / "out").exists()


def test_what_is_not_computed_on_a_gpu_is_refused_by_name(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "count_devices", lambda: 1)
    for words, part in (
        (["--received", "on"], "--received off"),
        (["--received", "off", "--placement", "eplb+8"], "replicas"),
        (["--received", "off", "--dummy-tokens", 3], "dummy_tokens"),
    ):
        fails(capsys, [*SWEEP, *words, "--out", tmp_path / "out"], "--executor cuda", part)
