"""Received tokens in sweeps: the tables against a plain recomputation, independent figures, and bounds past sampling."""

import numpy as np
import pandas as pd
import pytest

import sim
from sim import InputError, load_model, load_workload, place, score_tokens
from sim.router import draw_trials
from sim.sweeps.grid import RECEIVED_SHARES

V3 = load_model("deepseek-v3")
KEYS = ["placement", "ep_size", "tokens"]


@pytest.fixture(scope="module")
def figures():
    return sim.sweep(
        V3, "chat", ep_sizes=[8, 16], tokens=1024, placements=["linear", "round_robin"], trials=1000, bound_layers=0
    )


def test_independent_figures_are_met(figures):
    """Share of a step's tokens on a rank, and on the busiest one, by brute force: within 1 and 2.5 %; 8 ranks are one node."""
    for placement, ep_size, mean, busiest in (
        ("linear", 8, 0.4938, 0.573),
        ("round_robin", 8, 0.6656, 0.738),
        ("linear", 16, 0.3535, 0.454),
        ("round_robin", 16, 0.4107, 0.521),
    ):
        row = figures.summary.set_index(["placement", "ep_size"]).loc[(placement, ep_size)]
        assert ep_size > 8 or row.received_node_tokens_mean == 1024
        assert row.received_tokens_mean / 1024 == pytest.approx(mean, rel=0.01)
        assert row.received_tokens_max_mean / 1024 == pytest.approx(busiest, rel=0.025)


def test_round_robin_evens_pairs_out_and_raises_received_tokens(figures):
    rows = figures.summary[figures.summary.placement == "round_robin"]
    assert (rows.imbalance_change_mean_high < 0).all()
    assert (rows.received_tokens_max_change_mean_low > 0).all()


@pytest.mark.parametrize("placement", ["linear", "round_robin", "eplb+16"])
def test_tables_equal_a_plain_recomputation(placement):
    """Each block scored by `score_tokens`, the slow and public way; with replicas the copies of vLLM's hash."""
    trials, tokens = 40, [3, 50]
    placed = place(placement, V3, 16, loads=np.arange(256) + 1.0 if "eplb" in placement else None)
    result = sim.sweep(
        V3, "chat", ep_sizes=16, tokens=tokens, placements=placed, trials=trials, bound_layers=0, threads=1
    )
    _, ids = draw_trials(V3, load_workload("chat"), 0, range(trials), trials, np.array(tokens), tokens[-1])
    for n in tokens:
        ref = [score_tokens(placed, of_trial[:n]) for of_trial in ids]
        row = result.summary[result.summary.tokens == n].iloc[0]
        for name in ("received_tokens", "received_node_tokens"):
            by_rank = np.array([getattr(of_block, name) for of_block in ref])
            most = by_rank.max(axis=1)
            assert row[f"{name}_mean"] == pytest.approx(by_rank.mean(), rel=1e-12)
            assert row[f"{name}_max_mean"] == pytest.approx(most.mean(), rel=1e-12)
            assert row[f"{name}_max_p95"] == np.sort(most)[int(np.ceil(0.95 * trials)) - 1]
        most = np.array([of_block.received_tokens.max() for of_block in ref])
        tail = result.tail[(result.tail.metric == "received") & (result.tail.tokens == n)]
        assert tail.threshold.tolist() == list(RECEIVED_SHARES)
        np.testing.assert_allclose(tail.probability, [(most >= x * n - 1e-9).mean() for x in RECEIVED_SHARES])


def test_other_columns_do_not_depend_on_it():
    options = {"ep_sizes": 8, "tokens": [2, 64], "placements": ["linear", "eplb+8"], "trials": 30, "bound_layers": 0}
    on, off = (sim.sweep(V3, "chat", **options, received=value) for value in ("on", "off"))
    pd.testing.assert_frame_equal(on.summary[off.summary.columns], off.summary)
    kept = on.tail[on.tail.metric != "received"].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, off.tail)
    assert "received" not in off.identity
    assert not off.counts.metric.astype(str).str.contains("received").any()


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["uniform", "chat"])
def test_bounds_hold_where_sampling_sees_too(workload):
    """Uniform traffic: binomial ranks, all layers alike. Chat: 32 layers; there the sample is of the same layers (`draws`).

    95 % intervals of the sample, widened to 4 standard errors, against the bounds: one false alarm in 16,000 for each row.
    """
    result = sim.sweep(
        V3, workload, ep_sizes=[8, 16], tokens=[16, 24, 32, 48, 64, 128], placements=["linear", "round_robin"],
        trials=6400, draws=None if workload == "uniform" else 32, seed=3,
    )  # fmt: skip
    rows = result.tail[result.tail.metric == "received"]
    sampled, bound = rows[rows.method == "sampled"], rows[rows.method.isin(["bound", "exact"])]
    both = sampled.merge(bound, on=[*KEYS, "threshold"], suffixes=("", "_bound"))
    both = both[both.probability > 0]
    assert len(both) >= 6
    wide = 2 * (both.high - both.probability)
    assert (both.low_bound <= both.probability + wide).all()
    assert (both.high_bound >= both.probability - 2 * (both.probability - both.low)).all()
    assert bound.high.min() < 1e-15


def test_where_tokens_are_not_single_it_is_refused_or_left_out():
    dummy = load_workload("chat", dummy_tokens=4)
    options = {"ep_sizes": 8, "tokens": 8, "placements": "linear", "trials": 3, "bound_layers": 0}
    assert "received_tokens_mean" not in sim.sweep(V3, dummy, **options).summary
    with pytest.raises(InputError, match="`received` on: dummy tokens"):
        sim.sweep(V3, dummy, **options, received="on")
    with pytest.raises(InputError, match="`received` on: every token of a step is held: at most 1048576 tokens"):
        sim.sweep(V3, "chat", **options | {"tokens": 2**21}, received="on")
