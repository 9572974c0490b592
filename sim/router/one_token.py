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
    """Room for what is known of a token: numbers of a group g, and of a place j (a kept group, best first; or an expert).

    Number n lies at `at` + n * `stride`, so that the threads of a GPU's block share two arrays without getting in each other's
    way (which may be one memory: no number is in both).
    """

    real: (
        np.ndarray
    )  # float32: scores, gaps, first and second arrivals of groups; next arrivals of places; times of experts
    whole: np.ndarray  # int32: first experts of groups; groups of places; experts
    at: np.uint32
    stride: np.uint32
    next: np.uint32  # where these begin
    time: np.uint32
    mark: np.uint32
    group: np.uint32
    expert: np.uint32
    size: np.uint32  # of all


def new_token(n_group: int, topk_group: int, top_k: int) -> Token:
    """Room for one token."""
    if n_group == 1:
        ends = np.array([0, 0, 0, 0, 0, top_k])
    else:
        n_places = 2 * max((top_k + 1) // 2, topk_group)
        ends = np.cumsum([4 * n_group, topk_group, n_places, n_group, topk_group, n_places])
    size = int(ends[-1])
    places = (np.uint32(at) for at in (0, 1, *ends))
    return Token(np.zeros(size, np.float32), np.zeros(size, np.int32), *places)


@kernel(forceinline=True)
def _place(own, n):
    """Unsigned and short, which spares a GPU long arithmetic and the test for negative indices."""
    return np.uint64(np.uint32(own.at + np.uint32(n) * own.stride))


@kernel(forceinline=True)
def real(own, n):
    """Number n, float32."""
    return own.real[_place(own, n)]


@kernel(forceinline=True)
def put_real(own, n, value):
    """Set number n."""
    own.real[_place(own, n)] = value


@kernel(forceinline=True)
def whole(own, n):
    """Number n, int32."""
    return own.whole[_place(own, n)]


@kernel(forceinline=True)
def put_whole(own, n, value):
    """Set number n."""
    own.whole[_place(own, n)] = value


@kernel
def _is_among(e, own, first, k):
    found = False
    for j in range(first, k):
        found |= whole(own, own.expert + j) == e
    return found


@kernel
def _draw_other(token, trial, k0, k1, group, size, alias, weight, own, first, k):
    """The k-th expert of a token drawn again until it is none of the experts first .. k - 1."""
    for tries in range(TRIES):
        word = word_at(REDRAWS + 2 * TRIES * k + tries, token, trial, TOKEN, k0, k1)
        e = np.int32(draw_mark(word, group, size, alias))
        if not _is_among(e, own, first, k):
            return e
    word = word_at(REDRAWS + 2 * TRIES * k + TRIES, token, trial, TOKEN, k0, k1)
    lo, total = np.int64(group) * size, 0.0
    for e in range(lo, lo + size):
        if not _is_among(e, own, first, k):
            total += weight[e]
    target, last = max((np.float64(word) + 0.5) * 2.0**-32 * total, 0.0), -1  # max: a product that is not fused
    for e in range(lo, lo + size):
        if not _is_among(e, own, first, k) and (last < 0 or weight[e] > 0.0):
            last = e
            target -= weight[e]
            if target < 0.0:
                break
    return np.int32(last)


@kernel(forceinline=True)
def _enter_group(g, n_group, w_0, w_1, w_2, effect, size, score_law, gap, gap_without, alias, own):
    """Gap, first two arrivals and score of a group."""
    b, a, both = score_law
    e = draw_mark(w_0, g, size, alias)
    group_gap = gap[np.uint64(g)] * effect
    first = min(exponential(w_1) * group_gap, LATE)
    last = _INFINITE if size == 1 else LATE
    second = min(fma(exponential(w_2) * gap_without[np.uint64(e)], effect, first), last)
    score = _ONE / fma(a, first, b)
    if both > _ZERO:
        score = score + _ONE / fma(a, second, b)
    put_real(own, g, score)
    put_real(own, n_group + g, group_gap)
    put_real(own, 2 * n_group + g, first)
    put_real(own, 3 * n_group + g, second)
    put_whole(own, own.mark + g, np.int32(e))


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
            g, n_group, np.uint32(a_0), np.uint32(a_1), np.uint32(a_2), effect, size, score_law, gap, gap_without,
            alias, own,
        )  # fmt: skip
        if g + 1 < n_group:
            _enter_group(
                g + 1, n_group, np.uint32(b_0), np.uint32(b_1), np.uint32(b_2), effect_1, size, score_law, gap,
                gap_without, alias, own,
            )  # fmt: skip


