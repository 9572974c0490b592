"""How a token's experts spread over expert groups when all logits follow one law: exact, by integration.

With uniform traffic the experts of a group arrive at independent times, and a time t is as good as the uniform number
x = 1 - exp(-t). A group's score falls with its first two arrivals (`top2_sum`) or its first (`max`). Condition on the
score of the best group that is not kept, and on the time x of the token's last expert: then groups are independent, and
what a group contributes is a one-dimensional integral. Gauss and Legendre do the three integrals; the probabilities of
all spreads add up to 1 within 1e-9, which is checked each time.
"""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cache, lru_cache
from itertools import pairwise, permutations
from math import comb, factorial, prod
from typing import NamedTuple

import numpy as np

_LAST = 1 - 1e-16  # x of arrivals that never come
_CLOSER = np.array([0, 0.03, 0.1, 0.3, 1])
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
    """Probability of each spread of a token's experts over groups, under uniform traffic.

    Parameters
    ----------
    n_group, group_size, topk_group, top_k : int
        The router's shape; top_k <= topk_group * group_size.
    both : bool
        Whether a group's score is the sum of its two best (it then has at least two experts), or its best alone.
    scoring : str
        'sigmoid' or 'softmax'.
    x0 : float
        Offset of the logits before the sigmoid.

    Returns
    -------
    dict
        Falling numbers of experts in the topk_group kept groups (zeros included) -> probability that some kept groups
        give these, in any order. All relative errors are near 1e-9.
    """
    kept = list(partitions(top_k, topk_group, group_size))
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
    if abs(found.sum() - 1) > _SHARPEST:
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
    return np.array([low, *inner[(inner > low * 1.02 + 1e-9) & (inner < high * 0.98)], high])


def _threshold_edges(score: GroupScore, both: bool, size: int) -> np.ndarray:
    """Edges in alpha; where the threshold 2 * score(alpha) passes the highest score, the integrand has a kink."""
    kink = float(score.where(np.array(score.highest / 2))) if both and np.isfinite(score.highest) else 0.0
    edges = _spaced(0.0, 1.0, size)
    return np.unique([*edges, kink])


def spread_by_enumeration(
    values: Sequence[float], n_group: int, topk_group: int, top_k: int, both: bool
) -> dict[tuple[int, ...], Fraction]:
    """The same for a token whose choice scores are `values`, dealt to the experts in every order: by going through all.

    For small routers. Where a group's score is its best alone the spread does not depend on the values, so this is the
    law of any continuous logits that are alike.
    """
    size = len(values) // n_group
    found: dict[tuple[int, ...], int] = {}
    for dealt in permutations(values):
        groups = [sorted(dealt[g * size : (g + 1) * size], reverse=True) for g in range(n_group)]
        kept = sorted(groups, key=lambda group: -sum(group[: 2 if both else 1]))[:topk_group]
        least = sorted((v for group in kept for v in group), reverse=True)[top_k - 1]
        spread = tuple(sorted((sum(v >= least for v in group) for group in kept), reverse=True))
        found[spread] = found.get(spread, 0) + 1
    return {spread: Fraction(n, factorial(len(values))) for spread, n in found.items()}


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
            self.y, self.w = _panels(_spaced(alpha, self.end, size))
        self.late_first = self.first_by(self.y)
        self.passes, self.density = self._threshold()
        edges = np.unique([*_spaced(0.0, alpha, size), *_spaced(alpha, self.end, size), *_spaced(self.end, 1.0, size)])
        self.x, self.x_weight = _panels(edges)
        self.before = [self._before(j) for j in range(min(top_k, size) + 1)]
        self.arrives = [self._arrives(j) for j in range(min(top_k, size))]

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
        nodes, weights = _panels(_CLOSER)
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
        return (n - j) / (1 - self.x) * self.before[j]

    def last_at_any_time(self, counts: tuple[int, ...]) -> float:
        """P(kept groups give these counts, all scores above the threshold): any of them gives the last expert."""
        total = np.zeros(len(self.x))
        for c in set(counts) - {0}:
            others = list(counts)
            others.remove(c)
            total += counts.count(c) * self.arrives[c - 1] * np.prod([self.before[o] for o in others], axis=0)
        return float(np.dot(self.x_weight, total))
