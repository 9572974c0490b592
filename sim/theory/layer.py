"""A placed layer under uniform traffic: the busiest rank, idle ranks and the one-rank event, exactly or between bounds."""

from collections import Counter, defaultdict
from fractions import Fraction
from functools import cached_property, lru_cache, reduce
from math import comb, prod

import numpy as np

from sim.theory.tails import TINY, at_least_one, tails
from sim.theory.uniform import UniformRouter

_MOST_CHOICES = 200  # of groups that look different to the ranks, that sets of experts are counted for
_MOST_CLASSES = 6_000  # of sets of ranks, that bounds are added up over
_MOST_EXACT = 50  # classes for inclusion and exclusion, in long integers
_BITS = 1536  # of these: what cancels is some 2**256, what is left is above 1e-300

Classes = Counter[tuple[int, tuple[int, ...]]]  # sets of ranks by their number and the experts of each group in them
Laws = tuple[np.ndarray, np.ndarray]
"""Distinct laws of what a token adds to a rank or two, float64 [n, largest + 1], and how many of them have each."""
Choices = dict[tuple[tuple[int, ...], tuple[tuple[tuple[int, ...], int], ...]], float]


class UniformLayer:
    """Experts of a layer on ranks, rank_of_expert int [n_experts], under uniform traffic; tokens are independent."""

    def __init__(self, router: UniformRouter, rank_of_expert: np.ndarray) -> None:
        self.router = router
        self.n_ranks = int(rank_of_expert.max()) + 1
        self.held = np.zeros((self.n_ranks, router.n_group), int)
        np.add.at(self.held, (rank_of_expert, np.arange(len(rank_of_expert)) // router.group_size), 1)

    def max_load(self, n_tokens: int, least: int) -> tuple[float, float]:
        """P(max load >= least): (lower bound, upper bound), equal where they are the answer.

        The upper bound is the sum over ranks (Boole). The lower one takes off the pairs of ranks that are both so high:
        the sum of their loads is then at least 2 * least, which is impossible beyond half of all pairs (token, expert).
        """
        if n_tokens == 1 and 2 * least <= self.router.top_k and self._choices is not None:
            p = most_on_one_rank(self._choices, least)
            return p, p
        return union_bounds(self._singles, self._pairs, n_tokens, least)

    def one_rank(self, n_tokens: int) -> tuple[float, float]:
        """P(all of a step's load on one rank), twice: both bounds."""
        laws, counts = self._singles
        p = float(counts @ np.where(laws[:, -1] > 0, np.maximum(laws[:, -1] ** n_tokens, TINY), 0.0))
        return p, p

    def idle_ranks(self, n_tokens: int, least: int) -> tuple[float, float] | None:
        """P(at least `least` idle ranks): (lower bound, upper bound), equal where they are the answer.

        None where the sets of ranks fall in too many classes to go through.
        """
        return None if self._missed is None else probability_of_idle(self.router, self._missed, n_tokens, least)

    def received(self, n_tokens: int, least: int) -> tuple[float, float]:
        """P(a rank receives at least `least` of the tokens): (lower bound, upper bound).

        What one rank receives is binomial; two of them together have 0, 1 or 2 of each token.
        """
        return union_bounds(*self._receivers, n_tokens, least)

    @cached_property
    def _receivers(self) -> tuple[Laws, Laws]:
        """Laws of the copies of a token on one rank, and on two."""
        first, second = np.triu_indices(self.n_ranks, 1)
        missed, neither = (self._missing(held) for held in (self.held, self.held[first] + self.held[second]))
        both = np.maximum(1 - missed[first] - missed[second] + neither, 0.0)
        single = np.stack([missed, 1 - missed], axis=1)
        pair = np.stack([neither, np.maximum(1 - neither - both, 0.0), both], axis=1)
        singles, pairs = (np.unique(laws.round(13), axis=0, return_counts=True) for laws in (single, pair))
        return singles, pairs

    def _missing(self, held: np.ndarray) -> np.ndarray:
        """P(a token has no expert among those of each row), float64 [rows]."""
        rows, place = np.unique(-np.sort(-held, axis=1), axis=0, return_inverse=True)
        return np.array([self.router.load_law(tuple(row))[0] for row in rows.tolist()])[place.reshape(-1)]

    @cached_property
    def _choices(self) -> Choices | None:
        return choices_of_groups(self.router, self.held)

    @cached_property
    def _missed(self) -> list[dict[tuple[int, ...], int]] | None:
        return missed_sets(self.held)

    @cached_property
    def _singles(self) -> Laws:
        return self._laws(self.held)

    @cached_property
    def _pairs(self) -> Laws:
        first, second = np.triu_indices(self.n_ranks, 1)
        return self._laws(self.held[first] + self.held[second])

    def _laws(self, held: np.ndarray) -> Laws:
        """Load laws of the distinct rows of `held`."""
        rows, counts = np.unique(-np.sort(-held, axis=1), axis=0, return_counts=True)
        laws = [self.router.load_law(tuple(row)) for row in rows.tolist()]
        return np.array(laws).reshape(len(rows), self.router.top_k + 1), counts


def union_bounds(singles: Laws, pairs: Laws, n_tokens: int, least: int) -> tuple[float, float]:
    """P(a rank gets at least `least` from all tokens): the sum over ranks from above, that without what pairs of ranks have
    together from below (their sum is then at least 2 * least).
    """
    high, both = (
        float(counts @ tails(laws, n_tokens, x)) if len(laws) else 0.0
        for (laws, counts), x in ((singles, least), (pairs, 2 * least))
    )
    return min(at_least_one(high, both), 1.0), min(high, 1.0)


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
            if len(joined) > _MOST_CLASSES:
                return None
        together = joined
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


def choices_of_groups(router: UniformRouter, held: np.ndarray) -> Choices | None:
    """How a token's experts may spread over groups, choices that look alike to the ranks taken together.

    held int [ranks, groups]. Keys are the experts taken of each used group, and the distinct rows of `held` in these groups
    with how many ranks have each; values the probability of each set of such experts. None if there are too many choices.
    """
    choices: Choices = {}
    ranks = [part.tolist() for part in np.unique(held, axis=0, return_counts=True)]
    column = np.unique(held.T, axis=0, return_inverse=True)[1].ravel().tolist()  # equal groups have equal numbers
    looks: dict[tuple[int, ...], tuple[tuple[tuple[int, ...], int], ...]] = {}
    ways = [comb(router.group_size, c) for c in range(router.top_k + 1)]
    for counts, probability in zip(router.counts.tolist(), router.probability.tolist(), strict=True):
        most_first = sorted((-c, column[g], g) for g, c in enumerate(counts) if c)
        used, taken = tuple(g for _, _, g in most_first), tuple(-c for c, _, _ in most_first)
        if used not in looks:
            seen: Counter[tuple[int, ...]] = Counter()
            for row, n in zip(*ranks, strict=True):
                seen[tuple(row[g] for g in used)] += n
            looks[used] = tuple(sorted(seen.items()))
        key = taken, looks[used]
        choices[key] = choices.get(key, 0.0) + probability / prod(ways[c] for c in taken)
        if len(choices) > _MOST_CHOICES:
            return None
    return choices


def most_on_one_rank(choices: Choices, least: int) -> float:
    """P(some rank has at least `least` of a token's experts).

    Given how many experts a token takes of each group, the sets with fewer than `least` on every rank are counted by the
    product over ranks of the polynomial of what a rank may give.
    """
    fewer = sum(p * _sets_with_fewer(taken, rows, least) for (taken, rows), p in choices.items())
    return min(max(1.0 - fewer, 0.0), 1.0)


def _sets_with_fewer(taken: tuple[int, ...], rows: tuple[tuple[tuple[int, ...], int], ...], least: int) -> float:
    shape = tuple(c + 1 for c in taken)
    few = np.indices(shape).sum(axis=0) < least
    ways = np.zeros(few.size)
    ways[0] = 1
    for row, n in rows:
        of_groups = [np.array([comb(h, t) for t in range(c + 1)], float) for c, h in zip(taken, row, strict=True)]
        of_rank = (reduce(np.multiply.outer, of_groups) * few).ravel()
        while n:
            if n & 1:
                ways = _multiply(ways, of_rank, shape)
            of_rank = _multiply(of_rank, of_rank, shape) if n > 1 else of_rank
            n >>= 1
    return float(ways[-1])


def _multiply(a: np.ndarray, b: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Product of two polynomials of this shape, flat, cut off at it."""
    first, second, total = _terms(shape)
    return np.bincount(total, b[first] * a[second], a.size)


@lru_cache(maxsize=64)
def _terms(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat places of the terms of two polynomials whose product lies within the shape, and of the product."""
    at = np.indices(shape).reshape(len(shape), -1)
    total = at[:, :, None] + at[:, None, :]
    first, second = np.nonzero((total < np.reshape(shape, (-1, 1, 1))).all(axis=0))
    return first, second, np.ravel_multi_index(tuple(total[:, first, second]), shape)
