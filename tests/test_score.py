"""Blocks under placements: the kernels of sweeps and the public functions, against plain references."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import received as ref_received
from naive import score as ref_score
from naive import scores as ref_scores

import sim
from sim import InputError, ModelSpec, Placement, place
from sim.copies import find_copies, slots_by_hash
from sim.scoring import count_received, fan_out, lay_out, rank_loads, receivers, score_blocks


@st.composite
def cases(draw):
    n_experts = draw(st.integers(1, 40))
    ep_size = draw(st.integers(1, n_experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ranks = rng.permutation(np.concatenate([np.arange(ep_size), rng.integers(0, ep_size, n_experts - ep_size)]))
    counts = rng.integers(0, draw(st.sampled_from([1, 2, 50])) + 1, (3, draw(st.sampled_from([2, 70])), n_experts))
    return ranks.astype(np.int32), ep_size, counts.astype(np.int32)


FIRST = np.zeros(1, np.int64)  # of several steps, or placements


def of_one(ranks, ep_size, n_trials):
    """The layout of one placement in each trial, and the placement: the arguments of kernels."""
    return np.zeros((n_trials, 1), np.int64), lay_out(ranks[None], np.array([ep_size]))


def score(counts, ranks, ep_size):
    out, cells = np.empty((len(counts), counts.shape[1], 4), np.int32), np.arange(counts.shape[1])
    score_blocks(counts, cells, cells, np.zeros(len(cells), np.int64), *of_one(ranks, ep_size, len(counts)), out)
    return out


def received_by(placement, row, ids, ranks_per_node):
    """What the reference counts of one step, ids [tokens, top_k], under a row of a placement."""
    slots, ranks = placement.experts[row].tolist(), placement.ranks[row].tolist()
    return ref_received(ids.tolist(), slots, ranks, placement.ep_size, ranks_per_node)


@given(cases())
def test_scores_equal_reference(case):
    ranks, ep_size, counts = case
    comp = score(counts, ranks, ep_size)
    for t in range(3):
        for step in range(counts.shape[1]):
            assert tuple(comp[t, step]) == ref_scores(counts[t, step].tolist(), ranks.tolist(), ep_size)


@given(cases(), st.integers(0, 2**32 - 1))
def test_renaming_experts_and_ranks_changes_nothing_but_ties(case, seed):
    ranks, ep_size, counts = case
    rng = np.random.default_rng(seed)
    order, names = rng.permutation(len(ranks)), rng.permutation(ep_size).astype(np.int32)
    comp, ref = (
        score(np.ascontiguousarray(counts[..., order]), names[ranks[order]], ep_size),
        score(counts, ranks, ep_size),
    )
    np.testing.assert_array_equal(comp[..., [0, 1, 3]], ref[..., [0, 1, 3]])


@given(cases())
def test_loads_conserve_pairs(case):
    ranks, ep_size, counts = case
    loads = np.zeros((3, ep_size), np.int64)
    rank_loads(counts, FIRST, *of_one(ranks, ep_size, 3), FIRST, loads)
    np.testing.assert_array_equal(loads.sum(axis=1), counts[:, 0].sum(axis=1))
    np.testing.assert_array_equal(loads[0], np.bincount(ranks, counts[0, 0], ep_size))


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_fan_out_counts_distinct_ranks_and_nodes(seed, ranks_per_node):
    rng = np.random.default_rng(seed)
    ranks = rng.permutation(np.arange(24) % 12).astype(np.int32)
    ids = np.array([rng.choice(24, 6, replace=False) for _ in range(5)], np.int16)
    reached = np.empty((5, 1, 2), np.int64)
    fan_out(ids, FIRST, *of_one(ranks, 12, 5), ranks_per_node, reached)
    for t in range(5):
        hit = ranks[ids[t]]
        assert reached[t, 0].tolist() == [len(set(hit.tolist())), len(set((hit // ranks_per_node).tolist()))]


@st.composite
def placements(draw, most_rows=3):
    """Placements with replicas: every expert in a slot, equal numbers of slots on the ranks."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_experts, ep_size, rows = draw(st.integers(2, 12)), draw(st.integers(1, 6)), draw(st.integers(1, most_rows))
    n_slots = n_experts + -n_experts % ep_size + ep_size * draw(st.integers(0, 2))
    experts = [
        rng.permutation([*range(n_experts), *rng.integers(0, n_experts, n_slots - n_experts)]) for _ in range(rows)
    ]
    return Placement.of_slots("some", ep_size, n_experts, np.array(experts, np.int16)), rng


