"""A batch of tokens, step by step: groups scored and kept, the experts that they give, later arrivals; or experts drawn one
after another where there are no groups. `sim.router.sampler` says what the steps are.

Loops are short and touch few rows each, because only then does the compiler vectorise them.
"""

import numpy as np

from sim.kernels import part, small_part
from sim.router import workspace as row
from sim.router.one_token import REDRAWS, ROUNDS, TRIES, Address, Token, add_arrivals, draw_other
from sim.router.tables import draw_mark
from sim.router.workspace import put_real, put_whole, real, whole
from sim.streams import TOKEN, exp32, exponential, fma, normal_pair, philox


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
    b, a, both = score_law
    one = np.float32(1)
    if both > 0:
        for i in range(n):
            first = one / fma(a, real(rows, at + row.FIRST_TIME, i), b)
            put_real(rows, at + row.SCORE, i, first + one / fma(a, real(rows, at + row.SECOND_TIME, i), b))
    else:
        for i in range(n):
            put_real(rows, at + row.SCORE, i, one / fma(a, real(rows, at + row.FIRST_TIME, i), b))


@part
def score_groups(n, topk, layer, work):
    """Group effects, first two arrivals and group scores of n tokens."""
    rows = work.rows
    last = np.float32(np.inf) if topk.size == 1 else row.LATE
    for g in range(0, topk.n_group, 2):
        _fill_effects(rows, work.groups + g * row.GROUP_SIZE, n, topk.group_sigma)
    for g in range(topk.n_group):
        at = work.groups + g * row.GROUP_SIZE
        _fill_marks(rows, at, n, g, topk.size, layer.alias, layer.gap_without)
        _fill_times(rows, at, n, layer.gap[g], last)
        _fill_scores(rows, at, n, topk.score_law)


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


