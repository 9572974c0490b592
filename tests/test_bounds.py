"""Past sampling: grouped theory against enumeration and integration, sums against exact arithmetic, and bounds against
what sampling sees.

Statistical tests have fixed seeds and a false-alarm rate of 1e-4 each, shared by all their comparisons.
"""

from collections import Counter
from fractions import Fraction
from itertools import combinations, permutations

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from exact import idle_ranks, max_load_of_one_token, one_rank, spread_by_enumeration
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from sim import ModelSpec, load_model, load_workload, place, route, sweep, theory
from sim.placement import place_fixed
from sim.theory.rare import rare_tail
from sim.theory.tails import fill_layer_bounds, join_layer_bounds
from sim.traffic.synthetic import X0

FALSE_ALARM = 1e-4


def grouped(n_experts, n_group, topk_group, top_k, both, scoring="sigmoid"):
    return ModelSpec(
        "small", n_experts, top_k, n_group, topk_group, scoring, "top2_sum" if both else "max", has_bias=both
    )


SHAPES = [(6, 3, 2, 2), (8, 2, 1, 3), (8, 4, 2, 3), (6, 3, 2, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("both", [True, False])
def test_the_router_spreads_experts_as_enumeration_says(shape, both):
    """The real router on the same values in every order: equal counts, no statistics."""
    n_experts, n_group, topk_group, top_k = shape
    values = np.sort(np.random.default_rng(n_experts).normal(size=n_experts)).astype(np.float32)
    dealt = np.array(list(permutations(values)))
    ids = route(dealt, grouped(n_experts, n_group, topk_group, top_k, both)).astype(int)
    in_group = (ids[:, :, None] // (n_experts // n_group) == np.arange(n_group)).sum(axis=1)
    found = Counter(tuple(row[:topk_group]) for row in (-np.sort(-in_group, axis=1)).tolist())
    scores = 1 / (1 + np.exp(-values.astype(float)))
    exact = spread_by_enumeration(scores.tolist(), n_group, topk_group, top_k, both)
    assert {spread: Fraction(n, len(dealt)) for spread, n in found.items()} == exact


@pytest.mark.parametrize(("n_group", "size", "kept", "top_k"), [(2, 4, 1, 3), (4, 2, 2, 3), (2, 3, 1, 2), (3, 2, 2, 4)])
def test_integration_equals_enumeration_where_only_order_counts(n_group, size, kept, top_k):
    exact = spread_by_enumeration(range(n_group * size), n_group, kept, top_k, both=False)
    integral = theory.spread_over_groups(n_group, size, kept, top_k, False, "sigmoid", X0)
    for spread, p in integral.items():
        assert p == pytest.approx(float(exact.get(spread, 0)), rel=1e-9, abs=1e-12)


SMALL_GROUPS = [  # groups, experts of each, groups kept, top-k
    (2, 1, 1, 1), (8, 1, 4, 3), (2, 2, 1, 1), (4, 2, 2, 3), (16, 2, 8, 3), (4, 3, 1, 3), (4, 3, 2, 1), (8, 4, 4, 3),
    (16, 8, 8, 3), (8, 16, 4, 3),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("scoring", "shapes"), [("sigmoid", SMALL_GROUPS), ("softmax", SMALL_GROUPS[2::3])])
def test_spreads_over_small_groups_add_up_to_1(scoring, shapes):
    """Both group scores, groups of 1 to 16 experts, E from 2 to 128: three times closer than is checked at run time."""
    for n_group, size, kept, top_k in shapes:
        for both in (False, True) if size > 1 else (False,):
            spread = theory.spread_over_groups(n_group, size, kept, top_k, both, scoring, X0)
            assert sum(spread.values()) == pytest.approx(1, abs=3e-8), (n_group, size, kept, top_k, both)
            assert min(spread.values()) >= 0


@pytest.mark.slow
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("n_group", "size", "kept", "top_k"), [(4, 2, 2, 2), (3, 3, 2, 4), (4, 4, 2, 3)])
def test_spreads_over_small_groups_equal_the_routers(scoring, n_group, size, kept, top_k):
    """Scores of top-2 sums: 2**17 tokens of independent Gumbel logits through the exact router, every spread at once."""
    model, n_tokens = grouped(n_group * size, n_group, kept, top_k, True, scoring), 2**17
    logits = X0 + np.random.default_rng(size).gumbel(size=(n_tokens, n_group * size)).astype(np.float32)
    ids = route(logits.astype(np.float32), model).astype(int)
    in_group = (ids[:, :, None] // size == np.arange(n_group)).sum(axis=1)
    found = Counter(map(tuple, (-np.sort(-in_group, axis=1))[:, :kept].tolist()))
    exact = theory.spread_over_groups(n_group, size, kept, top_k, True, scoring, X0)
    bound = norm.isf(FALSE_ALARM / (2 * len(exact)))
    for spread, p in exact.items():
        assert abs(found[spread] - n_tokens * p) < max(bound * np.sqrt(n_tokens * p * (1 - p)), 25), spread
    assert set(found) <= set(exact)


@pytest.mark.slow
@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=9).filter(lambda p: sum(p) > 0.01),
    st.sampled_from([1, 2, 3, 7, 20]),
    st.floats(0, 1),
)
def test_tails_of_sums_keep_their_digits(weights, n_tokens, where):
    law = np.array(weights) / sum(weights)
    one = 2**1200  # probabilities in whole parts of it: a float is exact, and a product is rounded
    exact = [one]
    for _ in range(n_tokens):
        longer = [0] * (len(exact) + len(law) - 1)
        for i, p in enumerate(exact):
            for j, q in enumerate(law):
                longer[i + j] += p * int(Fraction(float(q)) * one)
        exact = [(p + one // 2) // one for p in longer]
    least = round(where * (len(exact) + 1))
    reference, at_once = Fraction(sum(exact[least:]), one), theory.TailsOfSums(law[None]).at(n_tokens, least)[0]
    for found in (theory.tails(law[None], n_tokens, least)[0], at_once):
        if reference > 1e-200:
            assert found == pytest.approx(float(reference), rel=1e-9)
        else:
            assert found <= 1e-199


def test_bounds_by_tables_lie_within_those_by_single_tails():
    """Tables add up all ranks; single tails put a bound in the place of negligible ones, of 2 % at most."""
    rng = np.random.default_rng(0)
    laws = [rng.dirichlet(np.exp(-np.arange(5.0)), (3, n)) for n in (16, 4, 6)]
    for n_tokens in (2, 8, 64):
        sums = [theory.TailsOfSums(p.reshape(-1, 5)) for p in laws]
        for least in range(2 * n_tokens, 4 * n_tokens, n_tokens // 2):
            single, joined = np.empty((3, 2)), np.empty((3, 2))
            fill_layer_bounds(*laws, n_tokens, least, single)
            at = [of.at(n_tokens, x).reshape(3, -1) for of, x in zip(sums, (least, least, 2 * least), strict=True)]
            join_layer_bounds(*at, joined)
            assert (joined[:, 1] <= single[:, 1] * (1 + 1e-9)).all()
            rare = single[:, 1] < 1  # 1 stands for what is common, too
            assert (joined[:, 1] >= single[:, 1] * 0.98 - 1e-299)[rare].all()


def test_loads_of_tokens_are_tallied_as_one_would():
    """Of single ranks and of two together, for loads from 1 on."""
    rng = np.random.default_rng(1)
    ids = np.argsort(rng.random((1500, 32)), axis=1)[:, :6].astype(np.int16)
    rank, hot = rng.permutation(np.arange(32) % 5).astype(np.int32), np.array([0, 2, 3])
    single, together = np.zeros((5, 7), np.int64), np.zeros((3, 7), np.int64)
    theory.tally_loads(ids, rank, hot, single, together)
    loads = (rank[ids][:, :, None] == np.arange(5)).sum(axis=1)
    for r in range(5):
        np.testing.assert_array_equal(single[r, 1:], np.bincount(loads[:, r], minlength=7)[1:])
    for pair, (a, b) in enumerate(combinations(hot, 2)):
        np.testing.assert_array_equal(together[pair, 1:], np.bincount(loads[:, a] + loads[:, b], minlength=7)[1:])


@pytest.mark.parametrize(
    ("n_group", "size", "kept", "top_k", "ep_size"), [(2, 3, 1, 2, 3), (3, 2, 2, 3, 3), (1, 6, 1, 2, 3)]
)
@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_a_layer_equals_going_through_all_steps(n_group, size, kept, top_k, ep_size, placement):
    """Two tokens: every pair of sets of experts, weighted by the probability of its spread."""
    model = grouped(n_group * size, n_group, kept, top_k, False)
    ranks = place_fixed(placement, model, ep_size, 8).rank_of_expert
    layer = theory.UniformLayer(theory.UniformRouter.of(model, X0), ranks)
    spreads = spread_by_enumeration(range(n_group * size), n_group, kept, top_k, False)
    sets = Counter()
    for chosen in combinations(range(n_group * size), top_k):
        in_group = sorted(Counter(e // size for e in chosen).values(), reverse=True)
        sets[chosen] = (*in_group, *[0] * (kept - len(in_group)))
    alike = Counter(sets.values())
    loads = [
        (np.bincount(ranks[list(chosen)], minlength=ep_size), float(spreads.get(spread, 0)) / alike[spread])
        for chosen, spread in sets.items()
    ]
    for n_tokens in (1, 2):
        steps = loads if n_tokens == 1 else [(a + b, p * q) for a, p in loads for b, q in loads]
        for least in range(1, n_tokens * top_k + 1):
            exact = sum(p for load, p in steps if load.max() >= least)
            low, high = layer.max_load(n_tokens, least)
            assert low - 1e-9 <= exact <= high + 1e-9
            if n_tokens == 1 or 2 * least > n_tokens * top_k:
                assert low == pytest.approx(exact, abs=1e-9)
                assert high == pytest.approx(exact, abs=1e-9)
        for least in range(1, ep_size):
            exact = sum(p for load, p in steps if (load == 0).sum() >= least)
            low, high = layer.idle_ranks(n_tokens, least)
            assert low == pytest.approx(exact, rel=1e-9, abs=1e-12)
            assert low == high
        exact = sum(p for load, p in steps if (load > 0).sum() == 1)
        assert layer.one_rank(n_tokens)[0] == pytest.approx(exact, rel=1e-9, abs=1e-12)


def test_grouped_and_ungrouped_closed_forms_agree():
    """One group of all experts: the rational closed forms of ungrouped traffic."""
    model = ModelSpec("plain", 24, 4)
    ranks = place_fixed("linear_legacy", model, 5, 8).rank_of_expert
    held, layer = np.bincount(ranks).tolist(), theory.UniformLayer(theory.UniformRouter.of(model, X0), ranks)
    exact = max_load_of_one_token(held, 4)
    for least in range(1, 5):
        assert layer.max_load(1, least)[1] == pytest.approx(float(sum(exact[least:])))
    for tokens in (1, 3):
        idle = idle_ranks(held, 4, tokens)
        for least in range(1, 5):
            assert layer.idle_ranks(tokens, least)[0] == pytest.approx(float(sum(idle[least:])), rel=1e-12, abs=1e-300)
        assert layer.one_rank(tokens)[0] == pytest.approx(float(one_rank(held, 4, tokens)))


def both_methods(tail, floor):
    """Rows of imbalance that both methods give, the sampled p above `floor`."""
    keys = ["placement", "ep_size", "tokens", "metric", "threshold"]
    sampled = tail[(tail.method == "sampled") & (tail.probability > floor)]
    return sampled.merge(tail[tail.method.isin(["bound", "exact"])], on=keys, suffixes=("", "_theory"))


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["uniform", "chat"])
def test_bounds_and_sampling_agree_where_both_see(workload):
    """Uniform: all layers. Chat: 40 layers, the same for both. Normal intervals of all rows at once."""
    result = sweep(
        "deepseek-v3", workload, ep_sizes=[4, 8, 12, 64], tokens=[1, 8, 64], placements=["linear", "round_robin"],
        trials=20_000, draws=40 if workload == "chat" else None, bound_layers=40,
    )  # fmt: skip
    rows = both_methods(result.tail, 10 / 20_000)
    assert len(rows) > 50
    given = {"uniform": {""}, "chat": {"40 drawn layers"}}[workload]
    assert set(rows.given_theory) == given
    # The layers are given, so blocks are independent and the variance of a mean of layers is at most the binomial one.
    half = norm.isf(FALSE_ALARM / (2 * len(rows))) * np.sqrt(rows.probability / 20_000) + 10 / 20_000
    assert (rows.probability <= rows.high_theory + half).all()
    assert (rows.probability >= rows.low_theory - half).all()
    exact = rows[rows.method_theory == "exact"]
    assert workload == "chat" or len(exact) > 10


@pytest.mark.slow
def test_the_worst_case_curve_has_no_gap_down_to_1e12():
    """Uniform traffic: from what sampling sees to below 1e-12, within a factor, rows in falling order."""
    result = sweep(
        "deepseek-v3", "uniform", ep_sizes=[8, 64], tokens=[8, 64, 1024], placements=["linear", "round_robin"],
        trials=4000,
    )  # fmt: skip
    tail = result.tail[(result.tail.metric == "imbalance") & (result.tail.probability > 0)]
    for key, rows in tail.groupby(["placement", "ep_size", "tokens"]):
        seen = rows[rows.method == "sampled"].probability.min()
        known = rows[rows.method != "sampled"].sort_values("threshold")
        assert known.high.max() > seen / 2, key
        if key[2] * 8 > 12 * key[1]:  # else the largest load is not so rare
            assert known.high.min() < 1e-12, key
        assert (known.high.diff().dropna() <= 0).all()
        rare = known[(known.high < 1e-3) & (known.high > 1e-250)]
        assert (rare.low > 0.9 * rare.high).all(), key


@pytest.mark.slow
def test_an_average_over_drawn_layers_is_not_the_answer_for_all():
    """The committed chat sweep: beyond the bulk the layers that nobody drew matter most, so the average of 32 layers, however
    exactly known, lies below the estimate over all layers."""
    tail = pd.read_csv(ROOT / "results/deepseek-v3-chat/tail.csv", keep_default_na=False)
    tail = tail[(tail.ep_size == 8) & (tail.tokens == 64) & (tail.placement == "linear") & (tail.threshold == 2)]
    (bound,) = tail[(tail.method == "bound") & (tail.metric == "imbalance")].itertuples()
    assert bound.given == "32 drawn layers"
    rank = place("linear", load_model("deepseek-v3"), 8).rank_of_expert
    (rare,) = rare_tail(load_model("deepseek-v3"), load_workload("chat"), rank, 64, imbalance=[2.0], n_layers=3000).rows
    assert rare.low > bound.high


def test_where_tokens_are_not_independent_there_are_no_bounds():
    for workload in ("prefill", "prefill-strong"):
        result = sweep("deepseek-v3", workload, ep_sizes=8, tokens=64, placements="linear", trials=30)
        assert set(result.tail.method) <= {"sampled", "exact"}
        assert (result.tail.given == "").all()
