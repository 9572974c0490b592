"""The experts of one token at a time: how a batch finishes the few tokens that need more arrivals, and how a GPU's thread routes
a token from the start, with the same experts as the batches of `sim.router.sampler`, bit for bit.

Every float operation is one that a GPU rounds as a CPU does (IEEE 754): no product is left that a compiler could fuse with a
sum, and division and square root are the exact ones.
"""

from typing import NamedTuple

import numpy as np

from sim.kernels import kernel
from sim.router import workspace as row
from sim.router.tables import draw_mark
from sim.router.workspace import BATCH, LATE
from sim.streams import TOKEN, exp32, exponential, fma, normal_pair, philox, word_at

ROUNDS = 3
"""Arrivals that all tokens of a batch are taken through together; the few that need more are finished one by one."""
TRIES = 16
"""Repeated marks before an exact scan; each try is an independent draw, so stopping does not bias."""
REDRAWS, _SCAN = 2**20, 2**24  # words from here on: of marks drawn again, and of scans

# Numbers of a place, in the order of the rows of `sim.router.workspace`: two times and two experts, then those of its group.
_EXPERT, _GAP, _SINCE, _NEXT, _GROUP, _PLACE = (
    at // BATCH for at in (row.EXPERT, row.PLACE_GAP, row.SINCE, row.NEXT, row.GROUP, row.PLACE_SIZE)
)
_NOBODY = np.int32(-1)
_INFINITE, _ONE, _ZERO = np.float32(np.inf), np.float32(1), np.float32(0)
_0 = np.int64(0)  # typed: a literal would compile what it is given to twice


class Address(NamedTuple):
    """Where the words of a token lie, uint64."""

    token: np.uint64
    trial: np.uint64
    k0: np.uint64
    k1: np.uint64


class Token(NamedTuple):
    """Room for what is known of a token: numbers of groups, and of places (a kept group, best first, and two experts).

    Number n lies at `at` + n * `stride`: in a batch a row is a number of every token, and the threads of a GPU's block share two
    arrays without getting in each other's way (which may be one memory: no number is in both).
    """

    real: np.ndarray  # float32
    whole: np.ndarray  # int32: experts, and groups of places
    at: np.uint32
    stride: np.uint32
    places: np.uint32  # where they begin
    n_slots: np.uint32  # experts that there is room for