@kernel
def _keep_groups(n_group, topk_group, own):
    """The topk_group best groups, best first, ties to the lowest."""
    for g in range(n_group):
        score, rank = real(own, g), np.int32(0)
        for h in range(n_group):
            other = real(own, h)
            rank = np.int32(rank + np.int32((other > score) | ((other == score) & (h < g))))
        if rank < topk_group:
            put_whole(own, own.group + rank, np.int32(g))


@kernel(forceinline=True)
def _lane(lane, a, b, c, d):
    """One of the four words of a block."""
    low, high = (a if lane == 0 else b), (c if lane == 2 else d)
    return np.uint32(low if lane < 2 else high)


@kernel
def _begin_places(token, trial, k0, k1, n_group, size, block, topk_group, n_slots, weight, alias, own):
    """First two experts, and next arrival, of each kept group; words from Philox block `block` on."""
    for k in range(2 * topk_group, n_slots):
        put_real(own, own.time + k, _INFINITE)
        put_whole(own, own.expert + k, _NOBODY)
    a_0 = a_1 = a_2 = a_3 = b_0 = b_1 = b_2 = b_3 = np.uint64(0)
    for j in range(topk_group):
        g, at = np.uint32(whole(own, own.group + j)), topk_group + j
        if j % 4 == 0:
            a_0, a_1, a_2, a_3 = philox(np.uint64(block + j // 4), token, trial, TOKEN, k0, k1)
        if j == 0 or at % 4 == 0:
            b_0, b_1, b_2, b_3 = philox(np.uint64(block + at // 4), token, trial, TOKEN, k0, k1)
        second, e = real(own, 3 * n_group + g), _NOBODY
        if size > 1:
            e = np.int32(draw_mark(_lane(j % 4, a_0, a_1, a_2, a_3), g, size, alias))
        put_real(own, own.time + 2 * j, real(own, 2 * n_group + g))
        put_real(own, own.time + 2 * j + 1, second if size > 1 else _INFINITE)
        put_whole(own, own.expert + 2 * j, whole(own, own.mark + g))
        put_whole(own, own.expert + 2 * j + 1, e)
        later = min(fma(exponential(_lane(at % 4, b_0, b_1, b_2, b_3)), real(own, n_group + g), second), LATE)
        put_real(own, own.next + j, later if size > 2 else _INFINITE)
    for j in range(topk_group):
        if whole(own, own.expert + 2 * j) == whole(own, own.expert + 2 * j + 1):
            group = np.uint32(whole(own, own.group + j))
            e = _draw_other(token, trial, k0, k1, group, size, alias, weight, own, 2 * j, 2 * j + 1)
            put_whole(own, own.expert + 2 * j + 1, e)


@kernel
def _draw_rest(token, trial, k0, k1, n_group, size, now, topk_group, n_slots, weight, gap, own):
    """What is left of the arrivals after `now`, one of each expert that the token has not taken."""
    for j in range(topk_group):
        g = np.int64(whole(own, own.group + j))
        since = np.float64(max(now, real(own, 3 * n_group + g)))
        of_weight_1 = np.float64(real(own, n_group + g)) / np.float64(gap[g])
        for e in range(g * size, (g + 1) * size):
            if not _is_among(e, own, 0, n_slots):
                word = word_at(SCAN + e, token, trial, TOKEN, k0, k1)
                between = np.float64(exponential(word)) * of_weight_1 / max(weight[e], 1e-300)
                arrival = np.float32(min(since + between, np.float64(LATE)))
                where, latest = 0, real(own, own.time)
                for k in range(1, n_slots):
                    time = real(own, own.time + k)
                    where, latest = (k, time) if time > latest else (where, latest)
                if arrival < latest:
                    put_real(own, own.time + where, arrival)
                    put_whole(own, own.expert + where, np.int32(e))


@kernel
def _add_arrivals(token, trial, k0, k1, n_group, size, topk_group, n_slots, at, weight, gap, alias, own):
    """Later arrivals, until the next is later than the latest expert; their words from index `at` on."""
    finish = (at + 2 * ROUNDS + 3) // 4 * 4  # words of arrivals past the rounds begin with a block
    n_repeats, arrival, index = np.int32(0), np.int32(0), np.uint32(at)
    a = b = c = d = np.uint64(0)
    while True:
        if arrival == ROUNDS:
            index = np.uint32(finish)
        is_first = index & np.uint32(3) == 0
        if arrival == 0 or is_first:
            a, b, c, d = philox(np.uint64(index >> np.uint32(2)), token, trial, TOKEN, k0, k1)
        place, now = np.uint32(0), real(own, own.next)
        for j in range(1, topk_group):
            time = real(own, own.next + j)
            place, now = (np.uint32(j), time) if time < now else (place, now)
        g = np.uint32(whole(own, own.group + place))
        e = np.int32(draw_mark(np.uint32(a if is_first else c), g, size, alias))
        where, latest, repeats = np.uint32(0), real(own, own.time), whole(own, own.expert) == e
        for k in range(1, n_slots):
            time = real(own, own.time + k)
            where, latest = (np.uint32(k), time) if time > latest else (where, latest)
            repeats |= whole(own, own.expert + k) == e
        if not now < latest:
            return
        if not repeats:
            put_real(own, own.time + where, now)
            put_whole(own, own.expert + where, e)
        elif arrival >= ROUNDS:
            n_repeats = np.int32(n_repeats + 1)
            if n_repeats == TRIES:
                _draw_rest(token, trial, k0, k1, n_group, size, now, topk_group, n_slots, weight, gap, own)
                return
        between = exponential(np.uint32(b if is_first else d))
        put_real(own, own.next + place, min(fma(between, real(own, n_group + g), now), LATE))
        arrival = np.int32(arrival + 1)
        index = np.uint32(index + 2)


@kernel
def sort_token(n, own):
    """Sort n experts of a token by time, equals as they are: best first."""
    for k in range(1, n):
        time, expert, place = real(own, own.time + k), whole(own, own.expert + k), k
        while place > 0 and real(own, own.time + place - 1) > time:
            put_real(own, own.time + place, real(own, own.time + place - 1))
            put_whole(own, own.expert + place, whole(own, own.expert + place - 1))
            place -= 1
        put_real(own, own.time + place, time)
        put_whole(own, own.expert + place, expert)


@kernel
def route_token(
    token, trial, k0, k1, n_group, size, topk_group, top_k, sigma, score_law, weight, gap, gap_without, alias, own
):
    """Experts of a token into the first top_k numbers from `own.expert` on, of a grouped router in any order.

    token, trial uint64; k0, k1 uint64, the key; size is that of a group; sigma float32; score_law float32 (b, a, both), as a
    tuple; the tables as in `sim.router.tables.Layer`.
    """
    if n_group == 1:
        a = b = c = d = np.uint64(0)
        for k in range(top_k):
            if k % 4 == 0:
                a, b, c, d = philox(np.uint64(k // 4), token, trial, TOKEN, k0, k1)
            e = np.int32(draw_mark(_lane(k % 4, a, b, c, d), np.uint32(0), size, alias))
            if _is_among(e, own, 0, k):
                e = _draw_other(token, trial, k0, k1, np.uint32(0), size, alias, weight, own, 0, k)
            put_whole(own, own.expert + k, e)
        return
    _score_groups(token, trial, k0, k1, n_group, size, sigma, score_law, gap, gap_without, alias, own)
    _keep_groups(n_group, topk_group, own)
    block, n_slots = n_group + n_group % 2, np.int64(own.size) - np.int64(own.expert)
    _begin_places(token, trial, k0, k1, n_group, size, block, topk_group, n_slots, weight, alias, own)
    at = 4 * block + 2 * topk_group
    _add_arrivals(token, trial, k0, k1, n_group, size, topk_group, n_slots, at, weight, gap, alias, own)
    if n_slots > top_k:
        sort_token(n_slots, own)
