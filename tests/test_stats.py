import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, gamma, norm, t

from sim.stats import (
    Design,
    Histogram,
    Moments,
    bounded_mean_interval,
    effective_blocks,
    mean_interval,
    moments_of_draws,
    probability_interval,
    quantile_interval,
    quantile_intervals,
)


def moments_of(of_draw, blocks):
    """Moments of draws' sums; of_draw, blocks [draws]."""
    return Moments(*(np.array([x.sum()], float) for x in (of_draw, of_draw**2, of_draw * blocks)))


def test_mean_interval_of_single_blocks_is_students_and_one_draw_has_none():
    x = np.random.default_rng(0).normal(3, 2, 50)
    mean, low, high = mean_interval(moments_of(x, np.ones(50)), Design.of(50, 50))
    half = t.isf(0.025, 49) * x.std(ddof=1) / np.sqrt(50)
    np.testing.assert_allclose([mean[0], low[0], high[0]], [x.mean(), x.mean() - half, x.mean() + half])
    one = mean_interval(moments_of(np.array([6.0]), np.array([3.0])), Design.of(3, 1))
    np.testing.assert_array_equal(np.ravel(one), [2, np.nan, np.nan])


@given(st.integers(1, 500), st.integers(1, 50))
def test_design_deals_blocks_evenly(trials, draws):
    draws = min(trials, draws)
    dealt = np.bincount(np.arange(trials) % draws)
    assert Design.of(trials, draws) == (trials, draws, (dealt**2).sum())


@pytest.mark.parametrize(("hits", "n"), [(0, 30), (1, 30), (15, 30), (30, 30), (3, 10_000)])
def test_probability_interval_is_clopper_pearson(hits, n):
    low, high = probability_interval(np.array([hits / n]), np.array([float(n)]))
    ref = binomtest(hits, n).proportion_ci(0.95, "exact")
    np.testing.assert_allclose([low[0], high[0]], [ref.low, ref.high], rtol=1e-9, atol=1e-12)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.floats(0.001, 0.999))
def test_quantile_is_the_order_statistic(values, q):
    distinct, counts = np.unique(values, return_counts=True)
    histogram = Histogram(distinct, counts)
    assert histogram.quantile(q) == np.quantile(values, q, method="inverted_cdf")
    at, n = histogram.exceedance()
    assert n.tolist() == [sum(v >= x for v in values) for x in at]


@pytest.mark.parametrize(("n", "q"), [(37, 0.99), (200, 0.5), (1000, 0.5), (400, 0.95), (4000, 0.95), (4000, 0.99)])
def test_quantile_interval_takes_binomial_ranks_and_so_holds_the_truth_as_often_as_it_says(n, q):
    """Of values that do not repeat: so many lie at or below the truth as the binomial says. Ranks are whole numbers, so up to
    96.2 % is right.
    """
    value, low, high = quantile_interval(Histogram(np.arange(1, n + 1), np.ones(n, int)), q, n)
    assert value == int(np.ceil(q * n - 1e-9))
    assert low == max(binom.ppf(0.025, n, q), 1)
    if binom.ppf(0.975, n, q) < n:
        assert high == binom.ppf(0.975, n, q) + 1
        assert 0.95 <= binom.cdf(high - 1, n, q) - binom.cdf(low - 1, n, q) < 0.963
    else:
        assert np.isnan(high)


@pytest.mark.parametrize(("draws", "per_draw"), [(200, 1), (24, 20), (60, 7)])
def test_intervals_hold_the_truth_as_often_as_they_say(draws, per_draw):
    """Blocks of a draw share a normal effect. 1500 seeds: the share that holds is known to 0.6 % (one standard error), so
    a 95 % interval for the mean falls outside 92.7 to 97.3 % by chance alone with probability 1e-4; the probability's
    interval is conservative and may hold more often."""
    truth_p = 0.2

    level = norm.isf(truth_p) * np.sqrt(2)

    def cover(rng):
        x = rng.normal(size=(draws, 1)) + rng.normal(size=(draws, per_draw))
        design, blocks = Design.of(draws * per_draw, draws), np.full(draws, per_draw)
        _, low, high = mean_interval(moments_of(x.sum(axis=1), blocks), design)
        event = moments_of((x >= level).sum(axis=1), blocks)
        p = event.total / design.blocks
        p_low, p_high = probability_interval(p, effective_blocks(event, design))
        return low[0] <= 0 <= high[0], p_low[0] <= truth_p <= p_high[0]

    mean, probability = np.mean([cover(np.random.default_rng(seed)) for seed in range(1500)], axis=0)
    assert 0.927 < mean < 0.973
    assert probability > 0.927


