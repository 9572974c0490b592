"""Rare events over all layers: against exact answers of small models, brute force, and what sampling sees.

Seeds are fixed; comparisons with another estimate have a false-alarm rate of 1e-4 each, shared by all of a test.
"""

from itertools import product
from math import comb

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scipy.stats import binom, norm

from sim import ModelSpec, SyntheticTraffic, load_model, load_workload, place, sweep
from sim.figures import exceedance
from sim.placement import place_fixed
from sim.router import draw_trials
from sim.theory import no_rare_events_because, rare_tail
from sim.theory.rare import fill_sum_law

FALSE_ALARM = 1e-4
ONE_EACH = ModelSpec("tiny", 4, 1)


def lognormal(sigma):
    return SyntheticTraffic("drawn", popularity="lognormal", sigma=sigma)


def exact_on_one_rank(sigma, held, tokens, least):
    """Sum over ranks of P(load >= least), top-1 and ungrouped: given mu a load is binomial; trapezoids over mu, whose error
    falls faster than any power of the step.
    """
    z = np.arange(-7.5, 7.6, 0.75)
    normals = np.meshgrid(*[z] * sum(held), indexing="ij")
    density = np.prod([norm.pdf(x) * 0.75 for x in normals], axis=0)
    weights = [np.exp(sigma * x) for x in normals]
    total, p, first = sum(weights), 0.0, 0
    for n in held:
        p += (density * binom.sf(least - 1, tokens, sum(weights[first : first + n]) / total)).sum()
        first += n
    return p


def agree(row, p, p_error=0.0, comparisons=1):
    """Whether a row's interval, widened from 95 % to the false-alarm rate, holds p (of standard error p_error)."""
    wide = norm.isf(FALSE_ALARM / (2 * comparisons))
    half = np.log(row.high / row.low) / 2 / norm.isf(0.025)
    return abs(np.log(row.probability / p)) < wide * np.hypot(half, p_error / p)


def test_the_law_without_replacement_equals_enumeration():
    for counts, tokens in (
        ((3, 2, 1, 0, 2), 3),
        ((10, 5, 0, 3, 1), 4),
        ((0, 0, 7), 3),
        ((0, 4, 0), 2),
        ((2, 1, 1), 4),
    ):
        largest = tokens * (len(counts) - 1)
        law, scratch = np.empty(largest + 1), np.empty((2, tokens + 1, largest + 1))
        fill_sum_law(np.array(counts), tokens, law, *scratch)
        ref = np.zeros(largest + 1)
        for taken in product(*(range(min(n, tokens) + 1) for n in counts)):
            if sum(taken) == tokens:
                ref[sum(j * i for j, i in enumerate(taken))] += np.prod([comb(*pair) for pair in zip(counts, taken)])  # noqa: B905
        np.testing.assert_allclose(law, ref / ref.sum(), atol=1e-15)


@pytest.mark.parametrize("held", [(1, 1, 1, 1), (2, 1, 1)])
def test_small_models_equal_the_exact_integral_from_1e2_to_1e9(held):
    """Loads above half of all tokens, so that ranks exclude each other; all on one rank is the largest of them. Ranks of
    equal and of unequal sizes.
    """
    model, rank = ONE_EACH, np.repeat(np.arange(len(held)), held)
    sigma, tokens = (0.4 if len(held) == 4 else 0.2), 32
    thresholds = [x for x in (2.2, 2.4, 2.6, 2.8, 3, 3.2, 3.4, 3.6, 3.8) if x <= len(held)]
    result = rare_tail(model, lognormal(sigma), rank, tokens, imbalance=thresholds, one_rank=True, floor=1e-10)
    mean = tokens / len(held)
    assert len(result.rows) >= 4
    assert min(row.probability for row in result.rows) < 1e-6
    for row in result.rows:
        least = tokens if row.metric == "one_rank" else int(np.ceil(row.threshold * mean - 1e-9))
        assert agree(row, exact_on_one_rank(sigma, held, tokens, least), comparisons=10), row


