"""Balancing within the step: the best split of a step's pairs over copies, what it saves, and budgets of copies."""

import itertools

import numpy as np
import pandas as pd
import pytest
from conftest import fails, run
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from sim import (
    InputError,
    ModelSpec,
    Placement,
    RecordedTraffic,
    expert_time_us,
    load_model,
    load_workload,
    place,
    predict_gain,
    score,
    score_tokens,
    sweep,
)
from sim.cli import main
from sim.cost.expert import expert_rates
from sim.cost.gain import BALANCER_US, IN_STEP, PERFECT, break_even_tokens
from sim.cost.steps import sample_steps
from sim.placement import place_balanced, read_placement
from sim.placement.eplb import spend
from sim.router import draw_loads, draw_trials
from sim.sweeps import make_plan
from sim.sweeps.steps import place_pairs

V3, CHAT = load_model("deepseek-v3"), load_workload("chat")
TOY = ModelSpec("toy", 16, 2, moe_intermediate_size=256, hidden_size=512, expert_matrices=3, n_moe_layers=6)


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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_gain_prints_the_break_even(capsys, tmp_path):
    words = "gain --ep 8 --tokens 64,1024 --layer-sets 1 --steps 1 --baseline linear+8 --placement in_step --balancer-us 1e5"
    assert main([*words.split(), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "gain_by_tokens.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "over the copies of linear+8" in plain_text(out)
    assert "EP 8: not up to 1024; it buys" in out
    fails(
        capsys,
        ["gain", "--placement", "round_robin,in_step"],
        "--placement in_step splits the pairs of a step over copies",
    )
    fails(capsys, ["gain", "--balancer-us", "5"], "--balancer-us goes with --placement in_step")
    fails(capsys, ["gain", "--baseline", "in_step"], "--baseline 'in_step' is not known")


def plain_text(out):
    return " ".join(out.split())


# Budgets of copies


def uneven_layers(n_layers=6, n_experts=16, seed=0):
    """Loads of layers, every other one far more uneven."""
    rng = np.random.default_rng(seed)
    sigma = np.where(np.arange(n_layers) % 2, 1.5, 0.2)[:, None]
    return np.exp(sigma * rng.normal(size=(n_layers, n_experts)))


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(0, 9))
def test_a_budget_buys_the_most_where_costs_fall_ever_less(seed, n_layers, budget):
    """Against every way to spend at most the budget; elsewhere never more than the budget, and never at a loss."""
    rng = np.random.default_rng(seed)
    falls = rng.integers(0, 9, (n_layers, 4)).astype(float)
    for costs in (20 - np.cumsum(-np.sort(-falls, axis=1), axis=1), 50 - np.cumsum(falls - 2, axis=1)):
        costs = np.hstack([costs[:, :1] + 1, costs])
        spent = spend(costs, budget)
        total = np.take_along_axis(costs, spent[:, None], axis=1).sum()
        assert spent.sum() <= budget
        assert total <= costs[:, 0].sum()
        if (np.diff(costs, 2, axis=1) >= 0).all():
            ways = [way for way in itertools.product(range(5), repeat=n_layers) if sum(way) <= budget]
            assert total == pytest.approx(min(costs[range(n_layers), way].sum() for way in map(list, ways)))


@pytest.mark.parametrize("redundant", [2, 4, 8])
def test_copies_go_to_the_layers_that_need_them(redundant):
    """At most the budget; each layer is EPLB's with its slots; less is waited for than with as many slots in each layer."""
    loads = uneven_layers()
    comp = place_balanced(f"eplb_budget+{redundant}", TOY, 4, 8, loads)
    copies = comp.slots_of_row - 16
    assert copies.sum() <= redundant * 6
    assert (copies % 4 == 0).all()
    assert copies[1::2].sum() > copies[::2].sum()
    for row, n in enumerate(copies):
        ref = place_balanced(f"eplb+{n}", TOY, 4, 8, loads[row : row + 1])
        experts = comp.experts[row].reshape(4, -1)
        np.testing.assert_array_equal(experts[:, : (16 + n) // 4].ravel(), ref.experts[0])
        assert (experts[:, (16 + n) // 4 :] == -1).all()
    alike = place_balanced(f"eplb+{redundant // 4 * 4}" if redundant >= 4 else "eplb", TOY, 4, 8, loads)
    counts = np.round(1e6 * loads / loads.sum(axis=1, keepdims=True)).astype(int)
    assert score(comp, counts).imbalance.sum() < score(alike, counts).imbalance.sum()


def test_layers_with_fewer_slots_score_as_if_they_stood_alone():
    """Counts, tokens and the kernels of steps, times with the slots of each rank included."""
    loads, rng = uneven_layers(), np.random.default_rng(1)
    comp = place_balanced("eplb_budget+4", TOY, 4, 8, loads)
    ids = np.array(
        [[rng.choice(16, 2, replace=False, p=row / row.sum()) for _ in range(50)] for row in loads], np.int16
    )
    counts = np.array([np.bincount(layer.ravel(), minlength=16) for layer in ids])
    alone = [place_balanced(f"eplb+{n - 16}", TOY, 4, 8, loads[i : i + 1]) for i, n in enumerate(comp.slots_of_row)]
    for choice in ("even", "in_step"):
        found = score(comp, counts, choice)
        for row, ref in enumerate(alone):
            np.testing.assert_array_equal(found.loads[row], score(ref, counts[row], choice).loads)
            np.testing.assert_array_equal(found.distinct_experts[row], score(ref, counts[row], choice).distinct_experts)
    traffic = RecordedTraffic("made", "decode", ids, np.arange(51), "")
    steps = sample_steps(
        TOY, traffic, [expert_rates(TOY, "h200")], ep_sizes=4, tokens=50, placements=comp, most_steps=1
    )
    tokens = score_tokens(comp, ids)
    for row, ref in enumerate(alone):
        np.testing.assert_array_equal(tokens.received_tokens[row], score_tokens(ref, ids[row]).received_tokens)
        even = score(ref, counts[row])
        local, loaded = ref.n_slots // 4, {"pairs": even.loads, "distinct_experts": even.distinct_experts}
        times = expert_time_us(TOY, "h200", **loaded, local_experts=local)
        assert steps.slowest_us[0][0, row, 0] == pytest.approx(times.max(), rel=1e-12)
        assert steps.max_load[0][0, row] == even.max_load


def test_drawn_layers_share_a_budget_by_deployments_whatever_the_chunks():
    plan = make_plan(V3, CHAT, ep_sizes=16, tokens=8, placements="eplb_budget+16", trials=200, fit_tokens=300)
    (group,) = place_pairs(plan, range(50, 130), [0])
    comp = group.placements[0].experts[group.rows[:, 0]]
    (second,) = place_pairs(plan, range(58, 116), [0])
    np.testing.assert_array_equal(comp[8:66], second.placements[0].experts[second.rows[:, 0]])
    copies = np.count_nonzero(comp[8:66] >= 0, axis=1) - 256
    assert copies.sum() <= 58 * 16
    assert np.unique(copies).size > 1
    options = {"ep_sizes": 16, "tokens": 8, "placements": ["linear", "eplb_budget+4"], "trials": 150, "fit_tokens": 300}
    one, two = (sweep(V3, CHAT, **options, threads=n).summary for n in (1, 2))
    pd.testing.assert_frame_equal(one, two)


@pytest.mark.slow
def test_with_a_gpu_copies_are_bought_for_their_time():
    """At few tokens a copy costs more than it saves, and none is bought; at many tokens they are."""
    options = {"ep_sizes": 16, "layer_sets": 1, "most_steps": 1, "placements": "eplb_budget+16", "fit_tokens": 2**14}
    few, many = (sample_steps(V3, CHAT, [expert_rates(V3, "h200")], tokens=n, **options).plan for n in (256, 65536))
    slots = [np.count_nonzero(place_pairs(plan, range(58), [0])[0].placements[0].experts >= 0) for plan in (few, many)]
    assert slots[0] == 58 * 256
    assert 58 * 264 < slots[1] <= 58 * 272


def test_its_map_is_exported_where_layers_may_differ(tmp_path, capsys):
    rng, hot = np.random.default_rng(7), np.where(np.arange(32), 1.0, 1000.0)  # in every token of the second layer
    ids = [rng.choice(32, 4, False, p) for p in (np.full(32, 1 / 32), hot / hot.sum()) * 200]
    trace = tmp_path / "trace.npz"
    np.savez(trace, topk_ids=np.reshape(ids, (200, 2, 4)).astype(np.int16), sequence_lengths=np.full(20, 10))
    words = ["export", "--model", "gpt-oss-20b", "--ep", "4", "--placement", "eplb_budget+2", "--fit-on", trace]
    assert run(*words, "--format", "vllm-ascend", "--out", tmp_path / "map.json") == 0
    text, aside = capsys.readouterr()
    assert "2 layers x 32 to 36 slots on 4 ranks" in text
    assert "dynamic EPLB needs one number" in plain_text(aside)
    found = read_placement(tmp_path / "map.json", load_model("gpt-oss-20b"), 4)
    assert found.slots_of_row.tolist() == [32, 36]
    assert not found.idle_copies.any()
    by_time = [*words, "--format", "vllm", "--gpu", "h200", "--tokens", "64", "--out", tmp_path / "map.json"]
    assert run(*by_time) == 0  # a copy takes more time than it saves: no layer has one
    assert "2 layers x 32 slots" in capsys.readouterr().out
    fails(capsys, [*by_time, "--placement", "eplb+4"], "--gpu and --tokens go with eplb_budget")
    for form in ("vllm", "sglang", "trtllm"):
        out = tmp_path / f"{form}.json"
        fails(capsys, [*words, "--format", form, "--out", out], "one number of slots for all layers", "from 32 to 36")
        assert not out.exists()


def test_a_budget_that_cannot_be_is_refused_in_one_line(capsys):
    for words, message in (
        ("sweep --placement eplb_budget", "needs redundant slots that it can spend, as in eplb_budget+32"),
        ("sweep --ep 320 --placement eplb_budget+32", "as in eplb+64"),
        ("capacity --placement eplb_budget+16", "--placement eplb_budget+16: its layers differ in slots"),
    ):
        fails(capsys, words.split(), message)
