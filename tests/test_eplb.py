"""EPLB against its authors' output, its own README and a plain reference; the search on from it against exact optima."""

import json
from itertools import combinations_with_replacement

import numpy as np
import pytest
from conftest import VECTORS, plain
from hypothesis import given
from hypothesis import strategies as st
from naive import eplb as ref_eplb

from sim import InputError, Placement, load_model, place
from sim.placement import notes_on

V3 = load_model("deepseek-v3")


def loads_of_ranks(placement, loads):
    """Load of each rank, each expert's load split evenly over its copies."""
    copies = np.bincount(placement.logical_of_slot, minlength=len(loads))
    share = np.asarray(loads, float) / copies
    return np.bincount(placement.rank_of_slot, share[placement.logical_of_slot], placement.ep_size)


@pytest.mark.parametrize("case", json.loads((VECTORS / "eplb.json").read_text()), ids=lambda case: case["policy"])
def test_equals_the_authors_code(case):
    """Loads to the six digits that were printed, and the replica counts."""
    weights = (
        np.random.default_rng(case["seed"]).lognormal(0, 1, (case["layers"], case["n_experts"])).astype(np.float32)
    )
    model, redundant = plain(case["n_experts"], case["n_group"]), case["n_physical"] - case["n_experts"]
    for layer, row in enumerate(weights):
        placement = place(
            "eplb", model, case["ep_size"], ranks_per_node=case["ep_size"] // case["n_nodes"], loads=row,
            redundant=redundant,
        )  # fmt: skip
        loads = loads_of_ranks(placement, row)
        assert loads.max() / loads.mean() == pytest.approx(case["max_over_mean"][layer], abs=1e-6)
        assert np.sort(np.bincount(placement.logical_of_slot))[::-1][:8].tolist() == case["replicas_sorted"][layer]


def test_packs_are_added_up_in_float32_as_upstream_does():
    """A near tie (seed 51, layer 1) that float64 sums break the other way: 1.0095 against 1.0112."""
    loads = np.random.default_rng(51).lognormal(0, 1, (4, 256)).astype(np.float32)[1]
    placement = place("eplb", V3, 16, loads=loads)
    assert placement.logical_of_slot.tolist() == ref_eplb(loads, 256, 8, 2, 16)
    held = loads_of_ranks(placement, loads)
    assert held.max() / held.mean() == pytest.approx(1.009549, abs=1e-6)


def test_a_rank_with_two_copies_of_an_expert_is_noted():
    """One expert with 99 % of the load: five copies on four ranks (as upstream)."""
    placement = place("eplb+4", plain(8), 4, loads=[1000] + 7 * [1])
    assert placement.idle_copies.tolist() == [1]
    [note] = notes_on(placement)
    assert note == "eplb+4 at EP size 4: a rank holds two copies of one expert; they balance nothing (1 of 12 slots)"
    assert not notes_on(place("eplb", plain(8), 4, loads=np.arange(8)))


README_LOADS = (
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
)
README_MAPS = ([5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1])


@pytest.mark.parametrize(("loads", "phy2log"), list(zip(README_LOADS, README_MAPS, strict=True)))
def test_the_readme_example_of_eplb_comes_out(loads, phy2log):
    placement = place("eplb+4", plain(12, 4), 8, ranks_per_node=4, loads=loads)
    assert placement.logical_of_slot.tolist() == phy2log
    assert placement.rank_of_slot.tolist() == [rank for rank in range(8) for _ in range(2)]


@st.composite
def cases(draw):
    n_nodes, per_node, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    n_group = groups * n_nodes if draw(st.booleans()) else draw(st.integers(1, 4))
    n_experts, ep_size = n_group * draw(st.integers(1, 4)), n_nodes * per_node
    while n_experts < ep_size:
        n_experts += n_group
    redundant = -n_experts % ep_size + ep_size * draw(st.integers(0, 2))
    loads = draw(st.lists(st.integers(0, 50) | st.just(0), min_size=n_experts, max_size=n_experts))
    return loads, redundant, n_group, n_nodes, ep_size


