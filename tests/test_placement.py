import json

import numpy as np
import pytest
from conftest import VECTORS, plain
from hypothesis import given
from hypothesis import strategies as st
from naive import linear as ref_linear

from sim import InputError, load_model, place
from sim.placement import LINEAR_BACKENDS, ROUND_ROBIN_BACKENDS, random_ranks, why_linear
from sim.sweeps import make_plan

NAMES = ["linear", "linear_legacy", "round_robin", "random", "node_aware"]
V3 = load_model("deepseek-v3")


def _check_vectors(path):
    for row in json.loads(path.read_text()):
        for name in ("linear", "round_robin", "linear_legacy"):
            comp = place(name, plain(row["n_experts"]), row["ep_size"]).rank_of_expert
            np.testing.assert_array_equal(comp, row[name], err_msg=f"{name} {row['n_experts']} on {row['ep_size']}")


def test_equals_upstream_on_the_copied_vectors():
    _check_vectors(VECTORS / "placement.json")


def test_equals_upstream_on_all_vectors(shared):
    _check_vectors(shared / "vectors" / "placement.json")


SIZES = st.integers(1, 80).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@given(SIZES)
def test_linear_equals_reference(size):
    n_experts, ep_size = size
    assert place("linear", plain(n_experts), ep_size).rank_of_expert.tolist() == ref_linear(n_experts, ep_size)


@given(SIZES, st.sampled_from(NAMES), st.integers(1, 9))
def test_every_placement_fills_every_rank(size, name, ranks_per_node):
    n_experts, ep_size = size
    placement = place(name, plain(n_experts), ep_size, ranks_per_node=ranks_per_node, seed=3)
    held = np.bincount(placement.rank_of_expert, minlength=ep_size)
    assert len(held) == ep_size
    assert held.min() >= 1
    if name != "linear_legacy":
        assert held.max() - held.min() <= 1
    np.testing.assert_array_equal(placement.rank_of_expert[placement.logical_of_slot], placement.rank_of_slot)
    assert sorted(placement.logical_of_slot.tolist()) == list(range(n_experts))


