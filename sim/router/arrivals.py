"""Experts of the kept groups past their first: second ones, and later arrivals as long as one can still be taken."""

import numpy as np

from sim.kernels import part, small_part
from sim.router import workspace as row
from sim.router.tables import draw_mark
from sim.router.workspace import put_real, put_whole, real, whole
from sim.streams import TOKEN, exponential, fma, philox, word_at

ROUNDS = 3
"""Arrivals that all tokens of a batch are taken through together; the few that need more are finished one by one."""
TRIES = 16
"""Repeated marks before an exact scan; each try is an independent draw, so stopping does not bias."""
REDRAWS, SCAN = 2**20, 2**24  # words from here on: of marks drawn again, and of scans


@small_part
def expert_row(places, k):
    """Row of the k-th expert."""
    return places + (k // 2) * row.PLACE_SIZE + row.EXPERT + (k % 2) * row.BATCH


@small_part
def _time_row(places, k):
    return expert_row(places, k) + (row.TIME - row.EXPERT)


@part
def _is_among(e, rows, places, first, k, i):
    """Whether e is one of the experts first .. k - 1 of token i."""
    found = False
    for j in range(first, k):
        found |= whole(rows, expert_row(places, j), i) == e
    return found


@part
def _scan_others(word, group, size, weight, rows, places, first, k, i):
    """Expert of a group drawn among those that are not the experts first .. k - 1 of token i, by cumulated weights."""
    lo = np.int64(group) * size
    total = 0.0
    for e in range(lo, lo + size):
        if not _is_among(np.uint32(e), rows, places, first, k, i):
            total += weight[e]
    target = (np.float64(word) + 0.5) * 2.0**-32 * total
    last = -1  # the lowest expert that is left, should all their weights be 0
    for e in range(lo, lo + size):
        if not _is_among(np.uint32(e), rows, places, first, k, i) and (last < 0 or weight[e] > 0.0):
            last = e
            target -= weight[e]
            if target < 0.0:
                break
    return last


@part
def _redraw(i, token, trial, key, group, layer, rows, places, first, k):
    """Draw the k-th expert of token i once more until it is none of the experts first .. k - 1; the second try is made."""
    size = layer.alias.size // layer.gap.size
    for tries in range(1, TRIES):
        word = word_at(REDRAWS + 2 * TRIES * k + tries, token, trial, TOKEN, key[0], key[1])
        e = draw_mark(word, group, size, layer.alias)
        if not _is_among(e, rows, places, first, k, i):
            put_whole(rows, expert_row(places, k), i, e)
            return
    word = word_at(REDRAWS + 2 * TRIES * k + TRIES, token, trial, TOKEN, key[0], key[1])
    e = _scan_others(word, group, size, layer.weight, rows, places, first, k, i)
    put_whole(rows, expert_row(places, k), i, e)


@part
def _redraw_listed(n_listed, start, trial, key, layer, work, first, k):
    """Draw the k-th experts of the listed tokens again; the words of the first try together."""
    rows, list_at, word_at_ = work.rows, work.round + row.LISTED, work.round + row.LIST_WORD
    block, k0, k1 = np.uint64((REDRAWS + 2 * TRIES * k) // 4), key[0], key[1]
    for m in range(n_listed):
        token = np.uint64(start) + np.uint64(whole(rows, list_at, m))
        put_whole(rows, word_at_, m, philox(block, token, np.uint64(trial), TOKEN, k0, k1)[0])
    mine, size = expert_row(work.places, k), layer.alias.size // layer.gap.size
    is_grouped = layer.gap.size > 1
    for m in range(n_listed):
        i = np.int64(whole(rows, list_at, m))
        group = whole(rows, work.places + (k // 2) * row.PLACE_SIZE + row.GROUP, i) if is_grouped else np.uint32(0)
        e = draw_mark(whole(rows, word_at_, m), group, size, layer.alias)
        put_whole(rows, mine, i, e)
        if _is_among(e, rows, work.places, first, k, i):
            _redraw(i, start + i, trial, key, group, layer, rows, work.places, first, k)


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
def draw_distinct(n, start, trial, key, word, layer, work, k):
    """The k-th experts of n tokens of an ungrouped router: other than all before. Kinds of tokens stand for groups."""
    rows, mine, now = work.rows, expert_row(work.places, k), work.round
    if layer.gap.size > 1:
        kind = work.places + (k // 2) * row.PLACE_SIZE + row.GROUP
        _draw_marks(n, rows, kind, word, mine, layer.alias.size // layer.gap.size, layer.alias)
    else:
        for i in range(n):
            put_whole(rows, mine, i, draw_mark(whole(rows, word, i), np.uint32(0), layer.alias.size, layer.alias))
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
    _redraw_listed(n_listed, start, trial, key, layer, work, 0, k)


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
    _redraw_listed(n_listed, start, trial, key, layer, work, 2 * j, 2 * j + 1)


@part
def _fill_next(n, rows, place, word):
    """The first arrival of a kept group after its second, with replacement."""
    for i in range(n):
        since = real(rows, place + row.SINCE, i)
        gap = real(rows, place + row.PLACE_GAP, i)
        put_real(rows, place + row.TIME + row.BATCH, i, since)
        put_real(rows, place + row.NEXT, i, min(fma(exponential(whole(rows, word, i)), gap, since), row.LATE))


@part
def begin_places(n, start, trial, key, topk_group, words, size, layer, work):
    """Second experts and next arrivals of the kept groups; places that no group has stay open."""
    rows, places, infinite = work.rows, work.places, np.float32(np.inf)
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
def run_round(n, word, topk_group, size, alias, work):
    """Take n tokens through their next arrivals: words of the marks at `word`, of the gaps after them one row further."""
    rows, now = work.rows, work.round
    look(n, work)
    _draw_marks(n, rows, now + row.NOW_GROUP, word, now + row.NOW_MARK, size, alias)
    _begin_takes(n, rows, now)
    for j in range(work.n_places):
        _refuse_repeated(n, rows, now, work.places + j * row.PLACE_SIZE)
    for j in range(work.n_places):
        _replace_latest(n, rows, now, work.places + j * row.PLACE_SIZE)
    _fill_gaps(n, rows, now, word + row.BATCH)
    for j in range(topk_group):
        _advance(n, rows, now, work.places + j * row.PLACE_SIZE, j)


@part
def _find_latest(rows, work, i):
    """Number of the latest expert of token i, and its time."""
    where, latest = 0, real(rows, work.places + row.TIME, i)
    for k in range(1, 2 * work.n_places):
        time = real(rows, _time_row(work.places, k), i)
        where, latest = (k, time) if time > latest else (where, latest)
    return where, latest


@part
def _scan_rest(i, token, trial, key, time, topk_group, layer, work):
    """Draw what is left of the arrivals of token i after `time`, one of each expert that it has not taken."""
    rows, places = work.rows, work.places
    size = layer.alias.size // layer.gap.size
    for j in range(topk_group):
        place = places + j * row.PLACE_SIZE
        group = np.int64(whole(rows, place + row.GROUP, i))
        since, gap = max(time, real(rows, place + row.SINCE, i)), np.float64(real(rows, place + row.PLACE_GAP, i))
        gap /= layer.gap[group]  # of an expert of weight 1
        for e in range(group * size, (group + 1) * size):
            if not _is_among(np.uint32(e), rows, places, 0, 2 * work.n_places, i):
                word = word_at(SCAN + e, token, trial, TOKEN, key[0], key[1])
                between = np.float64(exponential(word)) * gap / max(layer.weight[e], 1e-300)
                arrival = np.float32(min(since + between, np.float64(row.LATE)))
                where, latest = _find_latest(rows, work, i)
                if arrival < latest:
                    put_real(rows, _time_row(places, where), i, arrival)
                    put_whole(rows, expert_row(places, where), i, e)


@part
def _finish_token(i, token, trial, key, block, topk_group, layer, work):
    """Take token i through its arrivals until the next is later than its latest expert."""
    rows, places, alias = work.rows, work.places, layer.alias
    size, n_repeats = layer.alias.size // layer.gap.size, 0
    a, b, c, d = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
    n_arrivals = 0
    while n_repeats < TRIES:
        place, time = places, real(rows, places + row.NEXT, i)
        for j in range(1, topk_group):
            next_time = real(rows, places + j * row.PLACE_SIZE + row.NEXT, i)
            place, time = (places + j * row.PLACE_SIZE, next_time) if next_time < time else (place, time)
        where, latest = _find_latest(rows, work, i)
        if not time < latest:
            return
        if n_arrivals % 2 == 0:
            counter = np.uint64(block + n_arrivals // 2)
            a, b, c, d = philox(counter, np.uint64(token), np.uint64(trial), TOKEN, key[0], key[1])
        else:
            a, b = c, d
        mark = draw_mark(np.uint32(a), whole(rows, place + row.GROUP, i), size, alias)
        if _is_among(mark, rows, places, 0, 2 * work.n_places, i):
            n_repeats += 1
        else:
            put_real(rows, _time_row(places, where), i, time)
            put_whole(rows, expert_row(places, where), i, mark)
        gap = real(rows, place + row.PLACE_GAP, i)
        put_real(rows, place + row.NEXT, i, min(fma(exponential(np.uint32(b)), gap, time), row.LATE))
        n_arrivals += 1
        last = time
    _scan_rest(i, token, trial, key, last, topk_group, layer, work)


@part
def finish(n, start, trial, key, block, topk_group, layer, work):
    """Take the tokens through the rest of their arrivals, one by one; words from Philox block `block` on."""
    rows, now = work.rows, work.round
    look(n, work)
    n_listed = 0
    for i in range(n):
        put_whole(rows, now + row.LISTED, n_listed, i)
        n_listed += real(rows, now + row.NOW, i) < real(rows, now + row.LATEST, i)
    for m in range(n_listed):
        i = np.int64(whole(rows, now + row.LISTED, m))
        _finish_token(i, start + i, trial, key, block, topk_group, layer, work)


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