def test_never_seen_is_bounded_by_the_draws_not_by_the_blocks():
    event = moments_of(np.zeros(30), np.full(30, 100))
    assert effective_blocks(event, Design.of(3000, 30))[0] == 30
    assert probability_interval(np.zeros(1), np.array([30.0]))[1][0] == pytest.approx(1 - 0.025 ** (1 / 30))


SEEDS = 2000
"""Seeds of the coverage table: a share is known to 0.5 % (one standard error), so 93 to 97 % is 4 of them from 95 %."""


def test_quantile_intervals_of_many_histograms_are_those_of_each():
    rng = np.random.default_rng(2)
    each = [np.unique(rng.integers(0, 9, n), return_counts=True) for n in (1, 5, 400, 3000)]
    values, counts = (np.concatenate(parts) for parts in zip(*each, strict=True))
    edges = np.cumsum([0, *(len(of_one) for of_one, _ in each)])
    blocks = np.array([1.0, 5, 380, 120])
    cumulated = np.concatenate([[0], np.cumsum(counts)])
    many = quantile_intervals(values, cumulated, edges[:-1], edges[1:], 0.95, blocks)
    ref = [quantile_interval(Histogram(*one), 0.95, n) for one, n in zip(each, blocks, strict=True)]
    np.testing.assert_array_equal(np.transpose(many), ref)


@pytest.mark.parametrize("draws", [40, 200])
def test_quantile_intervals_of_clustered_blocks(draws):
    """Blocks of a draw share a normal effect; the effective blocks come from the event next to the quantile."""
    per_draw, q, held = 10, 0.95, 0
    truth = norm.ppf(q) * np.sqrt(2)
    design = Design.of(draws * per_draw, draws)
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(draws, 1)) + rng.normal(size=(draws, per_draw))
        event = moments_of((x >= truth).sum(axis=1), np.full(draws, per_draw))
        blocks = float(np.floor(effective_blocks(event, design)[0]))
        values = np.round(np.sort(x.ravel()) * 2**20).astype(int)
        _, low, high = quantile_interval(Histogram(*np.unique(values, return_counts=True)), q, blocks)
        held += not (low > truth * 2**20) and not (high < truth * 2**20)  # a missing bound holds
    assert held / SEEDS > 0.93


@pytest.mark.parametrize("n", [30, 1000])
@pytest.mark.parametrize("mean", [0.05, 1, 3, 20])
def test_probability_intervals_hold_for_rare_and_for_zero_counts(n, mean):
    """Expected counts from 0.05 (nearly always zero) to 20."""
    p = mean / n
    hits = np.random.default_rng(n).binomial(n, p, SEEDS)
    low, high = probability_interval(hits / n, np.full(SEEDS, float(n)))
    assert ((low <= p) & (p <= high)).mean() > 0.93


@pytest.mark.parametrize(
    ("draws", "per_draw", "p"), [(50, 20, 0.002), (50, 20, 0.01), (24, 40, 0.001), (200, 5, 0.003)]
)
def test_probability_intervals_of_rare_clustered_events(draws, per_draw, p):
    """Events that come in some draws more than in others: log-normal probabilities (sd 1), their mean p."""
    held, design = 0, Design.of(draws * per_draw, draws)
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        of_draw = np.minimum(p * np.exp(rng.normal(size=draws) - 0.5), 1)
        event = moments_of(rng.binomial(per_draw, of_draw), np.full(draws, per_draw))
        low, high = probability_interval(event.total / design.blocks, effective_blocks(event, design))
        held += low[0] <= p <= high[0]
    assert held / SEEDS > 0.93


@pytest.mark.parametrize(("n", "skew"), [(1000, 0.5), (10_000, 1.0)])
def test_mean_intervals_hold_for_skewed_blocks(n, skew):
    """Log-normal blocks, as imbalances are."""
    held = 0
    for seed in range(SEEDS):
        x = np.exp(skew * np.random.default_rng(seed).normal(size=n))
        _, low, high = mean_interval(moments_of(x, np.ones(n)), Design.of(n, n))
        held += low[0] <= np.exp(skew**2 / 2) <= high[0]
    assert 0.93 < held / SEEDS < 0.97


# Rare means


def rare_interval(blocks, per_draw=1, least=0, most=7):
    """Interval of the mean of blocks int [draws, per_draw]."""
    draws = len(blocks)
    moments = moments_of(blocks.sum(axis=1), np.full(draws, per_draw))
    mean, low, high = bounded_mean_interval(
        moments, Design.of(draws * per_draw, draws), np.array([least]), np.array([most])
    )
    return mean[0], low[0], high[0]