def new_token(n_group: int, topk_group: int, top_k: int) -> Token:
    """Room for one token, its groups first: scores, gaps, first and second arrivals, first experts."""
    of_groups, kept = (5 * n_group, topk_group) if n_group > 1 else (0, 0)
    n_places = max((top_k + 1) // 2, kept)
    size = of_groups + n_places * _PLACE
    numbers = (np.uint32(n) for n in (0, 1, of_groups, 2 * n_places))
    return Token(np.zeros(size, np.float32), np.zeros(size, np.int32), *numbers)


@kernel(forceinline=True)
def _at(own, n):
    """Unsigned and short, which spares a GPU long arithmetic and the test for negative indices."""
    return np.uint64(np.uint32(own.at + np.uint32(n) * own.stride))


@kernel(forceinline=True)
def _real(own, n):
    return own.real[_at(own, n)]


@kernel(forceinline=True)
def _put_real(own, n, value):
    own.real[_at(own, n)] = value


@kernel(forceinline=True)
def _whole(own, n):
    return own.whole[_at(own, n)]


@kernel(forceinline=True)
def _put_whole(own, n, value):
    own.whole[_at(own, n)] = value


@kernel(forceinline=True)
def _place(own, j):
    """Where the numbers of place j begin."""
    return np.uint32(own.places + j * _PLACE)


@kernel(forceinline=True)
def _slot(own, k):
    """Number of the time of the k-th expert; the expert's own is _EXPERT further."""
    return np.uint32(_place(own, k >> 1) + (k & 1))


@kernel(forceinline=True)
def expert_of(own, k):
    """The k-th expert."""
    return _whole(own, _slot(own, k) + _EXPERT)


@kernel(forceinline=True)
def _put_expert(own, k, time, e):
    _put_real(own, _slot(own, k), time)
    _put_whole(own, _slot(own, k) + _EXPERT, e)


@kernel(forceinline=True)
def is_among(e, own, first, k):
    """Whether e is one of the experts first .. k - 1."""
    found = False
    for j in range(first, k):
        found |= expert_of(own, j) == e
    return found


@kernel(forceinline=True)
def draw_other(tries, of, group, size, layer, own, first, k):
    """The k-th expert of a token, of this group and none of the experts first .. k - 1, after so many tries."""
    index = REDRAWS + 2 * TRIES * k
    for i in range(tries, TRIES):
        e = np.int32(draw_mark(word_at(index + i, of.token, of.trial, TOKEN, of.k0, of.k1), group, size, layer.alias))
        if not is_among(e, own, first, k):
            return e
    word = word_at(index + TRIES, of.token, of.trial, TOKEN, of.k0, of.k1)
    return _scan_others(word, group, size, layer.weight, own, first, k)


@kernel
def _scan_others(word, group, size, weight, own, first, k):
    """An expert of a group, and none of the experts first .. k - 1, by cumulated weights."""
    lo, total = np.int64(group) * size, 0.0
    for e in range(lo, lo + size):
        if not is_among(np.int32(e), own, first, k):
            total += weight[e]
    target = max((np.float64(word) + 0.5) * 2.0**-32 * total, 0.0)  # max: a product that is not fused
    last = -1  # the lowest expert that is left, should all their weights be 0
    for e in range(lo, lo + size):
        if not is_among(np.int32(e), own, first, k) and (last < 0 or weight[e] > 0.0):
            last = e
            target -= weight[e]
            if target < 0.0:
                break
    return np.int32(last)


@kernel
def _draw_rest(of, topk, now, layer, own):
    """What is left of the arrivals after `now`, one of each expert that the token has not taken."""
    for j in range(topk.topk_group):
        place = _place(own, j)
        g = np.int64(_whole(own, place + _GROUP))
        since = np.float64(max(now, _real(own, place + _SINCE)))
        of_weight_1 = np.float64(_real(own, place + _GAP)) / np.float64(layer.gap[g])
        for e in range(g * topk.size, (g + 1) * topk.size):
            if not is_among(np.int32(e), own, _0, np.int64(own.n_slots)):
                word = word_at(_SCAN + e, of.token, of.trial, TOKEN, of.k0, of.k1)
                between = np.float64(exponential(word)) * of_weight_1 / max(layer.weight[e], 1e-300)
                arrival = np.float32(min(since + between, np.float64(LATE)))
                where, latest = np.uint32(0), _real(own, own.places)
                for k in range(1, own.n_slots):
                    time = _real(own, _slot(own, k))
                    where, latest = (np.uint32(k), time) if time > latest else (where, latest)
                if arrival < latest:
                    _put_expert(own, np.int64(where), arrival, np.int32(e))


@kernel
def add_arrivals(of, topk, arrival, layer, own):
    """Arrivals from number `arrival` on, until the next is later than the latest expert."""
    at = 4 * (topk.n_group + topk.n_group % 2) + 2 * topk.topk_group  # words of arrivals
    finish = (at + 2 * ROUNDS + 3) // 4 * 4  # those past the rounds begin with a block
    n_repeats, index = np.int32(0), np.uint32(at)
    a = b = c = d = np.uint64(0)
    begin = arrival
    while True:
        if arrival == ROUNDS:
            index = np.uint32(finish)
        is_first = index & np.uint32(3) == 0
        if arrival == begin or is_first:
            a, b, c, d = philox(np.uint64(index >> np.uint32(2)), of.token, of.trial, TOKEN, of.k0, of.k1)
        place, now = own.places, _real(own, own.places + _NEXT)
        for j in range(1, topk.topk_group):
            time = _real(own, _place(own, j) + _NEXT)
            place, now = (_place(own, j), time) if time < now else (place, now)
        g = np.uint32(_whole(own, place + _GROUP))
        e = np.int32(draw_mark(np.uint32(a if is_first else c), g, topk.size, layer.alias))
        where, latest, repeats = np.uint32(0), _real(own, own.places), expert_of(own, _0) == e
        for k in range(1, own.n_slots):
            time = _real(own, _slot(own, k))
            where, latest = (np.uint32(k), time) if time > latest else (where, latest)
            repeats |= expert_of(own, k) == e
        if not now < latest:
            return
        if not repeats:
            _put_expert(own, np.int64(where), now, e)
        elif arrival >= ROUNDS:
            n_repeats = np.int32(n_repeats + 1)
            if n_repeats == TRIES:
                _draw_rest(of, topk, now, layer, own)
                return
        between = exponential(np.uint32(b if is_first else d))
        gap = _real(own, place + _GAP)
        _put_real(own, place + _NEXT, min(fma(between, gap, now), LATE))
        arrival = np.int32(arrival + 1)
        index = np.uint32(index + 2)


@kernel(forceinline=True)
def _enter_group(g, w_0, w_1, w_2, effect, topk, layer, own):
    """Gap, first two arrivals, first expert and score of a group."""
    b, a, both = topk.score_law
    n_group = topk.n_group
    e = draw_mark(np.uint32(w_0), g, topk.size, layer.alias)
    group_gap = layer.gap[np.uint64(g)] * effect
    first = min(exponential(np.uint32(w_1)) * group_gap, LATE)
    last = _INFINITE if topk.size == 1 else LATE
    second = min(fma(exponential(np.uint32(w_2)) * layer.gap_without[np.uint64(e)], effect, first), last)
    score = _ONE / fma(a, first, b)
    if both > _ZERO:
        score = score + _ONE / fma(a, second, b)
    _put_real(own, g, score)
    _put_real(own, n_group + g, group_gap)
    _put_real(own, 2 * n_group + g, first)
    _put_real(own, 3 * n_group + g, second)
    _put_whole(own, 4 * n_group + g, np.int32(e))


@kernel
def _score_groups(of, topk, layer, own):
    """The groups, by twos, since their effects are drawn so."""
    for g in range(0, topk.n_group, 2):
        a_0, a_1, a_2, a_3 = philox(np.uint64(g), of.token, of.trial, TOKEN, of.k0, of.k1)
        b_0, b_1, b_2, b_3 = philox(np.uint64(g + 1), of.token, of.trial, TOKEN, of.k0, of.k1)
        effect, effect_1 = _ONE, _ONE
        if topk.group_sigma != _ZERO:
            z_0, z_1 = normal_pair(np.uint32(a_3), np.uint32(b_3))
            effect, effect_1 = exp32(-topk.group_sigma * z_0), exp32(-topk.group_sigma * z_1)
        _enter_group(g, a_0, a_1, a_2, effect, topk, layer, own)
        if g + 1 < topk.n_group:
            _enter_group(g + 1, b_0, b_1, b_2, effect_1, topk, layer, own)


@kernel
def _keep_groups(topk, own):
    """The topk_group best groups, best first, ties to the lowest."""
    for g in range(topk.n_group):
        score, rank = _real(own, g), np.int32(0)
        for h in range(topk.n_group):
            other = _real(own, h)
            rank = np.int32(rank + np.int32((other > score) | ((other == score) & (h < g))))
        if rank < topk.topk_group:
            _put_whole(own, _place(own, rank) + _GROUP, np.int32(g))


@kernel(forceinline=True)
def _lane(lane, a, b, c, d):
    """One of the four words of a block."""
    low, high = (a if lane == 0 else b), (c if lane == 2 else d)
    return np.uint32(low if lane < 2 else high)


@kernel
def _begin_places(of, topk, layer, own):
    """First two experts, and next arrival, of each kept group."""
    n_group, size, topk_group = topk.n_group, topk.size, topk.topk_group
    block = n_group + n_group % 2
    for k in range(2 * topk_group, own.n_slots):
        _put_expert(own, k, _INFINITE, _NOBODY)
    a_0 = a_1 = a_2 = a_3 = b_0 = b_1 = b_2 = b_3 = np.uint64(0)
    for j in range(topk_group):
        place, at = _place(own, j), topk_group + j
        g = np.uint32(_whole(own, place + _GROUP))
        if j % 4 == 0:
            a_0, a_1, a_2, a_3 = philox(np.uint64(block + j // 4), of.token, of.trial, TOKEN, of.k0, of.k1)
        if j == 0 or at % 4 == 0:
            b_0, b_1, b_2, b_3 = philox(np.uint64(block + at // 4), of.token, of.trial, TOKEN, of.k0, of.k1)
        gap, second, e = _real(own, n_group + g), _real(own, 3 * n_group + g), _NOBODY
        if size > 1:
            e = np.int32(draw_mark(_lane(j % 4, a_0, a_1, a_2, a_3), g, size, layer.alias))
        later = min(fma(exponential(_lane(at % 4, b_0, b_1, b_2, b_3)), gap, second), LATE)
        _put_expert(own, 2 * j, _real(own, 2 * n_group + g), _whole(own, 4 * n_group + g))
        _put_expert(own, 2 * j + 1, second if size > 1 else _INFINITE, e)
        _put_real(own, place + _GAP, gap)
        _put_real(own, place + _SINCE, second)
        _put_real(own, place + _NEXT, later if size > 2 else _INFINITE)
    for j in range(topk_group):
        if expert_of(own, 2 * j) == expert_of(own, 2 * j + 1):
            group, time = np.uint32(_whole(own, _place(own, j) + _GROUP)), _real(own, _slot(own, 2 * j + 1))
            _put_expert(own, 2 * j + 1, time, draw_other(_0, of, group, size, layer, own, 2 * j, 2 * j + 1))


@kernel
def sort_token(n, own):
    """Sort n experts of a token by time, equals as they are: best first."""
    for k in range(1, n):
        time, expert, place = _real(own, _slot(own, k)), expert_of(own, k), k
        while place > 0 and _real(own, _slot(own, place - 1)) > time:
            _put_expert(own, place, _real(own, _slot(own, place - 1)), expert_of(own, place - 1))
            place -= 1
        _put_expert(own, place, time, expert)


@kernel
def route_token(of, topk, layer, own):
    """Route a token to its first top_k experts, of a grouped router in any order: an Address, a GroupedTopk, a Layer, a Token."""
    top_k = topk.top_k
    if topk.n_group == 1:
        a = b = c = d = np.uint64(0)
        for k in range(top_k):
            if k % 4 == 0:
                a, b, c, d = philox(np.uint64(k // 4), of.token, of.trial, TOKEN, of.k0, of.k1)
            e = np.int32(draw_mark(_lane(k % 4, a, b, c, d), np.uint32(0), topk.size, layer.alias))
            if is_among(e, own, _0, k):
                e = draw_other(_0, of, np.uint32(0), topk.size, layer, own, _0, k)
            _put_expert(own, k, _ZERO, e)
        return
    _score_groups(of, topk, layer, own)
    _keep_groups(topk, own)
    _begin_places(of, topk, layer, own)
    add_arrivals(of, topk, np.int32(0), layer, own)
    if own.n_slots > top_k:
        sort_token(own.n_slots, own)