def test_two_ranks_are_idle_as_the_exact_integral_says():
    """With two ranks one is idle exactly when all of the load is on the other."""
    held, tokens, sigma = (2, 2), 24, 0.3
    (row,) = rare_tail(ONE_EACH, lognormal(sigma), np.repeat([0, 1], held), tokens, idle_ranks=[1], floor=1e-10).rows
    assert row.metric == "idle_ranks"
    assert row.probability < 1e-4
    assert agree(row, exact_on_one_rank(sigma, held, tokens, tokens))


@pytest.mark.slow
def test_short_budgets_cover_in_100_seeds():
    """400 layers, P from 1e-2 to 1e-5: at least 93 % of the intervals, less two standard errors of 100 seeds."""
    exact = {x: exact_on_one_rank(0.4, (1, 1, 1, 1), 32, round(8 * x)) for x in (2.5, 3.0, 3.5)}
    hits = {x: [] for x in exact}
    for seed in range(100):
        result = rare_tail(ONE_EACH, lognormal(0.4), np.arange(4), 32, imbalance=list(exact), n_layers=400, seed=seed)
        for row in result.rows:
            hits[row.threshold].append(row.low <= exact[row.threshold] <= row.high)
    for x, found in hits.items():
        assert len(found) > 50, x
        assert np.mean(found) > 0.93 - 2 * np.sqrt(0.93 * 0.07 / len(found)), x


@pytest.mark.slow
@pytest.mark.parametrize(("placement", "ep_size"), [("linear", 8), ("round_robin", 16)])
def test_brute_force_of_two_billion_layers_is_reproduced(shared, placement, ep_size):
    """Chat, 64 tokens, P from 1e-1 to 1e-8; the given file has hits and steps."""
    model, rows = load_model("deepseek-v3"), pd.read_csv(shared / "measured" / "tails-brute-force.csv")
    rows = rows[(rows.placement == placement) & (rows.ep_size == ep_size) & (rows.hits > 0)]
    rank = place(placement, model, ep_size).rank_of_expert
    result = rare_tail(model, load_workload("chat"), rank, 64, imbalance=rows.threshold.tolist(), n_layers=6000)
    found = {row.threshold: row for row in result.rows}
    assert len(found) >= 4
    for row in rows.itertuples():
        if row.threshold in found:
            p = row.hits / row.steps
            assert agree(found[row.threshold], p, np.sqrt(row.hits) / row.steps, len(rows)), row


def test_estimates_agree_with_a_sweep_of_a_billion_steps():
    """The committed sweep of `--executor cuda`: eight cells, P down to 2e-8, wherever 20 steps or more were hit."""
    folder = ROOT / "results/measured/billion-steps"
    tail, counts = pd.read_csv(folder / "tail.csv"), pd.read_parquet(folder / "counts.parquet")
    loads = counts[counts.metric == "max_load"]
    held = []
    for row in tail[(tail.method == "rare") & (tail.metric == "imbalance")].itertuples():
        cell = loads[(loads.placement == row.placement) & (loads.ep_size == row.ep_size)]
        hits = int(cell[cell.value * row.ep_size >= row.threshold * 64 * 8]["count"].sum())
        if hits >= 20:
            p = hits / row.trials
            held.append(agree(row, p, np.sqrt(hits) / row.trials, 76))
    assert len(held) == 76
    assert all(held)


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["chat", "gpqa-tilted", "prefill"])
def test_estimates_agree_with_sampling_where_both_see(workload):
    """Grouped and unequal ranks, one, 8 and 96 tokens: the small model's imbalance, idle ranks and one-rank event."""
    model, traffic, n = (
        ModelSpec("small", 24, 3, 4, 2, "sigmoid", "top2_sum", has_bias=True),
        load_workload(workload),
        30_000,
    )
    steps = np.array([1, 8, 96])
    counts, _ = draw_trials(model, traffic, 3, range(n), n, steps)
    for placement, ep_size in (("linear", 5), ("round_robin", 4)):
        rank = place_fixed(placement, model, ep_size, 8).rank_of_expert
        loads = counts @ (rank[:, None] == np.arange(ep_size))
        for i, tokens in enumerate(steps.tolist()):
            result = rare_tail(
                model, traffic, rank, tokens, imbalance=[1.5, 2, 2.5, 3], idle_ranks=[1, 2], one_rank=True, floor=1e-5,
                n_layers=1000,
            )  # fmt: skip
            most, idle = loads[:, i].max(axis=1), (loads[:, i] == 0).sum(axis=1)
            assert result.rows
            for row in result.rows:
                least = np.ceil(row.threshold * tokens * 3 / ep_size - 1e-9)
                events = {
                    "imbalance": most >= least,
                    "idle_ranks": idle >= row.threshold,
                    "one_rank": idle == ep_size - 1,
                }
                p = max(events[row.metric].mean(), 1 / n)
                if p > 30 / n:
                    assert agree(row, p, np.sqrt(p / n), 60), (placement, tokens, row, p)


