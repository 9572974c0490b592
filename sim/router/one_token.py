"""The experts of one token at a time: what the batches of `sim.router.sampler` give, bit for bit, for a GPU's threads.

Each step does the same operations on the same words as the batches do; only what is kept of them differs. Every float
operation is one that a GPU rounds as a CPU does (IEEE 754): no product is left that a compiler could fuse with a sum, and
division and square root are the exact ones.
"""

from typing import NamedTuple

import numpy as np

from sim.kernels import kernel
from sim.router.arrivals import REDRAWS, ROUNDS, SCAN, TRIES
from sim.router.tables import draw_mark
from sim.router.workspace import LATE
from sim.streams import TOKEN, exp32, exponential, fma, normal_pair, philox, word_at

_NOBODY = np.int32(-1)
_INFINITE, _ONE, _ZERO = np.float32(np.inf), np.float32(1), np.float32(0)


class Token(NamedTuple):
    """Room for what is known of a token. Group g is in row g, place j (a kept group, best first) in row j."""

    score: np.ndarray  # float32 [n_group]
    group_gap: np.ndarray  # float32 [n_group]
    first_time: np.ndarray  # float32 [n_group], of its first arrival
    second_time: np.ndarray  # float32 [n_group]
    next_time: np.ndarray  # float32 [topk_group], next arrival of each place
    time: np.ndarray  # float32 [places], of the token's experts
    mark: np.ndarray  # int32 [n_group], expert of the first arrival
    group: np.ndarray  # int32 [topk_group], the kept groups
    expert: np.ndarray  # int32 [places]


