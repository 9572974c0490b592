"""A request effect that decays: contexts of tokens, the effects of contexts, and what traffic says of them."""

import json

import numpy as np
import pytest
from naive import contexts_of, philox

from sim import InputError, load_model, load_workload, synthetic_traffic
from sim.router import draw_trials
from sim.streams import CONTEXT, normals, stream_key
from sim.traffic import FittedLayers, SyntheticTraffic
from sim.traffic.synthetic import CONTEXTS

KEY = stream_key(0, "effect")
MIXED = SyntheticTraffic(
    "mixed", request_sigma=1.0, tokens_per_request=400, local_share=0.6, context_tokens=(2.0, 6.0, 40.0),
    context_shares=(0.3, 0.2, 0.5),
)  # fmt: skip


def test_contexts_are_those_of_the_plain_reference():
    comp = MIXED.draw_contexts(KEY, 3, 2, 1000)
    for trial, row in zip((3, 4), comp, strict=True):
        words = [philox([0, token, trial, int(CONTEXT)], [int(k) for k in KEY], 7) for token in range(1000)]
        assert row.tolist() == contexts_of(words, 400, (2.0, 6.0, 40.0), (0.3, 0.2, 0.5), CONTEXTS)
    np.testing.assert_array_equal(MIXED.draw_contexts(KEY, 4, 1, 70), comp[1:, :70])


def test_two_tokens_have_the_same_context_with_the_probability_that_is_said_wherever_they_lie():
    """Of 20,000 requests, at lags 1 to 64 and at four places. False-alarm rate below 1e-4: 4.8 standard errors of 32."""
    n = 20_000
    contexts = MIXED.draw_contexts(KEY, 0, n, 400)
    lags = np.array([1, 2, 3, 5, 8, 16, 32, 64])
    wanted = MIXED.same_context(lags)
    for start in (0, 7, 100, 300):
        found = (contexts[:, [start]] == contexts[:, start + lags]).mean(axis=0)
        assert (np.abs(found - wanted) < 4.8 * np.sqrt(wanted * (1 - wanted) / n)).all()
    assert MIXED.same_context(0) == pytest.approx(1)
    assert MIXED.same_context(10_000) == pytest.approx(1 / CONTEXTS)
    assert not np.array_equal(
        contexts[:, :200], MIXED.draw_contexts(KEY, 0, n, 800)[:, 400:600]
    )  # requests are other ones


def test_the_effect_is_standard_normal_and_its_correlation_falls_as_is_said():
    """Covariance over 4000 requests of 64 experts, at lags 0 to 64: 5 standard errors (false alarms below 1e-5)."""
    n = 4000
    mu = np.zeros((n, 64))
    logits = MIXED.draw_logits(KEY, mu, 0, 400, 0).reshape(n, CONTEXTS, 64)
    contexts = MIXED.draw_contexts(KEY, 0, n, 400)
    trial = np.arange(n)
    first = logits[trial, contexts[:, 50]]
    for lag in (0, 1, 4, 16, 64):
        wanted = 0.4 + 0.6 * MIXED.same_context(lag)
        found = (first * logits[trial, contexts[:, 50 + lag]]).mean()
        assert abs(found - wanted) < 5 * np.sqrt(2 / (64 * n)), lag


def test_fitted_layers_have_a_local_share_each():
    """Variance between contexts of a request over all of it, of layers with 0, 0.3 and 1: to 4 %, above 4 standard errors."""
    layers = FittedLayers.of(np.zeros((3, 32)), np.full((3, 32), 0.8), np.full((3, 1, 32), 0.6))
    traffic = SyntheticTraffic(
        "f", popularity="fitted", layers=layers, request_sigma=2.0, tokens_per_request=64, local_share=[0, 0.3, 1]
    )
    mu = traffic.draw_popularity(KEY, 0, 3000, 32)
    logits = traffic.draw_logits(KEY, mu, 0, 64, 0).reshape(1000, 3, CONTEXTS, 32)
    assert logits.var(axis=(0, 2, 3)) == pytest.approx(4.0, rel=0.06)
    within = logits.var(axis=2, ddof=1).mean(axis=(0, 2))
    assert within == pytest.approx([0, 1.2, 4], rel=0.04, abs=1e-9)
    np.testing.assert_array_equal(
        traffic.draw_logits(KEY, mu[1:4], 1, 64, 1), traffic.draw_logits(KEY, mu[:4], 0, 64, 0)[1:]
    )


def test_a_step_is_the_prefix_of_its_trial_where_the_effect_decays():
    model = load_model("olmoe-1b-7b")
    steps = np.array([1, 100, 399, 400, 401, 1300])
    whole, ids = draw_trials(model, MIXED, 0, range(6), 6, steps, 1300)
    for i, step in enumerate(steps):
        counts, some = draw_trials(model, MIXED, 0, range(2, 6), 6, np.array([step]), min(step, 300))
        np.testing.assert_array_equal(counts[:, 0], whole[2:, i])
        np.testing.assert_array_equal(some, ids[2:, : some.shape[1]])


def test_without_a_local_share_traffic_is_what_it_was():
    """Neither its streams nor its law know of contexts."""
    prefill = load_workload("prefill")
    assert json.dumps(prefill.law, sort_keys=True) == (
        '{"group_sigma": 0.4, "popularity": "lognormal", "request_sigma": 0.68, "sigma": 0.65, "tokens_per_request": 1024, '
        '"x0": -4.0}'
    )
    assert load_workload("prefill", context_tokens=[3.0], context_shares=[1.0]).law == prefill.law
    assert (
        load_workload("chat", local_share=0.5).law == load_workload("chat").law
    )  # there is no request effect to decay
    assert load_workload("prefill", local_share=0.5).law != prefill.law
    assert json.loads(json.dumps(MIXED.law)) == MIXED.law | {
        "context_tokens": [2, 6, 40],
        "context_shares": [0.3, 0.2, 0.5],
    }


def test_normals_are_standard_and_addressed_by_row():
    """Mean, variance, fourth moment of 400,000: 5 standard errors."""
    z = normals(KEY, CONTEXT, 0, (4000, 101)).astype(float)
    n = z.size
    assert abs(z.mean()) < 5 / np.sqrt(n)
    assert abs(z.var() - 1) < 5 * np.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 5 * np.sqrt(96 / n)
    assert abs((z[:, ::2][:, :50] * z[:, 1::2]).mean()) < 5 / np.sqrt(n / 2)
    np.testing.assert_array_equal(normals(KEY, CONTEXT, 0, (10, 101), 700), z[700:710].astype(np.float32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"local_share": 1.5}, "local_share must be a number from 0 to 1"),
        ({"local_share": [0.5, 0.5]}, "one for each layer"),
        ({"context_tokens": 3}, "context_tokens must be a list of 1 to 8"),
        ({"context_tokens": [0.5, 3]}, "context_tokens must be numbers from 1"),
        ({"context_tokens": [3.0]}, "a share for each"),
        ({"context_shares": [0.5, 0.6]}, "sum to 1"),
        ({"context_shares": [0.5, "a"]}, "numbers from 0 to 1"),
    ],
)
def test_bad_decays_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        synthetic_traffic(request_sigma=1.0, **fields)
