"""A request effect that decays: contexts of tokens, the effects of contexts, what traffic says of them, and its fit."""

import json
from dataclasses import replace

import numpy as np
import pytest
from naive import contexts_of, philox

from sim import InputError, load_model, load_workload, synthetic_traffic
from sim.fit import fit_text, fit_traffic
from sim.fit.correlation import (
    block_correlation,
    count_alike,
    count_both,
    fit_decay,
    lag_correlation,
    pairs_of_blocks,
    pick_covariance,
)
from sim.fit.effects import match_covariance
from sim.fit.fitting import without_shared_prefix
from sim.fit.made import make_traffic
from sim.model import ModelSpec
from sim.router import draw_trials
from sim.streams import CONTEXT, normals, stream_key
from sim.traffic import FittedLayers, SyntheticTraffic
from sim.traffic.synthetic import CONTEXTS, OF_PASSAGE, PASSAGES, same_passage

KEY = stream_key(0, "effect")
MIXED = SyntheticTraffic(
    "mixed", request_sigma=1.0, tokens_per_request=400, local_share=0.6, context_tokens=(2.0, 6.0, 40.0),
    context_shares=(0.3, 0.2, 0.5),
)  # fmt: skip


IN_PASSAGES = replace(MIXED, name="passages", passage_share=0.5, passage_tokens=20.0)


@pytest.mark.parametrize(
    ("traffic", "of_passages"),
    [(MIXED, (CONTEXTS,)), (IN_PASSAGES, (PASSAGES * OF_PASSAGE, OF_PASSAGE, 20.0))],
    ids=["contexts", "passages"],
)
def test_contexts_are_those_of_the_plain_reference(traffic, of_passages):
    comp = traffic.draw_contexts(KEY, np.array([3, 4]), 1000)
    for trial, row in zip((3, 4), comp, strict=True):
        words = [philox([0, token, trial, int(CONTEXT)], [int(k) for k in KEY], 7) for token in range(1000)]
        assert row.tolist() == contexts_of(words, 400, (2.0, 6.0, 40.0), (0.3, 0.2, 0.5), *of_passages)
    np.testing.assert_array_equal(traffic.draw_contexts(KEY, np.array([4]), 70), comp[1:, :70])


def test_two_tokens_have_the_same_context_with_the_probability_that_is_said_wherever_they_lie():
    """Of 20,000 requests, at lags 1 to 64 and at four places. False-alarm rate below 1e-4: 4.8 standard errors of 32."""
    n = 20_000
    contexts = MIXED.draw_contexts(KEY, np.arange(n), 400)
    lags = np.array([1, 2, 3, 5, 8, 16, 32, 64])
    wanted = MIXED.same_context(lags)
    for start in (0, 7, 100, 300):
        found = (contexts[:, [start]] == contexts[:, start + lags]).mean(axis=0)
        assert (np.abs(found - wanted) < 4.8 * np.sqrt(wanted * (1 - wanted) / n)).all()
    assert MIXED.same_context(0) == pytest.approx(1)
    assert MIXED.same_context(10_000) == pytest.approx(1 / CONTEXTS)
    assert not np.array_equal(
        contexts[:, :200], MIXED.draw_contexts(KEY, np.arange(n), 800)[:, 400:600]
    )  # requests are other ones


def test_the_effect_has_variance_1_and_its_correlation_falls_as_is_said():
    """Covariance over 4000 requests of 64 experts, at lags 0 to 64: 5 standard errors (false alarms below 1e-5), and the 1 / 64
    that evening out the strength takes off.
    """
    n = 4000
    mu = np.zeros((n, 64))
    logits = MIXED.draw_logits(KEY, mu, np.arange(n), np.arange(n), 400).reshape(n, CONTEXTS, 64)
    contexts = MIXED.draw_contexts(KEY, np.arange(n), 400)
    trial = np.arange(n)
    first = logits[trial, contexts[:, 50]]
    for lag in (0, 1, 4, 16, 64):
        wanted = 0.4 + 0.6 * MIXED.same_context(lag)
        found = (first * logits[trial, contexts[:, 50 + lag]]).mean()
        assert abs(found - wanted) < 5 * np.sqrt(2 / (64 * n)) + wanted / 64, lag