def token_room(n_group: int, topk_group: int, top_k: int) -> list[int]:
    """Lengths of the arrays of `Token`."""
    if n_group == 1:
        return [0, 0, 0, 0, 0, 0, 0, 0, top_k]
    places = 2 * max((top_k + 1) // 2, topk_group)
    return [n_group, n_group, n_group, n_group, topk_group, places, n_group, topk_group, places]


@kernel
def _is_among(e, expert, first, k):
    found = False
    for j in range(first, k):
        found |= expert[j] == e
    return found


@kernel
def _draw_other(token, trial, k0, k1, group, size, alias, weight, expert, first, k):
    """The k-th expert of a token drawn again until it is none of the experts first .. k - 1."""
    for tries in range(TRIES):
        word = word_at(REDRAWS + 2 * TRIES * k + tries, token, trial, TOKEN, k0, k1)
        e = np.int32(draw_mark(word, group, size, alias))
        if not _is_among(e, expert, first, k):
            return e
    word = word_at(REDRAWS + 2 * TRIES * k + TRIES, token, trial, TOKEN, k0, k1)
    lo, total = group * size, 0.0
    for e in range(lo, lo + size):
        if not _is_among(e, expert, first, k):
            total += weight[e]
    target, last = max((np.float64(word) + 0.5) * 2.0**-32 * total, 0.0), -1  # max: a product that is not fused
    for e in range(lo, lo + size):
        if not _is_among(e, expert, first, k) and (last < 0 or weight[e] > 0.0):
            last = e
            target -= weight[e]
            if target < 0.0:
                break
    return np.int32(last)


@kernel(forceinline=True)
def _enter_group(g, w_0, w_1, w_2, effect, size, score_law, gap, gap_without, alias, own):
    """Gap, first two arrivals and score of a group."""
    b, a, both = score_law
    e = draw_mark(w_0, g, size, alias)
    group_gap = gap[g] * effect
    first = min(exponential(w_1) * group_gap, LATE)
    last = _INFINITE if size == 1 else LATE
    second = min(fma(exponential(w_2) * gap_without[e], effect, first), last)
    score = _ONE / fma(a, first, b)
    if both > _ZERO:
        score = score + _ONE / fma(a, second, b)
    own.group_gap[g], own.mark[g], own.score[g] = group_gap, np.int32(e), score
    own.first_time[g], own.second_time[g] = first, second


@kernel
def _score_groups(token, trial, k0, k1, n_group, size, sigma, score_law, gap, gap_without, alias, own):
    """The groups, by twos, since their effects are drawn so."""
    for g in range(0, n_group, 2):
        a_0, a_1, a_2, a_3 = philox(np.uint64(g), token, trial, TOKEN, k0, k1)
        b_0, b_1, b_2, b_3 = philox(np.uint64(g + 1), token, trial, TOKEN, k0, k1)
        effect, effect_1 = _ONE, _ONE
        if sigma != _ZERO:
            z_0, z_1 = normal_pair(np.uint32(a_3), np.uint32(b_3))
            effect, effect_1 = exp32(-sigma * z_0), exp32(-sigma * z_1)
        _enter_group(
            g, np.uint32(a_0), np.uint32(a_1), np.uint32(a_2), effect, size, score_law, gap, gap_without, alias, own
        )
        if g + 1 < n_group:
            _enter_group(
                g + 1, np.uint32(b_0), np.uint32(b_1), np.uint32(b_2), effect_1, size, score_law, gap, gap_without,
                alias, own,
            )  # fmt: skip


@kernel
def _keep_groups(n_group, topk_group, own):
    """The topk_group best groups, best first, ties to the lowest."""
    for g in range(n_group):
        score, rank = own.score[g], 0
        for h in range(n_group):
            other = own.score[h]
            rank += (other > score) | ((other == score) & (h < g))
        if rank < topk_group:
            own.group[rank] = g


@kernel(forceinline=True)
def _lane(lane, a, b, c, d):
    """One of the four words of a block."""
    low, high = (a if lane == 0 else b), (c if lane == 2 else d)
    return np.uint32(low if lane < 2 else high)


@kernel
def _begin_places(token, trial, k0, k1, size, block, topk_group, n_slots, weight, alias, own):
    """First two experts, and next arrival, of each kept group; words from Philox block `block` on."""
    for k in range(2 * topk_group, n_slots):
        own.time[k], own.expert[k] = _INFINITE, _NOBODY
    a_0 = a_1 = a_2 = a_3 = b_0 = b_1 = b_2 = b_3 = np.uint64(0)
    for j in range(topk_group):
        g, at = np.int64(own.group[j]), topk_group + j
        if j % 4 == 0:
            a_0, a_1, a_2, a_3 = philox(np.uint64(block + j // 4), token, trial, TOKEN, k0, k1)
        if j == 0 or at % 4 == 0:
            b_0, b_1, b_2, b_3 = philox(np.uint64(block + at // 4), token, trial, TOKEN, k0, k1)
        second, mark = own.second_time[g], own.mark[g]
        e = _NOBODY
        if size > 1:
            e = np.int32(draw_mark(_lane(j % 4, a_0, a_1, a_2, a_3), g, size, alias))
        own.time[2 * j], own.time[2 * j + 1] = own.first_time[g], second if size > 1 else _INFINITE
        own.expert[2 * j], own.expert[2 * j + 1] = mark, e
        later = min(fma(exponential(_lane(at % 4, b_0, b_1, b_2, b_3)), own.group_gap[g], second), LATE)
        own.next_time[j] = later if size > 2 else _INFINITE
    for j in range(topk_group):
        if own.expert[2 * j] == own.expert[2 * j + 1]:
            own.expert[2 * j + 1] = _draw_other(
                token, trial, k0, k1, np.int64(own.group[j]), size, alias, weight, own.expert, 2 * j, 2 * j + 1
            )


@kernel
def _latest(time, n):
    where = 0
    for k in range(1, n):
        if time[k] > time[where]:
            where = k
    return where


@kernel
def _draw_rest(token, trial, k0, k1, size, now, topk_group, n_slots, weight, gap, own):
    """What is left of the arrivals after `now`, one of each expert that the token has not taken."""
    for j in range(topk_group):
        g = np.int64(own.group[j])
        since = np.float64(max(now, own.second_time[g]))
        of_weight_1 = np.float64(own.group_gap[g]) / np.float64(gap[g])
        for e in range(g * size, (g + 1) * size):
            if not _is_among(e, own.expert, 0, n_slots):
                word = word_at(SCAN + e, token, trial, TOKEN, k0, k1)
                between = np.float64(exponential(word)) * of_weight_1 / max(weight[e], 1e-300)
                arrival = np.float32(min(since + between, np.float64(LATE)))
                where = _latest(own.time, n_slots)
                if arrival < own.time[where]:
                    own.time[where], own.expert[where] = arrival, np.int32(e)


@kernel
def _add_arrivals(token, trial, k0, k1, size, topk_group, n_slots, at, weight, gap, alias, own):
    """Later arrivals, until the next is later than the latest expert; their words from index `at` on."""
    finish = (at + 2 * ROUNDS + 3) // 4 * 4  # words of arrivals past the rounds begin with a block
    n_repeats, arrival, index = 0, 0, at
    a = b = c = d = np.uint64(0)
    while True:
        if arrival == ROUNDS:
            index = finish
        if arrival == 0 or index % 4 == 0:
            a, b, c, d = philox(np.uint64(index // 4), token, trial, TOKEN, k0, k1)
        is_first = index % 4 == 0
        place, now = 0, own.next_time[0]
        for j in range(1, topk_group):
            time = own.next_time[j]
            place, now = (j, time) if time < now else (place, now)
        g = np.int64(own.group[place])
        e = np.int32(draw_mark(np.uint32(a if is_first else c), g, size, alias))
        where, latest, repeats = 0, own.time[0], own.expert[0] == e
        for k in range(1, n_slots):
            time = own.time[k]
            where, latest = (k, time) if time > latest else (where, latest)
            repeats |= own.expert[k] == e
        if not now < latest:
            return
        if not repeats:
            own.time[where], own.expert[where] = now, e
        elif arrival >= ROUNDS:
            n_repeats += 1
            if n_repeats == TRIES:
                _draw_rest(token, trial, k0, k1, size, now, topk_group, n_slots, weight, gap, own)
                return
        gap_to_next = exponential(np.uint32(b if is_first else d))
        own.next_time[place] = min(fma(gap_to_next, own.group_gap[g], now), LATE)
        arrival += 1
        index += 2


@kernel
def sort_token(n, own):
    """Sort n experts of a token by time, equals as they are: best first."""
    for k in range(1, n):
        time, expert, place = own.time[k], own.expert[k], k
        while place > 0 and own.time[place - 1] > time:
            own.time[place], own.expert[place] = own.time[place - 1], own.expert[place - 1]
            place -= 1
        own.time[place], own.expert[place] = time, expert


@kernel
def route_token(token, trial, k0, k1, topk_group, top_k, sigma, score_law, weight, gap, gap_without, alias, own):
    """Experts of a token into own.expert[:top_k], of a grouped router in any order.

    token, trial uint64; k0, k1 uint64, the key; sigma float32; score_law float32 (b, a, both), as a tuple; the tables as in
    `sim.router.tables.Layer`.
    """
    n_group = gap.size
    size = alias.size // n_group
    if n_group == 1:
        a = b = c = d = np.uint64(0)
        for k in range(top_k):
            if k % 4 == 0:
                a, b, c, d = philox(np.uint64(k // 4), token, trial, TOKEN, k0, k1)
            e = np.int32(draw_mark(_lane(k % 4, a, b, c, d), 0, size, alias))
            if _is_among(e, own.expert, 0, k):
                e = _draw_other(token, trial, k0, k1, 0, size, alias, weight, own.expert, 0, k)
            own.expert[k] = e
        return
    _score_groups(token, trial, k0, k1, n_group, size, sigma, score_law, gap, gap_without, alias, own)
    _keep_groups(n_group, topk_group, own)
    n_slots = own.expert.size
    block = n_group + n_group % 2
    _begin_places(token, trial, k0, k1, size, block, topk_group, n_slots, weight, alias, own)
    _add_arrivals(
        token, trial, k0, k1, size, topk_group, n_slots, 4 * block + 2 * topk_group, weight, gap, alias, own
    )
    if n_slots > top_k:
        sort_token(n_slots, own)
