"""The experts of one token at a time: what the batches of `sim.router.sampler` give, bit for bit, for a GPU's threads.

Each step does the same operations on the same words as the batches do; only what is kept of them differs.
"""

from typing import NamedTuple

import numpy as np

from sim.kernels import kernel
from sim.router.arrivals import REDRAWS, ROUNDS, SCAN, TRIES
from sim.router.tables import draw_mark
from sim.router.workspace import LATE
from sim.streams import TOKEN, exp32, exponential, fma, normal_pair, philox, word_at

MOST_GROUPS, MOST_PLACES = 64, 64
"""Of a router whose tokens are worked one by one."""
_NOBODY = np.int32(-1)


class Token(NamedTuple):
    """What is known of a token. Group g is in row g, place j (a kept group, best first) in row j."""

    score: np.ndarray  # float32 [MOST_GROUPS]
    group: np.ndarray  # int32 [MOST_GROUPS], groups by rank
    group_gap: np.ndarray  # float32 [MOST_GROUPS]
    group_time: np.ndarray  # float32 [2 * MOST_GROUPS], its first two arrivals
    group_mark: np.ndarray  # int32 [MOST_GROUPS], the expert of the first
    next_time: np.ndarray  # float32 [MOST_GROUPS], next arrival of each place
    time: np.ndarray  # float32 [MOST_PLACES], of the token's experts
    expert: np.ndarray  # int32 [MOST_PLACES]


@kernel
def _is_among(e, expert, first, k):
    found = False
    for j in range(first, k):
        found |= expert[j] == e
    return found


@kernel
def _draw_other(token, trial, key, group, size, alias, weight, expert, first, k):
    """The k-th expert of a token drawn again until it is none of the experts first .. k - 1."""
    for tries in range(TRIES):
        word = word_at(REDRAWS + 2 * TRIES * k + tries, token, trial, TOKEN, key[0], key[1])
        e = np.int32(draw_mark(word, group, size, alias))
        if not _is_among(e, expert, first, k):
            return e
    word = word_at(REDRAWS + 2 * TRIES * k + TRIES, token, trial, TOKEN, key[0], key[1])
    lo, total = group * size, 0.0
    for e in range(lo, lo + size):
        if not _is_among(e, expert, first, k):
            total += weight[e]
    target = (np.float64(word) + 0.5) * 2.0**-32 * total
    last = -1
    for e in range(lo, lo + size):
        if not _is_among(e, expert, first, k) and (last < 0 or weight[e] > 0.0):
            last = e
            target -= weight[e]
            if target < 0.0:
                break
    return np.int32(last)


@kernel
def _score_groups(token, trial, key, n_group, size, sigma, score_law, gap, gap_without, alias, own):
    """Gaps, first two arrivals and scores of the groups, and the groups by rank."""
    b, a, one = np.float32(score_law[0]), np.float32(score_law[1]), np.float32(1)
    last = np.float32(np.inf) if size == 1 else LATE
    effect, next_effect, even = one, one, np.uint32(0)
    for g in range(n_group):
        w_0, w_1, w_2, w_3 = philox(np.uint64(g), np.uint64(token), np.uint64(trial), TOKEN, key[0], key[1])
        if sigma == 0:
            effect = one
        elif g % 2 == 0:
            even = np.uint32(w_3)
            odd = np.uint32(philox(np.uint64(g + 1), np.uint64(token), np.uint64(trial), TOKEN, key[0], key[1])[3])
            z_0, z_1 = normal_pair(even, odd)
            effect, next_effect = exp32(-sigma * z_0), exp32(-sigma * z_1)
        else:
            effect = next_effect
        e = draw_mark(np.uint32(w_0), g, size, alias)
        group_gap = gap[g] * effect
        first = min(exponential(np.uint32(w_1)) * group_gap, LATE)
        second = min(fma(exponential(np.uint32(w_2)) * gap_without[np.uint64(e)], effect, first), last)
        score = one / fma(a, first, b)
        if score_law[2] > 0:
            score = score + one / fma(a, second, b)
        own.group_gap[g], own.group_mark[g], own.score[g] = group_gap, np.int32(e), score
        own.group_time[2 * g], own.group_time[2 * g + 1] = first, second
        place = g
        while place > 0 and own.score[own.group[place - 1]] < score:
            own.group[place] = own.group[place - 1]
            place -= 1
        own.group[place] = g


@kernel
def _latest(time, n):
    where = 0
    for k in range(1, n):
        if time[k] > time[where]:
            where = k
    return where


