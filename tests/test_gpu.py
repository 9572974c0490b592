"""Tokens worked one by one, as a GPU's threads do, are those of the batches bit for bit."""

import os
import subprocess
import sys

import numpy as np
import pytest
from test_sampler import MODELS, sample

from sim.router.draw import score_law
from sim.router.one_token import MOST_GROUPS, MOST_PLACES, Token, route_token
from sim.router.tables import fill_layer, new_layer
from sim.streams import stream_key


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("sigma", "group_sigma"), [(0.8, 0.4), (4.0, 0.0)])
def test_tokens_one_by_one_are_those_of_the_batches(name, sigma, group_sigma):
    model, n_tokens = MODELS[name], 2000
    mu = np.random.default_rng(4).normal(0, sigma, model.n_experts)
    layer, key = new_layer(model.n_experts, model.n_group), stream_key(0, "test")
    fill_layer(mu, layer)
    f, i = np.float32, np.int32
    kinds = [(MOST_GROUPS, f), (MOST_GROUPS, i), (MOST_GROUPS, f), (2 * MOST_GROUPS, f), (MOST_GROUPS, i)]
    own = Token(*(np.empty(n, t) for n, t in [*kinds, (MOST_GROUPS, f), (MOST_PLACES, f), (MOST_PLACES, i)]))
    tables = layer.weight, layer.gap, layer.gap_without, layer.alias
    found = np.empty((n_tokens, model.top_k), np.int16)
    for token in range(n_tokens):
        route_token(
            token, 0, key, model.topk_group, model.top_k, np.float32(group_sigma), score_law(model), *tables, own
        )
        found[token] = own.expert[: model.top_k]
    np.testing.assert_array_equal(found, sample(mu, model, group_sigma, n_tokens)[0])


IN_SIMULATOR = """
import numpy as np
from sim import load_model
from sim.router import gpu
from sim.router.draw import score_law
from sim.router.sampler import sample_trials
from sim.streams import stream_key

compiled = gpu.route_token  # the simulator's arrays are wrapped, which compiled code does not take
gpu.route_token = lambda *a: compiled(*(x._item._ary if hasattr(x, "_item") else x for x in a))
model, tokens, found = load_model("deepseek-v3"), np.array([1, 7, 12]), []
mu = np.random.default_rng(0).normal(0, 1, (2, 2, model.n_experts))
for sampler in (sample_trials, gpu.sample_trials_on_gpu):
    counts, ids = np.zeros((2, 3, model.n_experts), np.int32), np.zeros((2, 3, model.top_k), np.int16)
    shape = model.n_group, model.topk_group, 0.4, score_law(model)
    sampler(5, stream_key(0, "test"), mu, 8, tokens, *shape, counts, ids)
    found.append((counts, ids))
for on_cpu, on_gpu in zip(*found, strict=True):
    np.testing.assert_array_equal(on_cpu, on_gpu)
"""


@pytest.mark.slow
def test_the_cuda_kernel_counts_as_the_cpu_in_numbas_simulator():
    """Two trials of twelve tokens, two requests each, at steps of 1, 7 and 12 tokens."""
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    subprocess.run([sys.executable, "-c", IN_SIMULATOR], env=environment, check=True, timeout=300)
