"""Balancing within the step: the best split of a step's pairs over copies, what it saves, and budgets of copies."""

import itertools

import numpy as np
import pandas as pd
import pytest
from conftest import fails
from hypothesis import given
from hypothesis import strategies as st
from naive import slot_counts
from scipy.optimize import linprog

from sim import (
    InputError,
    Placement,
    expert_time_us,
    load_model,
    load_workload,
    place,
    predict_gain,
    score,
    sweep,
)
from sim.cli import main
from sim.cost.expert import expert_rates
from sim.cost.gain import BALANCER_US, IN_STEP, PERFECT, break_even_tokens
from sim.cost.steps import sample_steps
from sim.router import draw_loads, draw_trials

V3, CHAT = load_model("deepseek-v3"), load_workload("chat")


@st.composite
def layouts(draw, most_experts, most_redundant, most_ranks):
    """A placement with copies, of ranks with different numbers of slots, and a generator."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_experts, ep_size = draw(st.integers(2, most_experts)), draw(st.integers(2, most_ranks))
    experts = rng.permutation([*range(n_experts), *rng.integers(0, n_experts, draw(st.integers(0, most_redundant)))])
    ranks = np.sort(rng.integers(0, ep_size, experts.size)).astype(np.int32)
    return Placement("made", ep_size, n_experts, ranks[None], experts[None].astype(np.int16)), rng


def least_load_by_linear_programme(placement, count):
    """Busiest rank's load where pairs may be divided: min L over shares of slots, by HiGHS."""
    ranks, experts, n = placement.ranks[0], placement.experts[0], placement.n_slots
    by_rank = np.hstack([ranks == np.arange(placement.ep_size)[:, None], -np.ones((placement.ep_size, 1))])
    by_expert = np.hstack([experts == np.arange(placement.n_experts)[:, None], np.zeros((placement.n_experts, 1))])
    found = linprog(np.eye(n + 1)[n], A_ub=by_rank, b_ub=np.zeros(len(by_rank)), A_eq=by_expert, b_eq=count)
    assert found.success
    return found.fun


@given(layouts(4, 3, 3))
def test_the_split_is_the_best_of_all(case):
    """Every way to assign the pairs of tiny steps, one by one."""
    placement, rng = case
    copies = [[s for s, e in enumerate(placement.experts[0]) if e == expert] for expert in range(placement.n_experts)]
    count = rng.multinomial(rng.integers(0, 6), np.ones(placement.n_experts) / placement.n_experts)
    ways = itertools.product(*(copies[e] for e, n in enumerate(count) for _ in range(n)))
    least = min(np.bincount(placement.ranks[0][list(way)], minlength=placement.ep_size).max() for way in ways)
    assert score(placement, count, "in_step").max_load == least


@given(layouts(40, 30, 12), st.sampled_from([1, 10, 1000]))
def test_the_split_is_the_linear_programmes_optimum_rounded_up(case, most):
    placement, rng = case
    count = rng.integers(0, most + 1, placement.n_experts)
    comp, even = score(placement, count, "in_step"), score(placement, count)
    assert comp.max_load == np.ceil(least_load_by_linear_programme(placement, count) - 1e-6)
    assert comp.loads.sum() == count.sum()
    assert comp.mean_load <= comp.max_load <= even.max_load
    single = [e for e in range(placement.n_experts) if len(set(placement.ranks[0][placement.experts[0] == e])) == 1]
    assert comp.distinct_experts.sum() >= (count > 0).sum()
    if len(single) == placement.n_experts:  # no expert is on two ranks: there is nothing to split
        np.testing.assert_array_equal(comp.loads, even.loads)


@given(layouts(12, 12, 6))
def test_the_split_is_never_above_that_of_vllms_hash(case):
    placement, rng = case
    ids = [rng.permutation(placement.n_experts)[:2].tolist() for _ in range(40)]
    hashed = slot_counts(ids, placement.experts[0].tolist(), placement.n_experts, "vllm_hash")
    loads = np.bincount(placement.ranks[0], weights=hashed, minlength=placement.ep_size)
    count = np.bincount(np.ravel(ids), minlength=placement.n_experts)
    assert score(placement, count, "in_step").max_load <= loads.max()


def test_a_chain_of_copies_carries_load_to_a_rank_that_shares_no_expert():
    """Rank 0 has A, B; rank 1 B, C; rank 2 C: A's rank is relieved by shifting B, and rank 1 then by shifting C."""
    chain = Placement("chain", 3, 3, np.array([[0, 0, 1, 1, 2]], np.int32), np.array([[0, 1, 1, 2, 2]], np.int16))
    found = score(chain, [[4, 5, 0], [0, 8, 1], [7, 1, 1]], "in_step")
    assert found.max_load.tolist() == [5, 4, 7]
    assert found.loads[0].tolist() == [4, 5, 0]
    with pytest.raises(InputError, match="vllm_hash needs tokens"):
        score(chain, [1, 1, 1], "vllm_hash")