def test_a_sweep_goes_on_past_its_draws():
    """Rows of all layers in tail.csv, from the bulk to the floor; the figure's curve, and what it says of it, follow."""
    options = {"ep_sizes": [4], "tokens": [32], "placements": ["linear", "random"], "trials": 300, "bound_layers": 3}
    result = sweep(ONE_EACH, lognormal(0.4), **options, tail_floor=1e-7)
    rare = result.tail[result.tail.method == "rare"]
    assert set(rare.placement) == {"linear"}
    assert set(rare.given) == {""}
    assert rare.probability.between(1e-7, 0.5).all()
    assert rare.probability.min() < 1e-5
    assert (rare.sort_values("threshold").groupby("metric").probability.diff().dropna() <= 0).all()
    assert any("random" in note and "differs between layers" in note for note in result.notes)
    (row,) = rare[(rare.metric == "imbalance") & (rare.threshold == 3)].itertuples()
    assert row.low < exact_on_one_rank(0.4, (1, 1, 1, 1), 32, 24) < row.high
    assert "rare-event estimate" in exceedance(result, 32)._suptitle.get_text()
    plain = sweep(ONE_EACH, lognormal(0.4), **options)
    assert "tail_floor" not in plain.identity
    pd.testing.assert_frame_equal(plain.tail, result.tail[result.tail.method != "rare"])


def test_rows_depend_on_the_seed_alone():
    """Not on the number of threads."""
    options: dict = {"imbalance": [3.0], "one_rank": True, "n_layers": 200}
    one, two, other = (
        rare_tail(ONE_EACH, lognormal(0.5), np.arange(4), 16, n_threads=n, seed=seed, **options)
        for n, seed in ((1, 0), (2, 0), (1, 1))
    )
    assert one == two
    assert one != other


def test_what_one_layer_carries_is_refused():
    result = rare_tail(ONE_EACH, lognormal(2.0), np.arange(4), 32, imbalance=[3.9], n_layers=20, floor=1e-12)
    assert not result.rows
    assert all("one layer carries" in reason for _, _, reason in result.refused)


def test_traffic_without_estimates_says_why():
    for workload, why in (
        (SyntheticTraffic("u"), "not drawn"),
        (SyntheticTraffic("d", popularity="lognormal", sigma=1.0, dummy_tokens=2), "dummy"),
        (SyntheticTraffic("r", popularity="lognormal", sigma=1.0, request_sigma=1.0, tokens_per_request=8), "requests"),
        (SyntheticTraffic("t", popularity="tilted", request_sigma=1.0), "tilted"),
    ):
        assert why in no_rare_events_because(workload, 16)
        with pytest.raises(ValueError, match=why):
            rare_tail(ONE_EACH, workload, np.arange(4), 16, imbalance=[2.0])
