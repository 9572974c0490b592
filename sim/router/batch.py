"""Working arrays of a batch of tokens, tokens last, so that loops over them vectorise."""

from typing import NamedTuple

import numpy as np

from sim.kernels import kernel

BATCH = 512
"""Tokens that are worked together: calls cost about 15 microseconds a batch, and the arrays stay in the second cache."""
LATE = np.float32(3e38)
"""The latest arrival, before infinity: nobody left to arrive."""


class Batch(NamedTuple):
    """Working arrays of up to BATCH tokens. Kept groups are numbered by place, 0 .. topk_group - 1."""

    words: np.ndarray  # uint32 [words per token, tokens]
    factor: np.ndarray  # float32 [n_group, tokens], the group effect (a row more when n_group is odd)
    mark: np.ndarray  # int32 [n_group, tokens], first expert to arrive
    time_1: np.ndarray  # float32 [n_group, tokens], its time
    time_2: np.ndarray  # float32 [n_group, tokens], time of the second distinct expert
    score: np.ndarray  # float32 [n_group, tokens]
    rank: np.ndarray  # int32 [n_group, tokens]
    kept: np.ndarray  # int32 [topk_group + 1, tokens], the kept groups (the last place is scratch)
    next_time: np.ndarray  # float32 [topk_group, tokens], next arrival of each kept group
    left: np.ndarray  # float32 [topk_group, tokens], weight that has not arrived; negative before the first arrival
    chosen: np.ndarray  # int32 [top_k, tokens], experts, best first
    # of the kept group whose arrival is next, all [tokens]
    place: np.ndarray  # int32
    group: np.ndarray  # int32
    now: np.ndarray  # float32, time of that arrival
    before: np.ndarray  # float32, weight left before it, negative if it is the group's first
    rest: np.ndarray  # float32, weight left after it
    repeated: np.ndarray  # bool, whether its mark is an expert that the token has already
    mark_now: np.ndarray  # int32, the group's first mark
    others: np.ndarray  # float32, of the expert that arrives
    weight: np.ndarray  # float32, of the expert that arrives
    factor_now: np.ndarray  # float32
    second: np.ndarray  # float32, time of the group's second arrival


@kernel
def new_batch(n_words, n_group, topk_group, top_k):
    """Unfilled arrays."""
    return Batch(
        np.empty((n_words, BATCH), np.uint32),
        np.empty((n_group + n_group % 2, BATCH), np.float32),
        np.empty((n_group, BATCH), np.int32),
        np.empty((n_group, BATCH), np.float32),
        np.empty((n_group, BATCH), np.float32),
        np.empty((n_group, BATCH), np.float32),
        np.empty((n_group, BATCH), np.int32),
        np.zeros((topk_group + 1, BATCH), np.int32),
        np.empty((topk_group, BATCH), np.float32),
        np.empty((topk_group, BATCH), np.float32),
        np.empty((top_k, BATCH), np.int32),
        np.empty(BATCH, np.int32),
        np.zeros(BATCH, np.int32),
        np.empty(BATCH, np.float32),
        np.empty(BATCH, np.float32),
        np.empty(BATCH, np.float32),
        np.empty(BATCH, np.bool_),
        np.empty(BATCH, np.int32),
        np.empty(BATCH, np.float32),
        np.empty(BATCH, np.float32),
        np.empty(BATCH, np.float32),
        np.empty(BATCH, np.float32),
    )


@kernel
def gather(n, table, index, out):
    """out[i] = table[index[i]]: apart from arithmetic, since a gather keeps the compiler from vectorising a loop."""
    for i in range(n):
        out[i] = table[np.uint32(index[i])]


@kernel
def gather_group(n, table, group, out):
    """out[i] = table[group[i], i]."""
    for i in range(n):
        out[i] = table[np.uint32(group[i]), i]
