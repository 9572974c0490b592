"""The executor on a GPU: its tokens, and its rows, are those of the CPU bit for bit. Kernels run in numba's simulator here."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, fails
from test_sampler import MODELS, sample

from sim.router.draw import score_law
from sim.router.one_token import new_token, route_token, sort_token
from sim.router.tables import fill_layer, new_layer
from sim.streams import stream_key


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("sigma", "group_sigma"), [(0.8, 0.4), (4.0, 0.0)])
def test_tokens_one_by_one_are_those_of_the_batches_bit_for_bit(name, sigma, group_sigma):
    model, n_tokens = MODELS[name], 2000
    mu = np.random.default_rng(4).normal(0, sigma, model.n_experts)
    layer, (k0, k1) = new_layer(model.n_experts, model.n_group), stream_key(0, "test")
    fill_layer(mu, layer)
    own = new_token(model.n_group, model.topk_group, model.top_k)
    law = tuple(score_law(model).astype(np.float32))
    found = np.empty((n_tokens, model.top_k), np.int16)
    for token in range(n_tokens):
        route_token(
            np.uint64(token), np.uint64(0), k0, k1, model.n_group, model.group_size, model.topk_group, model.top_k,
            np.float32(group_sigma), law,
            layer.weight, layer.gap, layer.gap_without, layer.alias, own,
        )  # fmt: skip
        if model.is_grouped:
            sort_token(own.size - own.expert, own)
        found[token] = own.whole[own.expert : own.expert + model.top_k]
    np.testing.assert_array_equal(found, sample(mu, model, group_sigma, n_tokens)[0])


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
