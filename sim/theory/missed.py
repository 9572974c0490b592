"""Idle ranks under uniform traffic, from the sets of ranks that all tokens of a step may miss."""

from collections import Counter, defaultdict
from fractions import Fraction
from functools import lru_cache
from math import comb, prod

import numpy as np

from sim.theory.sums import TINY
from sim.theory.uniform import UniformRouter

_MOST_CLASSES = 6_000  # of sets of ranks, that bounds are added up over
_MOST_EXACT = 50  # classes for inclusion and exclusion, in long integers
_BITS = 1536  # of these: what cancels is some 2**256, what is left is above 1e-300

Classes = Counter[tuple[int, tuple[int, ...]]]  # sets of ranks by their number and the experts of each group in them


def missed_sets(held: np.ndarray) -> list[dict[tuple[int, ...], int]] | None:
    """Sets of j ranks, j = 0 .. ranks, by the experts of each group that they hold together: counts of sets by held
    experts (falling, without zeros; the order of groups does not matter). None if there are too many classes.

    Ranks and groups that have nothing to do with each other are worked apart, which keeps the classes few.
    """
    together: Classes = Counter({(0, ()): 1})
    for part in _components(held):
        of_part: dict[tuple[int, tuple[int, ...]], int] = {(0, (0,) * part.shape[1]): 1}
        for rank in part.tolist():
            more = defaultdict(int, of_part)
            for (j, experts), n in of_part.items():
                more[j + 1, tuple(map(sum, zip(experts, rank, strict=True)))] += n
            of_part = more
            if len(of_part) > _MOST_CLASSES:
                return None
        classes: Classes = Counter()
        for (j, experts), n in of_part.items():
            classes[j, _falling(experts)] += n
        joined: Classes = Counter()
        for (i, some), n in together.items():
            for (j, others), m in classes.items():
                joined[i + j, _falling(some + others)] += n * m
        together = joined
        if len(together) > _MOST_CLASSES:
            return None
    sets: list[dict[tuple[int, ...], int]] = [{} for _ in range(len(held) + 1)]
    for (j, experts), n in together.items():
        sets[j][experts] = n
    return sets


def _falling(counts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted((c for c in counts if c), reverse=True))


def _components(held: np.ndarray) -> list[np.ndarray]:
    """Parts of held [ranks, groups] that share neither a rank nor a group."""
    group_of = list(range(held.shape[1]))  # the lowest group of each group's part
    for rank in held:
        joined = {group_of[g] for g in np.flatnonzero(rank)}
        group_of = [min(joined) if g in joined else g for g in group_of]
    parts = []
    for first in sorted(set(group_of)):
        groups = [g for g, of in enumerate(group_of) if of == first]
        ranks = held[:, groups].any(axis=1)
        if ranks.any():
            parts.append(held[ranks][:, groups])
    return parts


def probability_of_idle(
    router: UniformRouter, sets: list[dict[tuple[int, ...], int]], n_tokens: int, least: int
) -> tuple[float, float]:
    """P(at least `least` ranks are missed by all tokens): (lower bound, upper bound), equal where few classes allow the
    whole of inclusion and exclusion; else its first two terms (Bonferroni).
    """
    if sum(map(len, sets)) <= _MOST_EXACT:
        terms = [
            (-1) ** (j - least) * comb(j - 1, least - 1) * _all_miss_exactly(router, sets[j], n_tokens)
            for j in range(least, len(sets))
        ]
        p = float(Fraction(sum(terms), 1 << _BITS))
        p = max(p, TINY) if sum(terms) > 0 else 0.0
        return p, p
    first = _all_miss(router, sets[least], n_tokens)
    second = _all_miss(router, sets[least + 1], n_tokens) if least + 1 < len(sets) else 0.0
    return max(first - least * second, 0.0), min(first, 1.0)


def _all_miss(router: UniformRouter, sets: dict[tuple[int, ...], int], n_tokens: int) -> float:
    """Sum over sets of P(all tokens miss the set)."""
    missed = ((router.misses(experts), n) for experts, n in sets.items())
    return float(sum(n * max(p**n_tokens, TINY) for p, n in missed if p > 0))


def _all_miss_exactly(router: UniformRouter, sets: dict[tuple[int, ...], int], n_tokens: int) -> int:
    """Sum over sets of P(all tokens miss the set), in units of 2**-_BITS: alternating sums of it lose no digits."""
    total = 0
    for experts, n in sets.items():
        power, base, left = 1 << _BITS, _misses_exactly(router, experts), n_tokens
        while left:
            if left & 1:
                power = power * base >> _BITS
            base = base * base >> _BITS
            left >>= 1
        total += n * power
    return total


@lru_cache(maxsize=4096)
def _misses_exactly(router: UniformRouter, experts: tuple[int, ...]) -> int:
    """P(a token misses these experts), the router's probabilities taken as they are, in units of 2**-_BITS."""
    others = [[comb(router.group_size - h, c) for c in range(router.top_k + 1)] for h in experts]
    return sum(
        weight * prod(ways[c] for ways, c in zip(others, row, strict=True))
        for row, weight in _weights(router, len(experts))
    )


@lru_cache(maxsize=64)
def _weights(router: UniformRouter, n: int) -> list[tuple[list[int], int]]:
    """Counts in n groups with the probability of each set of such experts, in units of 2**-_BITS."""
    sizes = [comb(router.group_size, c) for c in range(router.top_k + 1)]
    weights = []
    for row, p in zip(*(part.tolist() for part in router.marginal(n)), strict=True):
        numerator, denominator = p.as_integer_ratio()
        weights.append((row, (numerator << _BITS) // (denominator * prod(sizes[c] for c in row))))
    return weights