@given(SIZES, st.integers(1, 9))
def test_node_aware_keeps_linears_blocks_on_their_nodes(size, ranks_per_node):
    n_experts, ep_size = size
    linear = place("linear", plain(n_experts), ep_size).rank_of_expert // ranks_per_node
    aware = place("node_aware", plain(n_experts), ep_size, ranks_per_node=ranks_per_node).rank_of_expert
    np.testing.assert_array_equal(aware // ranks_per_node, linear)
    if ep_size <= ranks_per_node:
        np.testing.assert_array_equal(aware, place("round_robin", plain(n_experts), ep_size).rank_of_expert)


def test_two_studied_facts_of_round_robin():
    """No rank holds more than ceil(group / R) of a group; up to R = E / (n_group - topk_group + 1) every choice of groups
    reaches every rank, and at 64 ranks four groups of one parity reach only half."""
    for ep_size in (2, 8, 12, 24, 32, 48, 64, 72):
        ranks = place("round_robin", V3, ep_size).rank_of_expert.reshape(8, 32)
        assert max(np.bincount(group).max() for group in ranks) == -(-32 // ep_size)
    ranks = place("round_robin", V3, 64).rank_of_expert.reshape(8, 32)
    assert len(set(ranks[::2].ravel().tolist())) == 32
    assert V3.n_experts // (V3.n_group - V3.topk_group + 1) == 51


def test_random_is_keyed_by_seed_and_draw():
    first = place("random", V3, 16, seed=5).rank_of_expert
    np.testing.assert_array_equal(first, random_ranks(256, 16, 5, 0, 1)[0])
    np.testing.assert_array_equal(random_ranks(256, 16, 5, 3, 2), random_ranks(256, 16, 5, 0, 5)[3:])
    assert (first != place("random", V3, 16, seed=6).rank_of_expert).any()
    shares = np.bincount(random_ranks(8, 2, 0, 0, 4000)[:, 0]) / 4000
    assert abs(shares[0] - 0.5) < 5 * 0.5 / np.sqrt(4000)


def test_group_aware_is_round_robin():
    assert place("group_aware", V3, 8).strategy == "round_robin"


def test_ep_size_out_of_range():
    for ep_size in (0, -1, 257):
        with pytest.raises(InputError, match=f"`ep_size` {ep_size}: EP size must lie from 1 to the 256"):
            place("linear", V3, ep_size)


def test_redundant_slots_fill_more_ranks_than_experts():
    """DeepSeek-V3's decode deployment: 320 slots, one on each rank; the 64 hottest experts have two."""
    loads = np.random.default_rng(0).lognormal(size=256)
    placement = place("eplb+64", "deepseek-v3", 320, loads=loads)
    assert placement.rank_of_slot.tolist() == list(range(320))
    assert set(placement.logical_of_slot.tolist()) == set(range(256))
    assert place("linear+64", V3, 320).logical_of_slot.tolist() == [*range(256), *range(64)]


def test_unknown_names_and_slots_that_do_not_fill_the_ranks_name_what_would_do():
    for name, message in (
        ("roundrobin", "did you mean round_robin"),
        (
            "linear",
            "the 256 experts of deepseek-v3; so many ranks need redundant slots that fill them, as in eplb[+]64",
        ),
        ("linear+32", "and 32 redundant slots; so many ranks need redundant slots that fill them, as in eplb[+]64"),
        ("linear+100", "256 experts [+] 100 redundant slots do not divide by 320 ranks; linear[+]64 does"),
    ):
        with pytest.raises(InputError, match=message):
            place(name, V3, 320)


def test_in_a_sweep_each_placement_must_fill_the_ranks():
    options = {"ep_sizes": 320, "tokens": 8, "trials": 2}
    plan = make_plan("deepseek-v3", "chat", placements=["eplb+64", "linear+64"], **options)
    assert plan.grid.largest_rank == (1, 1)
    for names, message in {
        ("linear", "eplb+64"): "`strategy` linear at `ep_size` 320: .* do not fill 320 ranks; linear[+]64 does",
        ("random", "eplb+64"): "`strategy` random at `ep_size` 320: .* do not fill 320 ranks; eplb[+]64 does",
        ("round_robin",): "as in eplb[+]64",
    }.items():
        with pytest.raises(InputError, match=message):
            make_plan("deepseek-v3", "chat", placements=list(names), **options)


def test_file_placements(tmp_path):
    path = tmp_path / "ranks.json"
    path.write_text(json.dumps([0, 1, 1, 0]))
    assert place(f"file:{path}", plain(4), 2).rank_of_expert.tolist() == [0, 1, 1, 0]
    path.write_text(json.dumps([[0, 1, 1, 0], [1, 1, 0, 0]]))
    assert place(f"file:{path}", plain(4), 2).rank_of_expert.tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]


def test_bad_placement_files(tmp_path):
    path = tmp_path / "ranks.json"
    for content, message in (
        ("[0, 1, 1]", "ranks of 4 experts, found 3"),
        ("[0, 1, 1, null]", "expert 3 must have a rank from 0 to 1"),
        ("[0, 1, 1, 2]", "expert 3 must have a rank from 0 to 1, not 2"),
        ("[0, 1, 1, -1]", "from 0 to 1, not -1"),
        ("[0, 1, 1, true]", "from 0 to 1"),
        ("[0, 1, 1, 0.0]", "from 0 to 1"),
        ("[0, 0, 0, 0]", "rank 1 of `ep_size` 2 holds no expert"),
        ("[]", "must be a list"),
        ("{}", "must be a list"),
        ("[[0, 1, 1, 0], 3]", "layer 1"),
        ("[" * 100_000, "is not JSON"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            place(f"file:{path}", plain(4), 2)
        with pytest.raises(InputError, match="cannot be read"):
            place(f"file:{tmp_path / 'absent.json'}", plain(4), 2)


def test_notes_where_vllm_runs_linear_instead():
    assert why_linear(V3, 8) == ""
    assert "EP size is 1" in why_linear(V3, 1)
    assert "n_group = 1" in why_linear(load_model("kimi-k2"), 8)
    assert why_linear(V3, 8, "deepep_v2", 1) == ""
    for backend in LINEAR_BACKENDS:
        assert f"(8 ranks) on {backend}; it would run with deepep_low_latency or nixl_ep" in why_linear(
            V3, 8, backend, 8
        )
    assert not set(LINEAR_BACKENDS) & set(ROUND_ROBIN_BACKENDS)
    for backend in ROUND_ROBIN_BACKENDS:
        assert why_linear(V3, 8, backend, 8) == ""