def test_a_rare_mean_has_the_interval_of_fay_and_feuer():
    """Three blocks of 1 and one of 3, of 400: of their sum the gamma distribution, at the upper end with one block more."""
    x = np.zeros((400, 1))
    x[:4, 0] = 1, 1, 1, 3
    mean, low, high = rare_interval(x)
    variance = 400 * x.var(ddof=1) * (t.isf(0.025, 399) / norm.isf(0.025)) ** 2
    one_more = 2 * (400 * x.var(ddof=1) / 6) - 1
    ref = [
        gamma(total**2 / v, scale=v / total).ppf(p) / 400
        for total, v, p in ((6, variance, 0.025), (6 + one_more, variance + one_more**2, 0.975))
    ]
    np.testing.assert_allclose([mean, low, high], [6 / 400, *ref])


def test_a_rare_mean_is_seen_from_the_end_of_the_range_that_it_is_near():
    x = np.zeros((400, 1))
    x[:4, 0] = 1, 1, 1, 3
    mean, low, high = rare_interval(x)
    np.testing.assert_allclose(rare_interval(7 - x), [7 - mean, 7 - high, 7 - low])
    np.testing.assert_allclose(rare_interval(x + 5, least=5, most=12), [5 + mean, 5 + low, 5 + high])


def test_a_mean_that_is_not_rare_has_students_interval():
    x = np.random.default_rng(0).binomial(7, 0.4, (300, 1))
    moments = moments_of(x.sum(axis=1), np.ones(300))
    assert rare_interval(x) == tuple(end[0] for end in mean_interval(moments, Design.of(300, 300)))


def test_what_never_differed_is_bounded_by_the_draws():
    unseen = 1 - 0.025 ** (1 / 30)
    np.testing.assert_allclose(rare_interval(np.zeros((30, 20)), 20), [0, 0, 7 * unseen])
    np.testing.assert_allclose(rare_interval(np.full((30, 20), 2), 20), [2, 2 - 2 * unseen, 2 + 5 * unseen])
    assert rare_interval(np.full((30, 20), 2), 20, least=2, most=2) == (2, 2, 2)


SIZES = {
    "one": [0, 1], "few above one": [0, 0.8, 0.16, 0.04], "halving": [0, 0.5, 0.25, 0.125, 0.0625, 0.0625],
    "any": [0, *[1 / 7] * 7], "rarely five": [0, 0.9, 0, 0, 0, 0.1],
}  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("hits", [0.3, 1, 2, 3, 5, 10, 20])
def test_intervals_of_rare_means_hold(sizes, hits):
    """400 independent blocks, of which few are above 0. 2000 seeds, drawn at once: coverage is known to 0.5 %, and
    the least found, 94.4 %, is 3 of these above 93 %."""
    rng, p = np.random.default_rng(round(10 * hits)), np.array(SIZES[sizes])
    n_hits = rng.binomial(400, hits / 400, SEEDS)
    values = rng.choice(len(p), (SEEDS, n_hits.max()), p=p) * (np.arange(n_hits.max()) < n_hits[:, None])
    moments = Moments(values.sum(axis=1), (values**2).sum(axis=1), values.sum(axis=1))
    _, low, high = bounded_mean_interval(moments, Design.of(400, 400), np.zeros(SEEDS), np.full(SEEDS, 7))
    truth = hits / 400 * (p @ np.arange(len(p)))
    assert ((low <= truth) & (truth <= high)).mean() > 0.93


@pytest.mark.parametrize(("draws", "per_draw"), [(24, 40), (58, 32), (200, 5)])
@pytest.mark.parametrize("hits", [0.5, 3, 10, 20])
def test_intervals_of_rare_means_hold_for_clustered_blocks(draws, per_draw, hits):
    """Log-normal probabilities (sd 1) of draws; coverage is 96.2 % or more."""
    rng, p = np.random.default_rng(draws), hits / draws / per_draw
    of_draw = np.minimum(p * np.exp(rng.normal(size=(SEEDS, draws)) - 0.5), 1)
    total = rng.binomial(per_draw, of_draw).astype(float)
    moments = Moments(total.sum(axis=1), (total**2).sum(axis=1), (total * per_draw).sum(axis=1))
    _, low, high = bounded_mean_interval(
        moments, Design.of(draws * per_draw, draws), np.zeros(SEEDS), np.full(SEEDS, 7)
    )
    assert ((low <= p) & (p <= high)).mean() > 0.93


def test_moments_of_blocks_are_sums_over_draws():
    """Draw 1 has no block."""
    moments, design = moments_of_draws(np.array([1, 2, 5]), np.array([0, 0, 2]))
    assert design == (3, 2, 5)
    assert moments == (8, 34, 11)
