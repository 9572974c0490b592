"""The executor on a GPU: its tokens, and its rows, are those of the CPU bit for bit. Kernels run in numba's simulator here."""

import numpy as np
import pytest
from test_sampler import MODELS, sample

from sim.router.draw import score_law
from sim.router.one_token import Token, route_token, sort_token, token_room
from sim.router.tables import fill_layer, new_layer
from sim.streams import stream_key


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("sigma", "group_sigma"), [(0.8, 0.4), (4.0, 0.0)])
def test_tokens_one_by_one_are_those_of_the_batches_bit_for_bit(name, sigma, group_sigma):
    model, n_tokens = MODELS[name], 2000
    mu = np.random.default_rng(4).normal(0, sigma, model.n_experts)
    layer, (k0, k1) = new_layer(model.n_experts, model.n_group), stream_key(0, "test")
    fill_layer(mu, layer)
    room = token_room(model.n_group, model.topk_group, model.top_k)
    own = Token(*(np.empty(n, np.float32 if i < 6 else np.int32) for i, n in enumerate(room)))
    law = tuple(score_law(model).astype(np.float32))
    found = np.empty((n_tokens, model.top_k), np.int16)
    for token in range(n_tokens):
        route_token(
            np.uint64(token), np.uint64(0), k0, k1, model.topk_group, model.top_k, np.float32(group_sigma), law,
            layer.weight, layer.gap, layer.gap_without, layer.alias, own,
        )  # fmt: skip
        if model.is_grouped:
            sort_token(len(own.expert), own)
        found[token] = own.expert[: model.top_k]
    np.testing.assert_array_equal(found, sample(mu, model, group_sigma, n_tokens)[0])
