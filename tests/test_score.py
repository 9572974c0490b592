import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from naive import scores as ref_scores

from sim.scoring import fan_out, lay_out, rank_loads, score_blocks


@st.composite
def cases(draw):
    n_experts = draw(st.integers(1, 40))
    ep_size = draw(st.integers(1, n_experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ranks = rng.permutation(np.concatenate([np.arange(ep_size), rng.integers(0, ep_size, n_experts - ep_size)]))
    counts = rng.integers(0, draw(st.sampled_from([1, 2, 50])) + 1, (3, 2, n_experts))
    return ranks.astype(np.int32), ep_size, counts.astype(np.int32)


def score(counts, ranks, ep_size):
    out = np.empty((len(counts), counts.shape[1], 4), np.int32)
    layouts = lay_out(ranks[None], np.array([ep_size]))
    zeros = np.zeros((len(counts), 1), np.int64)
    cells = np.arange(counts.shape[1])
    score_blocks(counts, cells, cells, np.zeros(len(cells), np.int64), zeros, layouts, out)
    return out


@given(cases())
def test_scores_equal_reference(case):
    ranks, ep_size, counts = case
    comp = score(counts, ranks, ep_size)
    for t in range(3):
        for step in range(2):
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
    rank_loads(
        counts,
        np.zeros(1, np.int64),
        np.zeros((3, 1), np.int64),
        lay_out(ranks[None], np.array([ep_size])),
        np.zeros(1, np.int64),
        loads,
    )
    np.testing.assert_array_equal(loads.sum(axis=1), counts[:, 0].sum(axis=1))
    np.testing.assert_array_equal(loads[0], np.bincount(ranks, counts[0, 0], ep_size))


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_fan_out_counts_distinct_ranks_and_nodes(seed, ranks_per_node):
    rng = np.random.default_rng(seed)
    ranks = rng.permutation(np.arange(24) % 12).astype(np.int32)
    ids = np.array([rng.choice(24, 6, replace=False) for _ in range(5)], np.int16)
    reached = np.empty((5, 1, 2), np.int64)
    fan_out(
        ids,
        np.zeros(1, np.int64),
        np.zeros((5, 1), np.int64),
        lay_out(ranks[None], np.array([12])),
        ranks_per_node,
        reached,
    )
    for t in range(5):
        hit = ranks[ids[t]]
        assert reached[t, 0].tolist() == [len(set(hit.tolist())), len(set((hit // ranks_per_node).tolist()))]