@kernel
def _draw_rest(token, trial, key, size, now, topk_group, n_slots, weight, gap, own):
    """What is left of the arrivals after `now`, one of each expert that the token has not taken."""
    for j in range(topk_group):
        g = own.group[j]
        since = max(now, own.group_time[2 * g + 1])
        of_weight_1 = np.float64(own.group_gap[g]) / gap[g]
        for e in range(g * size, (g + 1) * size):
            if not _is_among(e, own.expert, 0, n_slots):
                word = word_at(SCAN + e, token, trial, TOKEN, key[0], key[1])
                between = np.float64(exponential(word)) * of_weight_1 / max(weight[e], 1e-300)
                arrival = np.float32(min(since + between, np.float64(LATE)))
                where = _latest(own.time, n_slots)
                if arrival < own.time[where]:
                    own.time[where], own.expert[where] = arrival, e


@kernel
def _add_arrivals(token, trial, key, size, topk_group, n_slots, at, weight, gap, alias, own):
    """Later arrivals, until the next is later than the latest expert; their words from index `at` on."""
    n_repeats, arrival = 0, 0
    finish = (at + 2 * ROUNDS + 3) // 4 * 4  # words of arrivals past the rounds begin with a block
    while True:
        j = 0
        for place in range(1, topk_group):
            if own.next_time[place] < own.next_time[j]:
                j = place
        where, now = _latest(own.time, n_slots), own.next_time[j]
        if not now < own.time[where]:
            return
        index = at + 2 * arrival if arrival < ROUNDS else finish + 2 * (arrival - ROUNDS)
        g = own.group[j]
        e = np.int32(draw_mark(word_at(index, token, trial, TOKEN, key[0], key[1]), g, size, alias))
        if _is_among(e, own.expert, 0, n_slots):
            n_repeats += arrival >= ROUNDS
            if n_repeats == TRIES:
                _draw_rest(token, trial, key, size, now, topk_group, n_slots, weight, gap, own)
                return
        else:
            own.time[where], own.expert[where] = now, e
        word = word_at(index + 1, token, trial, TOKEN, key[0], key[1])
        own.next_time[j] = min(fma(exponential(word), own.group_gap[g], now), LATE)
        arrival += 1


@kernel
def route_token(token, trial, key, topk_group, top_k, sigma, score_law, weight, gap, gap_without, alias, own):
    """Experts of a token, best first, into own.expert[:top_k]."""
    n_group = gap.size
    size = alias.size // n_group
    if n_group == 1:
        for k in range(top_k):
            e = np.int32(draw_mark(word_at(k, token, trial, TOKEN, key[0], key[1]), 0, size, alias))
            if _is_among(e, own.expert, 0, k):
                e = _draw_other(token, trial, key, 0, size, alias, weight, own.expert, 0, k)
            own.expert[k] = e
        return
    _score_groups(token, trial, key, n_group, size, sigma, score_law, gap, gap_without, alias, own)
    n_slots = 2 * max((top_k + 1) // 2, topk_group)
    for k in range(n_slots):
        own.time[k], own.expert[k] = np.float32(np.inf), _NOBODY
    words = 4 * (n_group + n_group % 2)
    for j in range(topk_group):
        g = own.group[j]
        own.time[2 * j], own.expert[2 * j] = own.group_time[2 * g], own.group_mark[g]
        own.next_time[j] = np.float32(np.inf)
        if size > 1:
            e = np.int32(draw_mark(word_at(words + j, token, trial, TOKEN, key[0], key[1]), g, size, alias))
            if e == own.group_mark[g]:
                e = _draw_other(token, trial, key, g, size, alias, weight, own.expert, 2 * j, 2 * j + 1)
            own.time[2 * j + 1], own.expert[2 * j + 1] = own.group_time[2 * g + 1], e
        if size > 2:
            word = word_at(words + topk_group + j, token, trial, TOKEN, key[0], key[1])
            own.next_time[j] = min(fma(exponential(word), own.group_gap[g], own.group_time[2 * g + 1]), LATE)
    _add_arrivals(token, trial, key, size, topk_group, n_slots, words + 2 * topk_group, weight, gap, alias, own)
    for k in range(1, n_slots):  # by time, equals as they are
        time, expert, place = own.time[k], own.expert[k], k
        while place > 0 and own.time[place - 1] > time:
            own.time[place], own.expert[place] = own.time[place - 1], own.expert[place - 1]
            place -= 1
        own.time[place], own.expert[place] = time, expert