def test_a_sweep_takes_the_split_and_leaves_placements_without_copies_alone():
    options = {"ep_sizes": 8, "tokens": [4, 256], "placements": ["linear", "eplb+16"], "trials": 40, "fit_tokens": 500}
    even, split = (sweep(V3, CHAT, **options, replica_choice=choice).summary for choice in ("even", "in_step"))
    pd.testing.assert_frame_equal(even[even.placement == "linear"], split[split.placement == "linear"])
    assert (split.max_load_mean <= even.max_load_mean).all()
    assert (split.imbalance_mean[2:] < even.imbalance_mean[2:]).all()


# What it saves


SMALL = {"ep_sizes": 8, "layer_sets": 1, "most_steps": 2, "fit_tokens": 500}


def test_steps_in_gains_are_those_of_the_public_functions():
    """Loads, idle ranks and times of every rank, from the same tokens, for two layers; the others are as without it."""
    rates = [expert_rates(V3, gpu) for gpu in ("h200", "h20")]
    options = {**SMALL, "tokens": [16, 512], "placements": ["linear", "eplb+8", "eplb+16"]}
    comp, plain = (sample_steps(V3, CHAT, rates, **options, in_step=choice) for choice in (True, False))
    for a, b in zip(comp.slowest_us, plain.slowest_us, strict=True):
        np.testing.assert_array_equal(a, b)
    assert comp.copied == "eplb+16"
    counts, _ = draw_trials(V3, CHAT, 0, range(58, 116), 58, np.array([16, 512]))  # the second step
    loads = draw_loads(V3, CHAT, 0, range(58), 500)
    for step, tokens in enumerate((16, 512)):
        cell = comp.cell("eplb+16", 8, tokens)
        for layer in (3, 42):
            placement, at = place("eplb+16", V3, 8, loads=loads[layer]), (1, layer)
            ref = score(placement, counts[layer, step], "in_step")
            assert comp.in_step.max_load[cell][at] == ref.max_load
            assert comp.in_step.idle_ranks[cell][at] == ref.idle_ranks
            for g, gpu in enumerate(("h200", "h20")):
                times = expert_time_us(
                    V3, gpu, pairs=ref.loads, distinct_experts=ref.distinct_experts, local_experts=34
                )
                assert comp.in_step.slowest_us[cell][at][g] == pytest.approx(times.max(), rel=1e-12)


def gains(**more):
    return predict_gain(
        V3, CHAT, "h200", **{"placement": ["eplb+8", IN_STEP, PERFECT], "tokens": [64, 16384]} | SMALL | more
    )


def test_it_lies_between_its_placement_and_perfect_balance():
    table = gains().set_index(["placement", "tokens"])
    for tokens in (64, 16384):
        even, split = table.loc["eplb+8", tokens], table.loc[IN_STEP, tokens]
        assert 1 < split.imbalance < even.imbalance
        assert table.loc[PERFECT, tokens].layer_us < split.layer_us
        assert split.bought_us == pytest.approx(even.layer_us - split.layer_us)
        assert split.bought_us_low < split.bought_us < split.bought_us_high
    assert set(table.copies_of.dropna()) == {"eplb+8"}


def test_break_even_is_where_it_buys_what_the_balancer_takes():
    bought = gains()[lambda rows: rows.placement == IN_STEP].bought_us.tolist()
    for balancer_us, least, most in ((0, 64, 64), (bought[1] + 1, np.inf, np.inf), (sum(bought) / 2, 1023, 1025)):
        rows = gains(balancer_us=balancer_us)
        rows = rows[rows.placement == IN_STEP]
        assert (rows.balancer_us == balancer_us).all()
        assert (
            least <= rows.break_even_tokens.iloc[0] <= most
        )  # the middle of two figures: of the logarithms of 64 and 16384
        assert (rows.break_even_tokens_low <= rows.break_even_tokens).all()
        assert (rows.break_even_tokens_high >= rows.break_even_tokens).all()
    assert np.isnan(break_even_tokens(np.array([1, 2]), np.array([np.nan, 1.0])))
    rows = gains(ranks_per_node=4)
    assert gains().balancer_us.max() == BALANCER_US[0] < rows.balancer_us.max() == BALANCER_US[1]


def test_gain_prints_the_break_even(capsys):
    words = "gain --ep 8 --tokens 64,1024 --layer-sets 1 --steps 1 --baseline linear+8 --placement in_step --balancer-us 1e5"
    assert main(words.split()) == 0
    out = capsys.readouterr().out
    assert "over the copies of linear+8" in plain_text(out)
    assert "EP 8: not up to 1024; it buys" in out
    fails(
        capsys,
        ["gain", "--placement", "round_robin,in_step"],
        "--placement in_step splits the pairs of a step over copies",
    )
    fails(capsys, ["gain", "--balancer-us", "-1"], "--balancer-us -1.0: must be a number from 0")


def plain_text(out):
    return " ".join(out.split())
