"""Group scores of a batch of tokens, and the groups that are kept. Loops are short and touch few rows each, because only
then does the compiler vectorise them.
"""

import numpy as np

from sim.kernels import part
from sim.router import workspace as row
from sim.router.tables import draw_mark
from sim.router.workspace import put_real, put_whole, real, whole
from sim.streams import exp32, exponential, fma, normal_pair


@part
def _fill_effects(rows, at, n, sigma):
    """exp(-sigma * normal) of two groups, by which their gaps are the longer."""
    if sigma == 0:
        for i in range(n):
            put_real(rows, at + row.GAP, i, 1)
            put_real(rows, at + row.GROUP_SIZE + row.GAP, i, 1)
        return
    for i in range(n):
        z_0, z_1 = normal_pair(
            whole(rows, at + row.EFFECT_WORD, i), whole(rows, at + row.GROUP_SIZE + row.EFFECT_WORD, i)
        )
        put_real(rows, at + row.GAP, i, exp32(-sigma * z_0))
        put_real(rows, at + row.GROUP_SIZE + row.GAP, i, exp32(-sigma * z_1))


@part
def _fill_marks(rows, at, n, g, size, alias, gap_without):
    """First expert of a group to arrive; apart from arithmetic, since a table keeps the compiler from vectorising.

    Two loops: where an address waits for a select, the compiler makes it a branch, mispredicted half of the time.
    """
    for i in range(n):
        put_whole(
            rows, at + row.FIRST_MARK, i, draw_mark(whole(rows, at + row.MARK_WORD, i), np.uint32(g), size, alias)
        )
    for i in range(n):
        put_real(rows, at + row.GAP_WITHOUT, i, gap_without[np.uint64(whole(rows, at + row.FIRST_MARK, i))])


@part
def _fill_times(rows, at, n, gap, last):
    """First two distinct arrivals of one group, and its gap."""
    for i in range(n):
        effect = real(rows, at + row.GAP, i)
        group_gap = gap * effect
        first = min(exponential(whole(rows, at + row.TIME_WORD, i)) * group_gap, row.LATE)
        put_real(rows, at + row.GAP, i, group_gap)
        put_real(rows, at + row.FIRST_TIME, i, first)
        between = exponential(whole(rows, at + row.SECOND_WORD, i)) * real(rows, at + row.GAP_WITHOUT, i)
        put_real(rows, at + row.SECOND_TIME, i, min(fma(between, effect, first), last))


@part
def _fill_scores(rows, at, n, score_law):
    """Group scores: an arrival at t scores 1 / (b + a t); `score_law` (b, a, both) sums the first, or the first two."""
    b, a, one = np.float32(score_law[0]), np.float32(score_law[1]), np.float32(1)
    if score_law[2] > 0:
        for i in range(n):
            first = one / fma(a, real(rows, at + row.FIRST_TIME, i), b)
            put_real(rows, at + row.SCORE, i, first + one / fma(a, real(rows, at + row.SECOND_TIME, i), b))
    else:
        for i in range(n):
            put_real(rows, at + row.SCORE, i, one / fma(a, real(rows, at + row.FIRST_TIME, i), b))


@part
def score_groups(n, layer, group_sigma, score_law, work):
    """Group effects, first two arrivals and group scores of n tokens."""
    rows, n_group = work.rows, layer.gap.size
    size = layer.alias.size // n_group
    last = np.float32(np.inf) if size == 1 else row.LATE
    for g in range(0, n_group, 2):
        _fill_effects(rows, work.groups + g * row.GROUP_SIZE, n, np.float32(group_sigma))
    for g in range(n_group):
        at = work.groups + g * row.GROUP_SIZE
        _fill_marks(rows, at, n, g, size, layer.alias, layer.gap_without)
        _fill_times(rows, at, n, layer.gap[g], last)
        _fill_scores(rows, at, n, score_law)


@part
def _compare(rows, at, later, n):
    """Of two groups the one with the lower score falls back a rank; the later one if they are equal."""
    for i in range(n):
        wins = real(rows, later + row.SCORE, i) > real(rows, at + row.SCORE, i)
        put_whole(rows, at + row.RANK, i, whole(rows, at + row.RANK, i) + np.uint32(wins))
        put_whole(rows, later + row.RANK, i, whole(rows, later + row.RANK, i) + np.uint32(not wins))


@part
def _find_kept(rows, at, place, n, rank, g):
    """Where one of the groups g and g + 1 has this rank, it is the group of a place."""
    rank, group, group_1 = np.uint32(rank), np.uint32(g), np.uint32(g + 1)
    for i in range(n):
        first, second = whole(rows, at + row.RANK, i) == rank, whole(rows, at + row.GROUP_SIZE + row.RANK, i) == rank
        kept = whole(rows, place + row.GROUP, i)
        put_whole(rows, place + row.GROUP, i, group if first else (group_1 if second else kept))


@part
def _take_kept(rows, groups, place, n):
    """Copy the group of a place into it."""
    for i in range(n):
        at = np.uint64(groups) + np.uint64(whole(rows, place + row.GROUP, i)) * np.uint64(row.GROUP_SIZE)
        put_whole(rows, place + row.TIME, i, whole(rows, at + np.uint64(row.FIRST_TIME), i))
        put_whole(rows, place + row.SINCE, i, whole(rows, at + np.uint64(row.SECOND_TIME), i))
        put_whole(rows, place + row.PLACE_GAP, i, whole(rows, at + np.uint64(row.GAP), i))
        put_whole(rows, place + row.EXPERT, i, whole(rows, at + np.uint64(row.FIRST_MARK), i))


@part
def keep_groups(n, topk_group, n_group, work):
    """Copy the topk_group best groups of n tokens, ties to the lowest, into places, best first."""
    rows = work.rows
    for g in range(n_group + n_group % 2):
        at = np.uint64(work.groups + g * row.GROUP_SIZE + row.RANK)
        rows[at : at + np.uint64(row.BATCH)] = 0 if g < n_group else n_group
    for g in range(n_group):
        for h in range(g + 1, n_group):
            _compare(rows, work.groups + g * row.GROUP_SIZE, work.groups + h * row.GROUP_SIZE, n)
    for j in range(topk_group):
        place = work.places + j * row.PLACE_SIZE
        for g in range(0, n_group, 2):
            _find_kept(rows, work.groups + g * row.GROUP_SIZE, place, n, j, g)
        _take_kept(rows, work.groups, place, n)