def test_passages_hold_longer_than_contexts_and_their_effect_is_shared_as_is_said():
    """Places and covariance over 4000 requests, at lags 0 to 64: 5 standard errors, and the 1 / 64 as above."""
    n = 4000
    trial, mu = np.arange(n), np.zeros((n, 64))
    logits = IN_PASSAGES.draw_logits(KEY, mu, trial, trial, 400).reshape(n, PASSAGES * OF_PASSAGE, 64)
    contexts = IN_PASSAGES.draw_contexts(KEY, trial, 400)
    first = logits[trial, contexts[:, 50]]
    for lag in (0, 1, 4, 16, 64):
        other = contexts[:, 50 + lag]
        passage, context = same_passage(lag, (2.0, 6.0, 40.0), (0.3, 0.2, 0.5), 20.0)
        assert IN_PASSAGES.same_context(lag) == context
        for found, wanted in (
            (contexts[:, 50] == other, context),
            (contexts[:, 50] // OF_PASSAGE == other // OF_PASSAGE, passage),
        ):
            assert abs(found.mean() - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / n) + 1e-12
        wanted = 0.4 + 0.3 * context + 0.3 * passage
        assert abs((first * logits[trial, other]).mean() - wanted) < 5 * np.sqrt(2 / (64 * n)) + wanted / 64, lag
    assert load_workload("prefill", passage_share=0.5).law == load_workload("prefill").law


def test_fitted_layers_have_a_local_share_each():
    """Variance between contexts of a request over all of it, of layers with 0, 0.3 and 1: to 5 %, above 4 standard errors."""
    layers = FittedLayers.of(np.zeros((3, 32)), np.ones((3, 32)), np.zeros((3, 1, 32)) + 0.05)
    traffic = SyntheticTraffic(
        "f", popularity="fitted", layers=layers, request_sigma=2.0, tokens_per_request=64, local_share=[0, 0.3, 1]
    )
    mu = traffic.draw_popularity(KEY, np.arange(3000), 32)
    logits = traffic.draw_logits(KEY, mu, np.arange(3000), np.arange(3000), 64).reshape(1000, 3, CONTEXTS, 32)
    assert logits.var(axis=(0, 2, 3)) == pytest.approx(4.0, rel=0.02)
    within = logits.var(axis=2, ddof=1).mean(axis=(0, 2))
    assert within == pytest.approx([0, 1.2, 4], rel=0.05, abs=0.02)
    first = np.arange(4)
    np.testing.assert_array_equal(
        traffic.draw_logits(KEY, mu[1:4], first[1:], first[1:], 64),
        traffic.draw_logits(KEY, mu[:4], first, first, 64)[1:],
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


def test_bad_decays_are_refused():
    for fields, message in (
        ({"local_share": 1.5}, "local_share must be a number from 0 to 1"),
        ({"local_share": [0.5, 0.5]}, "one for each layer"),
        ({"context_tokens": 3}, "context_tokens must be a list of 1 to 8"),
        ({"context_tokens": [0.5, 3]}, "context_tokens must be numbers from 1"),
        ({"context_tokens": [3.0]}, "a share for each"),
        ({"context_shares": [0.5, 0.6]}, "sum to 1"),
        ({"context_shares": [0.5, "a"]}, "numbers from 0 to 1"),
    ):
        with pytest.raises(InputError, match=message):
            synthetic_traffic(request_sigma=1.0, **fields)


# The fit.

LLAMA_4_LAGS = np.array([1, 2, 4, 8, 16, 32, 64, 100])
LLAMA_4 = np.array([0.257, 0.198, 0.165, 0.140, 0.119, 0.102, 0.089, 0.074])  # Llama-4-Maverick on MMLU, 24 layers


def test_the_form_of_the_decay_has_the_published_lag_correlations():
    """Llama-4-Maverick's within 4 %; none of the parts is negative."""
    decay = fit_decay(np.eye(100)[LLAMA_4_LAGS - 1], LLAMA_4[None])
    assert np.abs(decay.at(LLAMA_4_LAGS)[0] / LLAMA_4 - 1).max() < 0.04
    assert decay.near[0] >= decay.passage[0] >= decay.far[0] >= 0
    assert sum(decay.shares) == pytest.approx(1, abs=1e-3)


def test_a_decay_is_found_in_the_blocks_that_it_gives():
    """Two layers of known correlation in a context, a passage and a request, without noise: to 1e-4; and flat ones."""
    pairs = pairs_of_blocks((2, 4, 8, 16, 32, 64, 128, 256))
    assert pairs.sum(axis=1) == pytest.approx(1)
    passage, context = (pairs @ x for x in same_passage(np.arange(1, 256), (2, 16), (0.7, 0.3), 64))
    known = np.array([0.3 * context + 0.1 * passage + 0.05, 0.1 * context + 0.05 * passage + 0.1])
    decay = fit_decay(pairs, known)
    assert (decay.tokens, decay.passage_tokens) == ((2, 16), 64)
    assert decay.shares == pytest.approx((0.7, 0.3), abs=1e-3)
    assert decay.near == pytest.approx([0.45, 0.25], abs=1e-3)
    assert decay.passage == pytest.approx([0.15, 0.15], abs=1e-3)
    assert decay.far == pytest.approx([0.05, 0.1], abs=1e-3)
    flat = fit_decay(pairs, np.full((2, 8), 0.2))
    assert flat.near == pytest.approx(flat.far)


def test_counts_of_pairs_equal_a_loop():
    rng = np.random.default_rng(2)
    layer = np.stack([rng.permutation(9)[:3] for _ in range(40)]).astype(np.int16)
    first, hot = np.array([0, 3, 4, 20]), np.zeros((40, 9), int)
    np.put_along_axis(hot, layer.astype(int), 1, axis=1)
    alike, counts, both = np.zeros(1, np.int64), np.zeros((2, 9), np.int64), np.zeros((9, 9), np.int64)
    count_alike(layer, first, 5, alike, counts)
    assert alike[0] == sum(len(set(layer[t]) & set(layer[t + 5])) for t in first)
    np.testing.assert_array_equal(counts, [hot[first].sum(axis=0), hot[first + 5].sum(axis=0)])
    count_both(layer, first, 2, both)
    np.testing.assert_array_equal(both, sum(np.outer(hot[t], hot[t]) for start in first for t in (start, start + 1)))


SMALL = ModelSpec("small", 16, 2)


def test_strengths_of_requests_differ_as_is_said():
    """Of 4000 requests of 64 experts, each with its own: mean and sd of the logarithm of the effect's norm, to 5 standard errors
    (the logarithm is a capped exponential: mean 0, sd 1, less what the cap takes off). All else is the same traffic.
    """
    n = 4000
    mu = np.zeros((n, 64))
    args = (KEY, mu, np.arange(n), np.arange(n), 400)
    strong = replace(MIXED, strength_sd=0.4)
    found = np.log(strong.draw_logits(*args) / MIXED.draw_logits(*args)).reshape(n, -1)
    np.testing.assert_allclose(found, np.repeat(found[:, :1], found.shape[1], axis=1), atol=1e-9)
    assert abs(found[:, 0].mean()) < 0.4 * (5 / np.sqrt(n) + np.exp(-5))
    assert found[:, 0].std() == pytest.approx(0.4 * 0.966, abs=0.4 * 5 * np.sqrt(2 / n))  # sd of min(x, 5): 0.966
    assert strong.law != MIXED.law


@pytest.mark.slow
def test_requests_that_differ_in_strength_are_told_from_those_of_one():
    """Top-1 of 32 experts, 400 sequences of 128 tokens, made with an sd of 0.6 or none: over 0.3, and below 0.2."""
    model = replace(SMALL, n_experts=32, top_k=1)
    layers = FittedLayers.of(np.random.default_rng(8).normal(0, 0.4, (4, 32)))
    for strength_sd, low, high in ((0.6, 0.3, 0.9), (0.0, 0.0, 0.2)):
        traffic = SyntheticTraffic(
            "s", popularity="fitted", layers=layers, request_sigma=1.2, tokens_per_request=128, strength_sd=strength_sd
        )
        assert low <= fit_traffic(model, make_traffic(traffic, model, 51_200, 400)).prefill.strength_sd <= high


@pytest.fixture(scope="module")
def decaying():
    """Routing of 300 sequences of 200 tokens whose effect decays over 12 tokens, in two layers."""
    rng = np.random.default_rng(8)
    layers = FittedLayers.of(rng.normal(0, 0.4, (2, 16)), np.full((2, 16), 0.8), rng.normal(0, 0.6, (2, 1, 16)))
    traffic = SyntheticTraffic(
        "d", popularity="fitted", layers=layers, request_sigma=1.2, tokens_per_request=200, local_share=0.6,
        context_tokens=[16.0], context_shares=[1.0],
    )  # fmt: skip
    return make_traffic(traffic, SMALL, 60_000, 300)


@pytest.mark.slow
def test_a_decay_that_tokens_have_is_fitted_and_made_again(decaying, tmp_path):
    """Made with the fit: correlation at lags 1 to 128, and of blocks to 128 tokens, within 12 % (standard errors of either
    about 4 %). What is written is read back.
    """
    fit = fit_traffic(SMALL, decaying)
    assert 0.3 < np.mean(fit.prefill.local_share) < 0.8
    again = make_traffic(fit.prefill, SMALL, 60_000, 300, seed=1)
    for found in (lag_correlation, block_correlation):
        real, made = (
            np.array([x.mean() for n, x in found(record, 16).items() if n <= 128]) for record in (decaying, again)
        )
        np.testing.assert_allclose(made, real, rtol=0.12)
    path = tmp_path / "d.toml"
    path.write_text(fit_text(fit))
    read = load_workload(path, phase="prefill")
    assert read.law == fit.prefill.law
    assert read.n_contexts == (PASSAGES * OF_PASSAGE if read.n_passages else CONTEXTS)


def test_the_covariance_of_experts_is_that_of_the_picks(decaying):
    """From no knowledge of it to half of the error at most, that the picks of two tokens leave in their covariance."""
    measured, noise = pick_covariance(decaying, 0, 64, 16)
    assert 0 < noise < (measured**2).sum() / 4
    p = np.bincount(decaying.topk_ids[0].ravel(), minlength=16) / decaying.starts[-1]
    covariance = match_covariance(SMALL, 0.0, p, measured, noise, np.eye(16))
    assert np.trace(covariance) == pytest.approx(16)
    assert np.linalg.eigvalsh(covariance).min() > -1e-9
    off = ~np.eye(16, dtype=bool)
    wanted = measured[off] / np.outer(p * (1 - p), p * (1 - p))[off]
    assert np.corrcoef(wanted, covariance[off])[0, 1] > 0.7


def test_tokens_that_all_sequences_begin_with_are_left_out(decaying):
    """30 tokens before each sequence, a few of whose experts the batch has changed."""
    rng = np.random.default_rng(5)
    lengths = np.diff(decaying.starts)
    ids = np.insert(decaying.topk_ids, np.repeat(decaying.starts[:-1], 30), 0, axis=1)
    shared = np.arange(ids.shape[1]) % 230 < 30
    prefix = np.stack([rng.permutation(16)[:2] for _ in range(60)]).reshape(2, 30, 2)
    ids[:, shared] = np.tile(prefix, (1, len(lengths), 1))
    ids[:, shared, 0] = np.where(
        rng.random((2, shared.sum())) < 0.04, rng.integers(16, size=(2, shared.sum())), ids[:, shared, 0]
    )
    rest, n = without_shared_prefix(replace(decaying, topk_ids=ids, starts=230 * np.arange(301)))
    assert n == 30
    np.testing.assert_array_equal(rest.topk_ids, decaying.topk_ids)
    np.testing.assert_array_equal(rest.starts, decaying.starts)
    assert without_shared_prefix(decaying)[1] == 0