@given(cases(), st.sampled_from(["eplb", "eplb_refined"]))
def test_properties_and_the_plain_reference(case, name):
    loads, redundant, n_group, n_nodes, ep_size = case
    model = plain(len(loads), n_group)
    placement = place(name, model, ep_size, ranks_per_node=ep_size // n_nodes, loads=loads, redundant=redundant)
    held = loads_of_ranks(placement, loads)
    assert set(placement.logical_of_slot.tolist()) == set(range(len(loads)))
    assert np.bincount(placement.rank_of_slot).tolist() == [(len(loads) + redundant) // ep_size] * ep_size
    assert held.sum() == pytest.approx(sum(loads))
    ref = ref_eplb(list(map(float, loads)), len(loads) + redundant, n_group, n_nodes, ep_size)
    ref_loads = loads_of_ranks(Placement.of_slots("ref", ep_size, len(loads), np.array([ref], np.int16)), loads)
    if name == "eplb":
        assert placement.logical_of_slot.tolist() == ref
    assert held.max() <= ref_loads.max() + 1e-9
    if n_group % n_nodes == 0:  # hierarchical: a group stays on one node, and so do all copies of its experts
        node = placement.rank_of_slot // (ep_size // n_nodes)
        group = placement.logical_of_slot // (len(loads) // n_group)
        assert all(len(set(node[group == g].tolist())) == 1 for g in range(n_group))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2))
def test_renaming_experts_renames_the_slots(seed, rounds):
    """Distinct loads, global policy: the same loads of ranks under any order of the experts."""
    rng = np.random.default_rng(seed)
    loads, order = rng.lognormal(size=24), rng.permutation(24)
    first, second = (
        place("eplb", plain(24), 6, ranks_per_node=6, loads=row, redundant=6 * rounds) for row in (loads, loads[order])
    )
    np.testing.assert_allclose(loads_of_ranks(first, loads), loads_of_ranks(second, loads[order]))
    np.testing.assert_array_equal(first.logical_of_slot, order[second.logical_of_slot])


def test_no_load_one_rank_and_a_rank_for_each_slot():
    nothing = place("eplb+4", plain(12), 8, loads=np.zeros(12))
    assert set(nothing.logical_of_slot.tolist()) == set(range(12))
    one = place("eplb", plain(12), 1, loads=np.arange(12))
    assert one.rank_of_expert.tolist() == [0] * 12
    each = place("eplb", plain(12), 12, ranks_per_node=12, loads=np.arange(12))
    assert sorted(each.rank_of_expert.tolist()) == list(range(12))


def test_nodes_that_do_not_divide_the_ranks_are_one_node():
    """vLLM's way where DeepSeek's code fails; 9 ranks are 2 nodes of 8."""
    loads = np.random.default_rng(0).lognormal(size=32)
    two, one = (place("eplb+4", plain(32, 4), 9, ranks_per_node=n, loads=loads) for n in (8, 9))
    np.testing.assert_allclose(np.sort(loads_of_ranks(two, loads)), np.sort(loads_of_ranks(one, loads)))


def test_replicas_have_no_one_rank_and_names_carry_them():
    loads = np.arange(256)
    named, asked = place("eplb+32", V3, 16, loads=loads), place("eplb", V3, 16, loads=loads, redundant=32)
    np.testing.assert_array_equal(named.logical_of_slot, asked.logical_of_slot)
    assert named.strategy == asked.strategy == "eplb+32"
    assert place("eplb+0", V3, 16, loads=loads).strategy == "eplb"
    assert not hasattr(named, "rank_of_expert")
    with pytest.raises(AttributeError, match="has replicas"):
        _ = named.rank_of_expert