@given(placements())
def test_score_equals_reference_for_every_block_and_layer(case):
    placement, rng = case
    counts = rng.integers(0, 9, (2, 4, placement.n_rows, placement.n_experts)) * rng.integers(0, 2, (2, 4, 1, 1))
    result = sim.score(placement, counts)
    for at in np.ndindex(counts.shape[:-1]):
        slots, ranks = placement.experts[at[-1]].tolist(), placement.ranks[at[-1]].tolist()
        loads, distinct = ref_score(counts[at].tolist(), slots, ranks, placement.ep_size)
        assert result.loads[at].tolist() == loads
        assert result.distinct_experts[at].tolist() == distinct
        assert result.max_load[at] == max(loads)
        assert result.mean_load[at] == pytest.approx(sum(loads) / len(loads))
        assert result.idle_ranks[at] == loads.count(0)
        assert result.distinct_experts_max[at] == max(distinct)
        assert result.distinct_experts_busiest[at] == distinct[loads.index(max(loads))]
        if max(loads):
            assert result.imbalance[at] == pytest.approx(max(loads) * len(loads) / sum(loads))
            assert result.balancedness[at] == pytest.approx(1 / result.imbalance[at])
        else:
            assert np.isnan(result.imbalance[at])
            assert np.isnan(result.balancedness[at])


@given(placements(most_rows=2), st.integers(1, 4), st.integers(0, 30))
def test_score_tokens_equals_reference(case, ranks_per_node, n_tokens):
    placement, rng = case
    top_k = int(rng.integers(1, placement.n_experts + 1))
    ids = np.array(
        [[rng.permutation(placement.n_experts)[:top_k] for _ in range(n_tokens)] for _ in range(placement.n_rows)], int
    ).reshape(placement.n_rows, n_tokens, top_k)
    result = sim.score_tokens(placement, ids if placement.n_rows > 1 else ids[0], ranks_per_node)
    for row in range(placement.n_rows):
        of_row = [field[row] if placement.n_rows > 1 else field for field in result]
        assert [field.tolist() for field in of_row[1:]] == list(received_by(placement, row, ids[row], ranks_per_node))
        assert of_row[0].sum() == n_tokens * top_k
        assert (of_row[0] >= of_row[1]).all()


def test_two_layers_and_a_wide_block_by_hand():
    """FIELD 5: loads 10 10 10 10 and 40 0 0 0."""
    result = sim.score(place("linear", ModelSpec("four", 4, 1), 4), [[10, 10, 10, 10], [40, 0, 0, 0]])
    assert result.balancedness.tolist() == [1.0, 0.25]
    assert result.idle_ranks.tolist() == [0, 3]
    assert (result.mean_load.sum() / result.max_load.sum()) == 0.4  # vLLM's over layers
    assert ((result.mean_load + 1e-5) / (result.max_load + 1e-5)).mean() == pytest.approx(0.625)  # SGLang's
    assert sim.score(place("eplb+1", ModelSpec("one", 1, 1), 2, loads=[1.0]), [7]).loads.tolist() == [4, 3]


def test_bad_counts():
    for counts, message in (
        ([1, 2, 3], r"`counts` must have shape \[..., 4\] under linear, not \[3\]"),
        ([1.0, 2, 3, 4], "`counts` must be an array of whole numbers"),
        ([True, False, True, True], "`counts` must be an array of whole numbers"),
        ([1, 2, 3, -4], "`counts` must lie from 0 to 9007199254740992, not -4"),
        ([[1, 2], [3]], "`counts` must be an array of whole numbers"),
        (3, r"not \[\]"),
    ):
        with pytest.raises(InputError, match=message):
            sim.score(place("linear", ModelSpec("four", 4, 1), 2), counts)


