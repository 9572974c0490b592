"""The busiest rank of a single token under uniform traffic, in closed form."""

from itertools import product
from math import comb, prod

import numpy as np

from sim.theory.uniform import UniformRouter

Choices = dict[tuple[tuple[int, ...], bytes, bytes], tuple[float, list[list[int]], list[int]]]


def choices_of_groups(router: UniformRouter, held: np.ndarray) -> Choices:
    """How a token's experts may spread over groups, choices that look alike to the ranks taken together.

    held int [ranks, groups]. Keys begin with the experts taken of each used group; values are the probability of each set
    of such experts, and the distinct rows of `held` in the used groups with how many ranks have each.
    """
    choices: Choices = {}
    columns = [column.tolist() for column in held.T]
    looks: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}
    for counts, probability in zip(router.counts.tolist(), router.probability.tolist(), strict=True):
        used = tuple(sorted((g for g, c in enumerate(counts) if c), key=lambda g: (-counts[g], columns[g])))
        if used not in looks:
            looks[used] = np.unique(held[:, used], axis=0, return_counts=True)
        rows, times = looks[used]
        taken = tuple(counts[g] for g in used)
        key = (taken, rows.tobytes(), times.tobytes())
        of_a_set = probability / prod(comb(router.group_size, c) for c in taken)
        choices[key] = (choices[key][0] + of_a_set if key in choices else of_a_set, rows.tolist(), times.tolist())
    return choices


def most_on_one_rank(choices: Choices, least: int) -> float:
    """P(some rank has at least `least` of a token's experts).

    Given how many experts a token takes of each group, the sets with fewer than `least` on every rank are counted by the
    product over ranks of the polynomial of what a rank may give.
    """
    fewer = sum(p * _sets_with_fewer(key[0], rows, times, least) for key, (p, rows, times) in choices.items())
    return min(max(1.0 - fewer, 0.0), 1.0)


def _sets_with_fewer(taken: tuple[int, ...], rows: list[list[int]], times: list[int], least: int) -> float:
    shape = tuple(c + 1 for c in taken)
    ways = np.zeros(shape)
    ways[(0,) * len(taken)] = 1
    for row, n in zip(rows, times, strict=True):
        of_rank = np.zeros(shape)
        for take in product(*(range(min(c, h) + 1) for c, h in zip(taken, row, strict=True))):
            if sum(take) < least:
                of_rank[take] = prod(comb(h, t) for h, t in zip(row, take, strict=True))
        while n:
            if n & 1:
                ways = _multiply(ways, of_rank)
            of_rank = _multiply(of_rank, of_rank) if n > 1 else of_rank
            n >>= 1
    return float(ways[taken])


def _multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Product of two polynomials, cut off at their shape."""
    out = np.zeros_like(a)
    for at in zip(*np.nonzero(b), strict=True):
        low = tuple(slice(i, None) for i in at)
        high = tuple(slice(None, n - i) for i, n in zip(at, a.shape, strict=True))
        out[low] += b[at] * a[high]
    return out