def test_vllms_start_layout():
    """Before the first rebalance slot p holds expert p % E."""
    placement = place("linear+32", V3, 32)
    assert placement.logical_of_slot.tolist() == [p % 256 for p in range(288)]
    assert placement.rank_of_slot.tolist() == [p // 9 for p in range(288)]


def exact_optimum(loads, n_slots, ep_size):
    """Least largest load of a rank over all replica counts and all ways to assign the slots: a full search."""
    n_experts, per_rank, least = len(loads), n_slots // ep_size, np.inf
    for extra in combinations_with_replacement(range(n_experts), n_slots - n_experts):
        copies = np.bincount([*range(n_experts), *extra], minlength=n_experts)
        share = sorted((loads[e] / copies[e] for e in range(n_experts) for _ in range(copies[e])), reverse=True)
        if share[0] < least:
            least = min(least, _least_heaviest(share, [0.0] * ep_size, [per_rank] * ep_size, least))
    return least


def _least_heaviest(share, load, room, bound):
    """Branch and bound over the ranks that the next slot may take; ranks of equal load and room are one."""
    if not share:
        return max(load)
    tried = set()
    for r in range(len(load)):
        if room[r] and (load[r], room[r]) not in tried and load[r] + share[0] < bound:
            tried.add((load[r], room[r]))
            load[r] += share[0]
            room[r] -= 1
            bound = min(bound, _least_heaviest(share[1:], load, room, bound))
            load[r] -= share[0]
            room[r] += 1
    return bound


def test_flashlbs_toy():
    """EPLB's 232; 205 is cited as best known, but a full search finds 196 2/3, and so does the refined one."""
    loads = [600, 560, 120, 120, 20, 10, 10, 10]
    found = {}
    for name in ("eplb+8", "eplb_refined+8"):
        found[name] = loads_of_ranks(place(name, plain(8), 8, loads=loads), loads).max()
    assert found["eplb+8"] == pytest.approx(232)
    assert found["eplb_refined+8"] == pytest.approx(590 / 3)
    least = np.inf
    for extra in combinations_with_replacement(range(8), 8):  # all 6435 replica counts
        copies = np.bincount([*range(8), *extra], minlength=8)
        share = np.sort(np.repeat(np.array(loads) / copies, copies))
        least = min(least, (share[:8] + share[:7:-1]).max())
    assert least == pytest.approx(590 / 3)


@pytest.mark.slow
def test_distance_from_the_optimum_on_small_cases():
    """200 layers of 6 experts with log-normal loads, 9 slots on 3 ranks, against a full search: EPLB's heaviest rank is 4.3 %
    above the optimum in the mean and 18 % at worst, the refined one 0.6 % and 6 %.
    """
    rng = np.random.default_rng(7)
    excess = {"eplb": [], "eplb_refined": []}
    for _ in range(200):
        loads = rng.lognormal(0, 1, 6)
        optimum = exact_optimum(loads, 9, 3)
        for name, values in excess.items():
            heaviest = loads_of_ranks(place(name, plain(6), 3, loads=loads, redundant=3), loads).max()
            assert heaviest >= optimum - 1e-9
            values.append(heaviest / optimum - 1)
    assert np.mean(excess["eplb"]) == pytest.approx(0.0426, abs=5e-4)
    assert np.max(excess["eplb"]) == pytest.approx(0.178, abs=5e-3)
    assert np.mean(excess["eplb_refined"]) == pytest.approx(0.0059, abs=5e-4)
    assert np.max(excess["eplb_refined"]) == pytest.approx(0.059, abs=5e-3)


def test_bad_arguments():
    for options, message in (
        ({"loads": None}, "`strategy` eplb needs `loads`"),
        ({"loads": np.ones(255)}, r"must have shape \[256\], one number per expert, not \[255\]"),
        ({"loads": [[1.0], [1.0, 2.0]]}, "layers must have the same number of experts"),
        ({"loads": ["a"] * 256}, "must be numbers"),
        ({"loads": [1.0] * 255 + [float("nan")]}, "expert 255 is nan; loads must be finite"),
        ({"loads": [1.0] * 255 + [float("inf")]}, "expert 255 is inf"),
        ({"loads": [-1.0] + [1.0] * 255}, "expert 0 is -1.0"),
        ({"loads": [1e300] * 256}, "too large for a load"),
        ({"redundant": 4}, "256 experts [+] 4 redundant slots do not divide by 16 ranks; eplb[+]16 does"),
        ({"redundant": -1}, "`redundant` -1"),
        ({"redundant": 10**9}, "`redundant` 1000000000"),
        ({"strategy": "eplb+x"}, "redundant slots are a whole number"),
        ({"strategy": "eplb+16", "redundant": 32}, "another number of redundant slots"),
        ({"strategy": "elpb+16"}, "did you mean eplb"),
        ({"strategy": "linear"}, "linear takes no `loads`"),
        ({"strategy": "round_robin+16", "loads": None}, "redundant slots go with linear, eplb"),
        ({"strategy": "file:x.json", "redundant": 16, "loads": None}, "a file has its own redundant slots"),
        ({"ep_size": 12}, "256 experts [+] 0 redundant slots do not divide by 12 ranks; eplb[+]8 does"),
    ):
        options = {"strategy": "eplb", "ep_size": 16, "loads": np.ones(256)} | options
        with pytest.raises(InputError, match=message):
            place(options.pop("strategy"), V3, options.pop("ep_size"), **options)