def test_bad_ids():
    for ids, ranks_per_node, message in (
        ([[0, 4]], 8, "`ids` must lie from 0 to 3, not 4"),
        ([[0, -1]], 8, "not -1"),
        ([[True, False]], 8, "`ids` must be an array of whole numbers"),
        ([0, 1], 8, r"`ids` must have shape \[tokens, top_k\] under linear, not \[2\]"),
        ([[0, 1]], 0, "`ranks_per_node` 0"),
    ):
        with pytest.raises(InputError, match=message):
            sim.score_tokens(place("linear", ModelSpec("four", 4, 1), 2), ids, ranks_per_node)


def test_a_placement_with_a_row_per_layer_wants_counts_and_ids_of_its_layers():
    two = Placement.of_ranks("two", 2, np.array([[0, 1], [1, 0]], np.int32))
    assert sim.score(two, [[3, 1], [3, 1]]).loads.tolist() == [[3, 1], [1, 3]]
    with pytest.raises(InputError, match=r"shape \[..., 2, 2\] under two, not \[3, 2\]"):
        sim.score(two, np.ones((3, 2), int))
    with pytest.raises(InputError, match=r"shape \[2, tokens, top_k\]"):
        sim.score_tokens(two, [[0]])


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(1,), (3, 8), (5, 40, 2), (320,)]), st.integers(1, 9))
def test_received_tokens_of_many_placements_equal_reference(seed, ep_sizes, ranks_per_node):
    """All ranks and nodes of all pairs at once, with layouts that change between trials, and past 64 ranks."""
    rng = np.random.default_rng(seed)
    n_experts, n_tokens, top_k = 330, int(rng.integers(1, 40)), 5
    steps = np.unique(rng.integers(1, n_tokens + 1, 4))
    ids = np.array([[rng.permutation(n_experts)[:top_k] for _ in range(n_tokens)] for _ in range(3)], np.int16)
    ranks = np.array([rng.permutation(np.arange(n_experts) % size) for size in ep_sizes for _ in range(2)], np.int32)
    layouts, to = lay_out(ranks, np.repeat(ep_sizes, 2)), receivers(np.array(ep_sizes), ranks_per_node)
    rows = 2 * np.arange(len(ep_sizes)) + rng.integers(0, 2, (3, len(ep_sizes)))
    received, by_nodes = count_received(ids, steps, rows, layouts, to)
    for t in range(3):
        for j, n in enumerate(steps):
            for p, size in enumerate(ep_sizes):
                ref = ref_received(
                    ids[t, :n].tolist(), list(range(n_experts)), ranks[rows[t, p]].tolist(), size, ranks_per_node
                )
                assert received[t, j, to.first_rank[p] : to.first_rank[p + 1]].tolist() == ref[0]
                assert by_nodes[t, j, to.first_node[p] : to.first_node[p + 1]].tolist() == ref[1]


@given(placements(most_rows=2))
def test_received_tokens_under_replicas_go_to_the_copies_of_vllms_hash(case):
    placement, rng = case
    ids = np.array([[rng.permutation(placement.n_experts)[:2] for _ in range(20)] for _ in range(3)], np.int16)
    row = rng.integers(0, placement.n_rows, 3)
    slots = np.empty(ids.shape, np.int16)
    slots_by_hash(ids, row, find_copies(placement.experts, placement.n_experts), slots)
    layouts = lay_out(placement.ranks, np.full(placement.n_rows, placement.ep_size))
    received, _ = count_received(
        slots, np.array([7, 20]), row[:, None], layouts, receivers(np.array([placement.ep_size]), 8)
    )
    for t in range(3):
        for j, n in enumerate((7, 20)):
            assert received[t, j].tolist() == received_by(placement, row[t], ids[t, :n], 8)[0]


def test_a_token_received_by_every_rank_many_times_is_counted_exactly():
    """100,000 tokens, all to expert 0: many blocks of words, and steps that end inside a word and with one."""
    ids = np.zeros((1, 100_000, 1), np.int16)
    layouts = lay_out(np.array([[0, 1]], np.int32), np.array([2]))
    steps = np.array([1, 65_535, 65_536, 99_999, 100_000])
    received, by_nodes = count_received(ids, steps, np.zeros((1, 1), np.int64), layouts, receivers(np.array([2]), 8))
    assert received[0, :, 0].tolist() == by_nodes[0, :, 0].tolist() == steps.tolist()
    assert not received[0, :, 1].any()
