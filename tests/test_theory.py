"""Exact answers: against enumeration, and the simulator against them.

The simulator's tests have a fixed seed and share a false-alarm rate of 1e-4 (Bonferroni over all z-scores of a test).
"""

from collections import Counter
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest
from exact import idle_ranks, max_load_of_one_token, mean_idle_ranks, one_rank
from scipy.stats import norm

from sim import ModelSpec, SyntheticTraffic, place, sweep
from sim.scoring import METRICS

FALSE_ALARM = 1e-4


@pytest.mark.parametrize(("held", "top_k"), [((2, 2, 2), 2), ((3, 2, 2), 3), ((1, 1, 4), 2), ((5,), 3)])
def test_closed_forms_equal_enumeration(held, top_k):
    rank = [r for r, n in enumerate(held) for _ in range(n)]
    sets = [Counter(rank[e] for e in chosen) for chosen in combinations(range(len(rank)), top_k)]
    tally = Counter(max(loads.values()) for loads in sets)
    assert max_load_of_one_token(held, top_k) == [Fraction(tally[m], len(sets)) for m in range(top_k + 1)]
    for tokens in (1, 2):
        steps = [set().union(*step) for step in product(sets, repeat=tokens)]
        idle = Counter(len(held) - len(reached) for reached in steps)
        assert idle_ranks(held, top_k, tokens) == [Fraction(idle[m], len(steps)) for m in range(len(held) + 1)]
        assert mean_idle_ranks(held, top_k, tokens) == Fraction(sum(m * n for m, n in idle.items()), len(steps))
        assert one_rank(held, top_k, tokens) == Fraction(idle[len(held) - 1], len(steps))


@pytest.mark.parametrize(
    ("n_experts", "top_k", "ep_size", "placement"),
    [(64, 6, 8, "random"), (60, 4, 16, "linear_legacy"), (16, 2, 5, "linear"), (16, 2, 5, "round_robin"), (128, 8, 32, "linear")],
)  # fmt: skip
def test_the_simulator_agrees_with_theory(n_experts, top_k, ep_size, placement):
    """Max load of single tokens, idle ranks of steps of 1, 3 and 8 tokens, the one-rank event: all probabilities at once."""
    model, trials, steps = ModelSpec("plain", n_experts, top_k), 30_000, [1, 3, 8]
    held = np.bincount(place(placement, model, ep_size).rank_of_expert).tolist()
    result = sweep(
        model, SyntheticTraffic("uniform"), ep_sizes=ep_size, tokens=steps, placements=placement, trials=trials,
        bound_layers=0, received="off",
    )  # fmt: skip
    exact = {("max_load", 1, m): p for m, p in enumerate(max_load_of_one_token(held, top_k))}
    for tokens in steps:
        exact |= {("idle_ranks", tokens, m): p for m, p in enumerate(idle_ranks(held, top_k, tokens))}
    assert METRICS[:2] == ("max_load", "idle_ranks")
    found = result.counts.set_index(["metric", "tokens", "value"])["count"]
    bound = norm.isf(FALSE_ALARM / (2 * len(exact)))
    for key, p in exact.items():
        seen, p = int(found.get(key, 0)), float(p)
        if p in (0.0, 1.0):
            assert seen == p * trials, key
        elif trials * min(p, 1 - p) > 20:
            assert abs(seen - trials * p) < bound * np.sqrt(trials * p * (1 - p)), key
        else:  # too rare for the normal: Markov's inequality is enough to bound the false alarm
            assert min(seen, trials - seen) < 20 + 10 * trials * min(p, 1 - p), key
    for row in result.summary.itertuples():
        mean = float(mean_idle_ranks(held, top_k, row.tokens))
        half = (row.idle_ranks_mean_high - row.idle_ranks_mean_low) / 2
        assert abs(row.idle_ranks_mean - mean) <= 2.5 * half + 1e-12
