"""Uniform traffic: the exact law of the experts that a token takes, for grouped and ungrouped routers.

Ungrouped, all sets of top_k experts are equally likely. Grouped, the law of how a token's experts spread over the groups
needs an integral. The experts of a group arrive at independent times, and a time t is as good as the uniform number
x = 1 - exp(-t). A group's score falls with its first two arrivals (`top2_sum`) or its first (`max`). Condition on the
score of the best group that is not kept, and on the time x of the token's last expert: then groups are independent, and
what a group contributes is a one-dimensional integral. Gauss-Legendre quadrature does the three integrals; the
probabilities of all spreads add up to 1 within 1e-7, which is checked each time.

All experts of a group are alike, and so are all groups: given how a token's experts spread over groups, every choice
of groups and of experts in them is equally likely. What a token asks of a rank depends only on how many experts of each
group the rank holds, its `held`, and not on the order of the groups.
"""

from collections.abc import Callable, Iterator
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from math import comb, factorial, prod
from typing import NamedTuple

import numpy as np

from sim.model import ModelSpec

_MOST_SPREADS = 50_000  # ways to spread, in every order of the groups, that a router lists
_LAST = 1 - 1e-16  # x of arrivals that never come
_CLOSER = np.array([0, 0.03, 0.1, 0.3, 1])
_CLOSER_TO_1 = np.array([0, 0.2, 0.9, 0.99, 0.999, 1])
_FEW = 3  # experts of a group whose last arrivals matter: the score falls with log(1 - x) there
_MANY = 32  # experts of a group whose second arrival is so early that a sigmoid's kink at `always` has no weight
_PAST_KINK = np.array([0, 1e-3, 0.01, 0.03, 0.1, 0.3])
_PAST_LOW = np.array([1, 2, 5, 20, 100])  # times the threshold: the scales of 1 / t
_NODES = 14  # of each Gauss-Legendre panel
_SHARPEST = 1e-7  # largest error of the sum of all probabilities


class GroupScore(NamedTuple):
    """Score of an arrival at x in (0, 1), falling in x: the function, its inverse and its derivative."""

    at: Callable[[np.ndarray], np.ndarray]
    where: Callable[[np.ndarray], np.ndarray]
    slope: Callable[[np.ndarray], np.ndarray]
    highest: float