@small_part
def expert_row(places, k):
    """Row of the k-th expert."""
    return places + (k // 2) * row.PLACE_SIZE + row.EXPERT + (k % 2) * row.BATCH


@part
def _of_token(i, start, trial, key, reals, wholes, work):
    """Token i of the batch, by itself, and the address of its words: reals float32 and wholes int32 are the rows."""
    numbers = np.uint32(i), np.uint32(row.BATCH), np.uint32(work.places // row.BATCH), np.uint32(2 * work.n_places)
    own = Token(reals, wholes, numbers[0], numbers[1], numbers[2], numbers[3])
    return Address(np.uint64(start + i), np.uint64(trial), key[0], key[1]), own


@part
def _redraw_listed(n_listed, start, trial, key, size, layer, work, first, k):
    """Draw the k-th experts of the listed tokens again; the words of the first try together."""
    rows, list_at, words_at = work.rows, work.round + row.LISTED, work.round + row.LIST_WORD
    block, k0, k1 = np.uint64((REDRAWS + 2 * TRIES * k) // 4), key[0], key[1]
    for m in range(n_listed):
        token = np.uint64(start) + np.uint64(whole(rows, list_at, m))
        put_whole(rows, words_at, m, philox(block, token, np.uint64(trial), TOKEN, k0, k1)[0])
    mine, is_grouped = expert_row(work.places, k), layer.gap.size > 1
    reals, wholes = rows.view(np.float32), rows.view(np.int32)
    for m in range(n_listed):
        i = np.int64(whole(rows, list_at, m))
        group = whole(rows, work.places + (k // 2) * row.PLACE_SIZE + row.GROUP, i) if is_grouped else np.uint32(0)
        e, repeats = draw_mark(whole(rows, words_at, m), group, size, layer.alias), False
        for j in range(first, k):
            repeats |= whole(rows, expert_row(work.places, j), i) == e
        if repeats:
            of, own = _of_token(i, start, trial, key, reals, wholes, work)
            e = np.uint32(draw_other(1, of, group, size, layer, own, first, k))
        put_whole(rows, mine, i, e)


@part
def draw_kinds(n, word, chances, work):
    """Kinds of n tokens, from the words in the row `word`: chances uint64 [kinds], cumulated, in units of 2**-32."""
    rows = work.rows
    for i in range(n):
        kind = np.uint32(0)
        for j in range(chances.size - 1):
            kind += np.uint32(np.uint64(whole(rows, word, i)) >= chances[j])
        for place in range(work.n_places):
            put_whole(rows, work.places + place * row.PLACE_SIZE + row.GROUP, i, kind)


@part
def drop_kinds(n, top_k, size, work):
    """Make experts of the marks of n tokens, kind * size + expert."""
    rows = work.rows
    for k in range(top_k):
        mine, kind = expert_row(work.places, k), work.places + (k // 2) * row.PLACE_SIZE + row.GROUP
        for i in range(n):
            put_whole(rows, mine, i, whole(rows, mine, i) - whole(rows, kind, i) * np.uint32(size))


@part
def draw_distinct(n, start, trial, key, word, size, layer, work, k):
    """The k-th experts of n tokens of an ungrouped router: other than all before. Kinds of tokens stand for groups."""
    rows, mine, now = work.rows, expert_row(work.places, k), work.round
    if layer.gap.size > 1:
        kind = work.places + (k // 2) * row.PLACE_SIZE + row.GROUP
        _draw_marks(n, rows, kind, word, mine, size, layer.alias)
    else:
        for i in range(n):
            put_whole(rows, mine, i, draw_mark(whole(rows, word, i), np.uint32(0), size, layer.alias))
    for i in range(n):
        put_whole(rows, now + row.TAKES, i, 0)
    for j in range(k):
        earlier = expert_row(work.places, j)
        for i in range(n):
            repeated = whole(rows, mine, i) == whole(rows, earlier, i)
            put_whole(rows, now + row.TAKES, i, whole(rows, now + row.TAKES, i) | np.uint32(repeated))
    n_listed = 0
    for i in range(n):
        put_whole(rows, now + row.LISTED, n_listed, i)
        n_listed += whole(rows, now + row.TAKES, i)
    _redraw_listed(n_listed, start, trial, key, size, layer, work, 0, k)


@part
def _draw_marks(n, rows, group, word, mark, size, alias):
    """Marks of the groups in the row `group`."""
    for i in range(n):
        put_whole(rows, mark, i, draw_mark(whole(rows, word, i), whole(rows, group, i), size, alias))


@part
def _draw_second(n, start, trial, key, word, size, layer, work, j):
    """The second expert of place j of n tokens: other than the first of its group."""
    rows, listed = work.rows, work.round + row.LISTED
    place = work.places + j * row.PLACE_SIZE
    _draw_marks(n, rows, place + row.GROUP, word, place + row.EXPERT + row.BATCH, size, layer.alias)
    n_listed = 0
    for i in range(n):
        put_whole(rows, listed, n_listed, i)
        n_listed += whole(rows, place + row.EXPERT, i) == whole(rows, place + row.EXPERT + row.BATCH, i)
    _redraw_listed(n_listed, start, trial, key, size, layer, work, 2 * j, 2 * j + 1)


@part
def _fill_next(n, rows, place, word):
    """The first arrival of a kept group after its second, with replacement."""
    for i in range(n):
        since = real(rows, place + row.SINCE, i)
        gap = real(rows, place + row.PLACE_GAP, i)
        put_real(rows, place + row.TIME + row.BATCH, i, since)
        put_real(rows, place + row.NEXT, i, min(fma(exponential(whole(rows, word, i)), gap, since), row.LATE))


@part
def begin_places(n, start, trial, key, topk, words, layer, work):
    """Second experts and next arrivals of the kept groups; places that no group has stay open."""
    rows, places, infinite = work.rows, work.places, np.float32(np.inf)
    size, topk_group = topk.size, topk.topk_group
    for j in range(topk_group):
        place = places + j * row.PLACE_SIZE
        if size > 1:
            _draw_second(n, start, trial, key, words + j * row.BATCH, size, layer, work, j)
        else:
            for i in range(n):
                put_whole(rows, place + row.EXPERT + row.BATCH, i, row.NOBODY)
        _fill_next(n, rows, place, words + (topk_group + j) * row.BATCH)
    for j in range(work.n_places):
        place = places + j * row.PLACE_SIZE
        if j >= topk_group:
            for i in range(n):
                put_real(rows, place + row.TIME, i, infinite)
                put_real(rows, place + row.TIME + row.BATCH, i, infinite)
                put_whole(rows, place + row.EXPERT, i, row.NOBODY)
                put_whole(rows, place + row.EXPERT + row.BATCH, i, row.NOBODY)
        if j >= topk_group or size <= 2:
            for i in range(n):
                put_real(rows, place + row.NEXT, i, infinite)


@part
def _look_at_first(n, rows, now, place):
    for i in range(n):
        put_real(rows, now + row.NOW, i, real(rows, place + row.NEXT, i))
        put_whole(rows, now + row.NOW_GAP, i, whole(rows, place + row.PLACE_GAP, i))
        put_whole(rows, now + row.NOW_GROUP, i, whole(rows, place + row.GROUP, i))
        put_whole(rows, now + row.NOW_PLACE, i, np.uint32(0))
        put_real(
            rows, now + row.LATEST, i, max(real(rows, place + row.TIME, i), real(rows, place + row.TIME + row.BATCH, i))
        )


@part
def _look_at(n, rows, now, place, j):
    for i in range(n):
        time, soonest = real(rows, place + row.NEXT, i), real(rows, now + row.NOW, i)
        sooner = time < soonest
        gap, gap_now = whole(rows, place + row.PLACE_GAP, i), whole(rows, now + row.NOW_GAP, i)
        group, group_now = whole(rows, place + row.GROUP, i), whole(rows, now + row.NOW_GROUP, i)
        place_now = whole(rows, now + row.NOW_PLACE, i)
        put_real(rows, now + row.NOW, i, time if sooner else soonest)
        put_whole(rows, now + row.NOW_GAP, i, gap if sooner else gap_now)
        put_whole(rows, now + row.NOW_GROUP, i, group if sooner else group_now)
        put_whole(rows, now + row.NOW_PLACE, i, np.uint32(j) if sooner else place_now)
        latest = max(real(rows, place + row.TIME, i), real(rows, place + row.TIME + row.BATCH, i))
        put_real(rows, now + row.LATEST, i, max(latest, real(rows, now + row.LATEST, i)))


@part
def look(n, work):
    """The earliest of the next arrivals, and the latest expert, of n tokens."""
    rows = work.rows
    _look_at_first(n, rows, work.round, work.places)
    for j in range(1, work.n_places):
        _look_at(n, rows, work.round, work.places + j * row.PLACE_SIZE, j)


@part
def _begin_takes(n, rows, now):
    for i in range(n):
        put_whole(rows, now + row.TAKES, i, np.uint32(real(rows, now + row.NOW, i) < real(rows, now + row.LATEST, i)))


@part
def _refuse_repeated(n, rows, now, place):
    for i in range(n):
        mark = whole(rows, now + row.NOW_MARK, i)
        other = (whole(rows, place + row.EXPERT, i) != mark) & (whole(rows, place + row.EXPERT + row.BATCH, i) != mark)
        put_whole(rows, now + row.TAKES, i, whole(rows, now + row.TAKES, i) & np.uint32(other))


@part
def _replace_latest(n, rows, now, place):
    """Where the token takes the arrival and its latest expert is here, put it there (once)."""
    for i in range(n):
        takes, latest = whole(rows, now + row.TAKES, i) == np.uint32(1), real(rows, now + row.LATEST, i)
        time, mark = real(rows, now + row.NOW, i), whole(rows, now + row.NOW_MARK, i)
        time_1, time_2 = real(rows, place + row.TIME, i), real(rows, place + row.TIME + row.BATCH, i)
        mark_1, mark_2 = whole(rows, place + row.EXPERT, i), whole(rows, place + row.EXPERT + row.BATCH, i)
        first = takes & (time_1 == latest)
        second = takes & (time_2 == latest) & (time_1 != latest)
        put_real(rows, place + row.TIME, i, time if first else time_1)
        put_real(rows, place + row.TIME + row.BATCH, i, time if second else time_2)
        put_whole(rows, place + row.EXPERT, i, mark if first else mark_1)
        put_whole(rows, place + row.EXPERT + row.BATCH, i, mark if second else mark_2)
        put_whole(rows, now + row.TAKES, i, np.uint32(takes & (not first) & (not second)))


@part
def _fill_gaps(n, rows, now, word):
    """The arrival after the one that is looked at."""
    for i in range(n):
        time = fma(exponential(whole(rows, word, i)), real(rows, now + row.NOW_GAP, i), real(rows, now + row.NOW, i))
        put_real(rows, now + row.NOW_GAP, i, min(time, row.LATE))


@part
def _advance(n, rows, now, place, j):
    for i in range(n):
        here = (whole(rows, now + row.NOW_PLACE, i) == np.uint32(j)) & (
            real(rows, now + row.NOW, i) < real(rows, now + row.LATEST, i)
        )
        later, same = real(rows, now + row.NOW_GAP, i), real(rows, place + row.NEXT, i)
        put_real(rows, place + row.NEXT, i, later if here else same)


@part
def run_round(n, word, topk, alias, work):
    """Take n tokens through their next arrivals: words of the marks at `word`, of the gaps after them one row further."""
    rows, now = work.rows, work.round
    look(n, work)
    _draw_marks(n, rows, now + row.NOW_GROUP, word, now + row.NOW_MARK, topk.size, alias)
    _begin_takes(n, rows, now)
    for j in range(work.n_places):
        _refuse_repeated(n, rows, now, work.places + j * row.PLACE_SIZE)
    for j in range(work.n_places):
        _replace_latest(n, rows, now, work.places + j * row.PLACE_SIZE)
    _fill_gaps(n, rows, now, word + row.BATCH)
    for j in range(topk.topk_group):
        _advance(n, rows, now, work.places + j * row.PLACE_SIZE, j)


@part
def finish(n, start, trial, key, topk, layer, work):
    """Take the tokens through the rest of their arrivals, one by one."""
    rows, now = work.rows, work.round
    look(n, work)
    n_listed = 0
    for i in range(n):
        put_whole(rows, now + row.LISTED, n_listed, i)
        n_listed += real(rows, now + row.NOW, i) < real(rows, now + row.LATEST, i)
    reals, wholes = rows.view(np.float32), rows.view(np.int32)
    for m in range(n_listed):
        i = np.int64(whole(rows, now + row.LISTED, m))
        of, own = _of_token(i, start, trial, key, reals, wholes, work)
        add_arrivals(of, topk, np.int32(ROUNDS), layer, own)


@part
def _exchange(n, rows, time, later):
    """Put the earlier of two experts of each token first: rows of their times, rows of the experts from there."""
    for i in range(n):
        a, b = real(rows, time, i), real(rows, later, i)
        mark_a, mark_b = whole(rows, time + (row.EXPERT - row.TIME), i), whole(rows, later + (row.EXPERT - row.TIME), i)
        swap = b < a
        put_real(rows, time, i, b if swap else a)
        put_real(rows, later, i, a if swap else b)
        put_whole(rows, time + (row.EXPERT - row.TIME), i, mark_b if swap else mark_a)
        put_whole(rows, later + (row.EXPERT - row.TIME), i, mark_a if swap else mark_b)


@part
def sort_experts(n, work):
    """Sort the experts of n tokens by their times: exchanges of neighbours, odd and even in turn."""
    rows, places = work.rows, work.places
    for turn in range(2 * work.n_places):
        for j in range(work.n_places):
            place = places + j * row.PLACE_SIZE
            if turn % 2 == 0:
                _exchange(n, rows, place + row.TIME, place + row.TIME + row.BATCH)
            elif j + 1 < work.n_places:
                _exchange(n, rows, place + row.TIME + row.BATCH, place + row.PLACE_SIZE + row.TIME)
