"""Working memory of a batch of tokens: one flat array, in which a row holds one number of every token.

Rows that are worked together lie at constant distances from each other, so that the compiler sees that they do not overlap
and works eight tokens at once. Floats lie in it by their bits.
"""

from typing import NamedTuple

import numpy as np

from sim.kernels import part, small_part

BATCH = 272
"""Tokens that are worked together: the rows then stay in the second cache; no power of two, so that they spread over it."""
LATE = np.float32(3e38)
"""The latest arrival, before infinity, which is nobody left to arrive."""
NOBODY = np.uint32(0xFFFFFFFF)

# Rows of a group: first the four words of a Philox block.
MARK_WORD, TIME_WORD, SECOND_WORD, EFFECT_WORD = (row * BATCH for row in range(4))
GAP = 4 * BATCH  # mean time between its arrivals; before it is known, exp(-group effect)
FIRST_MARK = 5 * BATCH
GAP_WITHOUT = 6 * BATCH  # mean time between arrivals other than the first expert, without the group effect
FIRST_TIME, SECOND_TIME = 7 * BATCH, 8 * BATCH
SCORE, RANK = 9 * BATCH, 10 * BATCH
GROUP_SIZE = 11 * BATCH

# Rows of a place: two experts, and the kept group (if any) that gave them.
TIME, EXPERT = 0, 2 * BATCH  # of the first; the second's lie one row further
PLACE_GAP, SINCE, NEXT = 4 * BATCH, 5 * BATCH, 6 * BATCH  # its gap, its second arrival, its next arrival
GROUP = 7 * BATCH
PLACE_SIZE = 8 * BATCH

# Rows of a round: the earliest arrival that is still to come, the latest expert that a token has, whether the token takes
# the arrival; and a list of tokens, with a word of each.
NOW, NOW_GAP, NOW_GROUP, NOW_PLACE, NOW_MARK = (row * BATCH for row in range(5))
LATEST, TAKES, LISTED, LIST_WORD = 5 * BATCH, 6 * BATCH, 7 * BATCH, 8 * BATCH
ROUND_SIZE = 9 * BATCH


class Workspace(NamedTuple):
    """The array, and where in it the groups, the places, the round, and words that belong to no group begin."""

    rows: np.ndarray  # uint32, flat
    groups: int
    places: int
    round: int
    words: int
    n_places: int


@part
def new_workspace(n_group, topk_group, top_k, n_words):
    """Unfilled rows. Places are enough for two experts of each kept group and for all that a token takes."""
    n_places = max((top_k + 1) // 2, topk_group if n_group > 1 else 0)
    groups = 0
    places = groups + (n_group + n_group % 2) * GROUP_SIZE  # the effects of groups are drawn by twos
    rounds = places + n_places * PLACE_SIZE
    words = rounds + ROUND_SIZE
    rows = np.zeros(words + (n_words + 3) // 4 * 4 * BATCH, np.uint32)
    return Workspace(rows, groups, places, rounds, words, n_places)


@small_part
def whole(rows, at, i):
    """Number i of the row at `at`, uint32. Indices are unsigned, which spares the test for negative ones."""
    return rows[np.uint64(at) + np.uint64(i)]


@small_part
def put_whole(rows, at, i, value):
    """Set number i of the row at `at`."""
    rows[np.uint64(at) + np.uint64(i)] = np.uint32(value)


@small_part
def real(rows, at, i):
    """Number i of the row at `at`, float32."""
    return np.uint32(rows[np.uint64(at) + np.uint64(i)]).view(np.float32)


@small_part
def put_real(rows, at, i, value):
    """Set number i of the row at `at`."""
    rows[np.uint64(at) + np.uint64(i)] = np.float32(value).view(np.uint32)