def sigmoid_score(x0: float) -> GroupScore:
    """1 / (1 + a t), a = exp(-x0): the sigmoid of a logit x0 + Gumbel noise that arrives at t = -log(1 - x)."""
    a = np.exp(-x0)

    def where(score: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.where(score > 0, -np.expm1(-(1 / np.maximum(score, 1e-300) - 1) / a), 1.0)

    def slope(x: np.ndarray) -> np.ndarray:
        x = np.minimum(x, _LAST)
        return -a / ((1 - a * np.log1p(-x)) ** 2 * (1 - x))

    return GroupScore(lambda x: 1 / (1 - a * np.log1p(-np.minimum(x, _LAST))), where, slope, 1.0)


def softmax_score() -> GroupScore:
    """1 / t, the exponential of the logit: softmax up to a factor that the token's experts share."""

    def where(score: np.ndarray) -> np.ndarray:
        return np.where(score > 0, -np.expm1(-1 / np.maximum(score, 1e-300)), 1.0)

    def slope(x: np.ndarray) -> np.ndarray:
        x = np.minimum(x, _LAST)
        return -1 / (np.log1p(-x) ** 2 * (1 - x))

    return GroupScore(lambda x: -1 / np.log1p(-np.minimum(x, _LAST)), where, slope, np.inf)


def partitions(total: int, parts: int, most: int) -> Iterator[tuple[int, ...]]:
    """Ways to write `total` as `parts` falling numbers from 0 to `most`."""
    if parts == 0:
        if total == 0:
            yield ()
        return
    for first in range(min(total, most), -(-total // parts) - 1, -1):
        for rest in partitions(total - first, parts - 1, first):
            yield (first, *rest)


def arrangements(counts: tuple[int, ...]) -> int:
    """Distinct orders of some numbers."""
    return factorial(len(counts)) // prod(factorial(counts.count(c)) for c in set(counts))


@lru_cache(maxsize=64)
def spread_over_groups(
    n_group: int, group_size: int, topk_group: int, top_k: int, both: bool, scoring: str, x0: float
) -> dict[tuple[int, ...], float]:
    """Probability of each spread of a token's experts over groups, under uniform traffic: by falling numbers of experts in the
    topk_group kept groups (zeros included), that some kept groups give these, in any order.

    A group's score is its best alone, or with `both` the sum of its two best (it then has at least two experts). `scoring` is
    'sigmoid' or 'softmax', `x0` the offset of the logits before the sigmoid. The probabilities add up to 1 within 3e-8; raises
    ArithmeticError where they do not within 1e-7.
    """
    kept = list(partitions(top_k, topk_group, group_size))
    if len(kept) == 1 and group_size == 1:
        return {kept[0]: 1.0}
    if topk_group == n_group:
        ways = {c: arrangements(c) * prod(comb(group_size, j) for j in c) for c in kept}
        return {c: n / comb(n_group * group_size, top_k) for c, n in ways.items()}
    score = sigmoid_score(x0) if scoring == "sigmoid" else softmax_score()
    found = np.zeros(len(kept))
    for alpha, weight in zip(*_panels(_threshold_edges(score, both, group_size)), strict=True):
        group = _Group(score, both, group_size, top_k, float(alpha))
        best_of_others = (n_group - topk_group) * (1 - group.passes) ** (n_group - topk_group - 1) * group.density
        found += weight * best_of_others * np.array([group.last_at_any_time(c) for c in kept])
    found *= comb(n_group, topk_group) * np.array([arrangements(c) for c in kept])
    if not abs(found.sum() - 1) <= _SHARPEST:
        raise ArithmeticError(f"the spreads over groups add up to {found.sum()!r}, not to 1")
    return dict(zip(kept, found.tolist(), strict=True))


@cache
def _gauss_legendre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(_NODES)


def _panels(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Gauss and Legendre on each interval between edges, flat."""
    x, w = _gauss_legendre()
    low, width = edges[:-1, None], np.diff(edges)[:, None]
    return (low + width * (x + 1) / 2).ravel(), (width * w / 2).ravel()


def _spaced(low: float, high: float, size: int) -> np.ndarray:
    """Edges from low to high, closer where a group of `size` experts has its first arrivals."""
    inner = np.array([0.1, 0.3, 0.7, 1.2, 2, 3, 4.5, 7, 11, 17]) / size
    edges = np.array([low, *inner[(inner > low * 1.02 + 1e-9) & (inner < high * 0.98)], high])
    return np.union1d(edges, high - (high - low) * np.array([0.1, 0.01, 1e-3])) if size <= _FEW and high == 1 else edges


def _threshold_edges(score: GroupScore, both: bool, size: int) -> np.ndarray:
    """Edges in alpha; where the threshold 2 * score(alpha) passes the highest score, the integrand has a kink."""
    edges = _spaced(0.0, 1.0, size)
    if not both:
        return edges
    if not np.isfinite(score.highest):  # near 0 the probability has a term in alpha**2 * log(alpha)
        return np.union1d(edges, np.array([1e-3, 0.01, 0.03]) / size)
    kink = float(score.where(np.array(score.highest / 2)))
    steep = kink * _PAST_KINK if size < _MANY else np.zeros(1)
    return np.unique([*edges, *(kink - steep), *(kink + steep)])


class _Group:
    """One group at a threshold of the group score: alpha is where one arrival (both: two at once) just reaches it.

    b_j(x): probability of j arrivals before x and a score above the threshold; d_j(x): density of the (j + 1)-th arrival
    at x after j before, and a score above the threshold. `first_by(y)`: the latest first arrival that, with the second
    at y, still reaches the threshold.
    """

    def __init__(self, score: GroupScore, both: bool, size: int, top_k: int, alpha: float) -> None:
        self.score, self.both, self.size, self.alpha = score, both, size, alpha
        level = 2 * float(score.at(np.array(alpha)))
        self.level = level
        self.end = 1.0  # of the second arrivals with which any first arrival reaches the threshold
        if both and level > score.highest:
            self.end = float(score.where(np.array(level - score.highest)))
        self.y, self.w = np.empty(0), np.empty(0)
        if alpha < self.end:
            self.y, self.w = _panels(self._past_threshold())
        self.late_first = self.first_by(self.y)
        self.passes, self.density = self._threshold()
        edges = np.unique([*_spaced(0.0, alpha, size), *self._past_threshold(), *_spaced(self.end, 1.0, size)])
        if both and (size < _MANY or not np.isfinite(score.highest)):
            # first arrivals up to `always` reach the threshold with any second one: a kink, and a steep rise past it
            always = float(score.where(np.array(min(level, score.highest))))
            edges = np.union1d(edges, always + (alpha - always) * _PAST_KINK)
        self.x, self.x_weight = _panels(edges)
        self.before = [self._before(j) for j in range(min(top_k, size) + 1)]
        self.arrives = [self._arrives(j) for j in range(min(top_k, size))]

    def _past_threshold(self) -> np.ndarray:
        """Edges from alpha to the end; 1 / t has no scale of its own, so that they grow from a small alpha."""
        edges = _spaced(self.alpha, self.end, self.size)
        if not self.both or np.isfinite(self.score.highest):
            return edges
        closer = self.alpha * _PAST_LOW
        return np.union1d(edges, closer[closer < 0.9 * edges[1]])

    def first_by(self, y: np.ndarray) -> np.ndarray:
        if not self.both:
            return np.minimum(y, self.alpha)
        return np.where(y <= self.alpha, y, self.score.where(self.level - self.score.at(y)))

    def _threshold(self) -> tuple[float, float]:
        """P(score above the threshold), and its derivative in alpha."""
        n, a = self.size, self.alpha
        if not self.both:
            return 1 - (1 - a) ** n, n * (1 - a) ** (n - 1)
        early_y, early_w = _panels(np.array([0.0, a]))
        density_2 = n * (n - 1) * (1 - self.y) ** (n - 2)
        passes = np.dot(early_w, n * (n - 1) * (1 - early_y) ** (n - 2) * early_y)
        passes += np.dot(self.w, density_2 * self.late_first)
        steeper = 2 * self.score.slope(np.array(a)) / self.score.slope(self.late_first)
        return float(passes), float(np.dot(self.w, density_2 * steeper))

    def _before(self, j: int) -> np.ndarray:
        """b_j at the nodes x."""
        n, x, a = self.size, self.x[:, None], self.alpha
        nodes, weights = _panels(_CLOSER if n > _FEW else _CLOSER_TO_1)
        if j >= 2:
            # the second arrival at y, j - 2 more before x: up to alpha any first arrival will do
            early = np.minimum(self.x, a)[:, None]
            y = early * nodes
            value = (early * weights * y * (x - y) ** (j - 2)).sum(axis=1)
            width = np.maximum(np.minimum(self.x, self.end) - a, 0)[:, None]
            y = a + width * nodes
            value += (width * weights * self.first_by(y) * np.maximum(x - y, 0) ** (j - 2)).sum(axis=1)
            return n * (n - 1) * comb(n - 2, j - 2) * (1 - self.x) ** (n - j) * value
        # The second arrival comes at y > x; with a first arrival at x it may come as late as `latest`.
        latest = np.where(self.x < a, self.first_by_or_end(self.x), self.x)[:, None]
        value = np.zeros(len(self.x))
        edges = [x, np.clip(a, x, latest), latest, np.full_like(x, max(a, self.end))]
        for low, high in pairwise(edges):
            width = np.maximum(high - low, 0)
            y = low + width * nodes
            first = self.first_by(y)
            part = np.minimum(x, first) if j == 1 else np.maximum(first - x, 0)
            value += (width * weights * part * (1 - y) ** (n - 2)).sum(axis=1)
        return n * (n - 1) * value

    def first_by_or_end(self, x: np.ndarray) -> np.ndarray:
        """The latest second arrival with which a first arrival at x < alpha reaches the threshold."""
        if not self.both:
            return np.ones_like(x)
        gap = self.level - self.score.at(x)
        return np.clip(self.score.where(gap), x, 1.0)

    def _arrives(self, j: int) -> np.ndarray:
        """d_j at the nodes x."""
        n = self.size
        if j == 0:
            latest = np.maximum(self.first_by_or_end(self.x), self.x)
            density = n * ((1 - self.x) ** (n - 1) - (1 - latest) ** (n - 1))
            return np.where(self.x < self.alpha, density, 0.0)
        if j == 1:
            reach = np.where(self.x < self.end, self.first_by(self.x), 0.0)
            return n * (n - 1) * (1 - self.x) ** (n - 2) * reach
        return (n - j) / np.maximum(1 - self.x, 1 - _LAST) * self.before[j]  # a node may be 1, where nothing is before

    def last_at_any_time(self, counts: tuple[int, ...]) -> float:
        """P(kept groups give these counts, all scores above the threshold): any of them gives the last expert."""
        total = np.zeros(len(self.x))
        for c in set(counts) - {0}:
            others = list(counts)
            others.remove(c)
            total += counts.count(c) * self.arrives[c - 1] * np.prod([self.before[o] for o in others], axis=0)
        return float(np.dot(self.x_weight, total))


class UniformRouter:
    """A router under uniform traffic: `counts` int64 [spreads, n_group] are the ways in which a token's experts spread over the
    groups, in every order of the groups, of `probability` float64 [spreads].
    """

    def __init__(self, n_group: int, group_size: int, top_k: int, spreads: dict[tuple[int, ...], float]) -> None:
        self.n_group, self.group_size, self.top_k = n_group, group_size, top_k
        rows, probability = [], []
        for kept, p in spreads.items():
            full = (*kept, *[0] * (n_group - len(kept)))
            orders = _orders(full)
            rows += orders
            probability += [p / len(orders)] * len(orders)
        self.counts, self.probability = np.array(rows), np.array(probability)
        self._laws: dict[tuple[int, ...], np.ndarray] = {}
        self._misses: dict[tuple[int, ...], float] = {}
        self._marginals: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def of(cls, model: ModelSpec, x0: float) -> "UniformRouter | None":
        """The router of a model whose sigmoid has the offset x0; None where the ways to spread are too many to list."""
        if not model.is_grouped:
            return cls(1, model.n_experts, model.top_k, {(model.top_k,): 1.0})
        if (
            comb(model.n_group, model.topk_group) * comb(model.top_k + model.topk_group - 1, model.top_k)
            > _MOST_SPREADS
        ):
            return None
        both = model.group_score == "top2_sum"
        shape = (model.n_group, model.group_size, model.topk_group, model.top_k)
        return cls(model.n_group, model.group_size, model.top_k, spread_over_groups(*shape, both, model.scoring, x0))

    @cached_property
    def _hypergeometric(self) -> np.ndarray:
        """P(j of c experts of a group lie among h of its experts): float64 [h, j, c]."""
        n, k = self.group_size, self.top_k
        table = np.zeros((n + 1, k + 1, min(k, n) + 1))
        for h in range(n + 1):
            for c in range(min(k, n) + 1):
                for j in range(c + 1):
                    table[h, j, c] = comb(h, j) * comb(n - h, c - j) / comb(n, c)
        return table

    def load_law(self, held: tuple[int, ...]) -> np.ndarray:
        """P(a token has j experts on a rank that holds `held` of each group), j = 0 .. top_k; also of several ranks
        taken together. float64 [top_k + 1].
        """
        held = tuple(sorted((h for h in held if h), reverse=True))
        if held not in self._laws:
            counts, probability = self.marginal(len(held))
            law = np.zeros((self.top_k + 1, len(counts)))
            law[0] = 1
            for g, h in enumerate(held):
                of_group = self._hypergeometric[h][:, counts[:, g]]
                more = law * of_group[0]
                for j in range(1, min(h, self.top_k) + 1):
                    more[j:] += law[: self.top_k + 1 - j] * of_group[j]
                law = more
            self._laws[held] = law @ probability
        return self._laws[held]

    def misses(self, held: tuple[int, ...]) -> float:
        """P(a token has no expert among `held` experts of each group)."""
        if held not in self._misses:
            counts, missed = self.marginal(len(held))
            for g, h in enumerate(held):
                missed = missed * self._hypergeometric[h, 0][counts[:, g]]
            self._misses[held] = float(missed.sum())
        return self._misses[held]

    def marginal(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Distinct counts in the first n groups, and their probabilities."""
        if n not in self._marginals:
            rows, inverse = np.unique(self.counts[:, :n], axis=0, return_inverse=True)
            self._marginals[n] = rows, np.bincount(inverse.ravel(), self.probability, len(rows))
        return self._marginals[n]


def _orders(counts: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Distinct orders of some numbers."""
    if not counts:
        return [()]
    others = {c: counts[: (i := counts.index(c))] + counts[i + 1 :] for c in sorted(set(counts))}
    return [(c, *rest) for c, left in others.items() for rest in _orders(left)]
