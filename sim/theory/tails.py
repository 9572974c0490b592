"""Tails without a floor: of sums of independent small whole numbers, and of unions of events.

P(a sum of T numbers is at least x) is a transform inverted on a tilted line, so that small answers keep their digits; the
union over ranks lies between bounds from its events one by one and two by two.

Where tails of very many laws are asked for, the laws are taken for one family: tilted from a few base laws, and told apart by
their means alone. A rank with a larger share of a layer's tokens has a law that is, to a good approximation, the common one
tilted by exp(theta * j). Tails of such sums come from the saddlepoint approximation for whole numbers (Lugannani and Rice 1980;
Daniels 1987, first continuity correction): at any depth within 1 % of the exact ones from 128 tokens on and within 4 % from 16
on, which a test holds against `tails`.
"""

import math
from typing import NamedTuple

import numpy as np

from sim.kernels import kernel, part

_DIGITS = 30.0  # -log of the share of the answer that may be lost: e**-30 = 1e-13
_NEGLIGIBLE = 0.02  # of a sum, that a term's own bound may replace the term
_BRACKET = 60.0  # no law that was counted needs a stronger tilt
_UP, _DOWN = np.True_, np.False_  # not True and False, for each of which numba would compile a kernel of its own

_NEAR_1 = 1 - 1e-9
"""A sum of tails above it counts as 1, so that its last digit, which hangs on the order of summing, decides nothing."""

TINY = 1e-300
"""What a possible event has at least: smaller answers are below what floats tell from 0."""


@part
def tilt(law, per_token):
    """theta > 0 with mean `per_token` under the law tilted by exp(theta * j); it lies above the mean, below the largest."""
    low, high, theta = 0.0, 1e4, 1.0
    for _ in range(100):
        _, mean, variance = tilted_moments(law, theta)
        if mean < per_token:
            low = theta
        else:
            high = theta
        newton = theta + (per_token - mean) / max(variance, 1e-300)
        if abs(newton - theta) < 1e-6 * theta:
            break
        theta = newton if low < newton < high else (0.5 * (low + high) if high < 1e4 else 2 * theta)
    return theta


@kernel
def tilted_moments(law, theta):
    """log of the moment generating function at theta, and mean and variance of the tilted law."""
    top = law.size - 1
    total, first, second = 0.0, 0.0, 0.0
    for j in range(law.size):
        share = law[j] * np.exp(theta * (j - top))
        total += share
        first += share * j
        second += share * j * j
    mean = first / total
    return np.log(total) + theta * top, mean, max(second / total - mean * mean, 0.0)


@part
def _invert(law, n_tokens, least, theta):
    """P(sum >= least) by inverting the transform of the tilted law on the line through theta.

    The trapezoidal rule on `period` nodes adds up what lies at equal places modulo `period`, so a long enough period
    makes it exact; and the nodes at which the transform has died out are few.
    """
    cumulant, _, variance = tilted_moments(law, theta)
    sd = np.sqrt(n_tokens * variance)
    largest = n_tokens * (law.size - 1)
    period = _DIGITS / theta + 0.5 * theta * sd * sd + 12 * sd + 16
    whole = period > largest  # then the period holds all values, and the sum over values ends at the largest
    period = np.int64(min(period, largest + 1.0))
    tilted = np.empty(law.size)
    for j in range(law.size):
        tilted[j] = law[j] * np.exp(theta * j - cumulant)
    neighbours = 0.0
    for j in range(1, law.size):
        neighbours += tilted[j - 1] * tilted[j]
    n_values = largest - least + 1
    step = complex(np.cos(2 * np.pi / period), np.sin(2 * np.pi / period))
    fade, turn, total = np.exp(-theta), complex(1.0, 0.0), 0.0
    for m in range(period // 2 + 1):
        # |psi|**2 = 1 - 4 sum over i < j of q_i q_j sin((j - i) angle / 2)**2, at most 1 less the neighbours' part
        if (2 * neighbours * (1 - turn.real)) * n_tokens > 2 * (_DIGITS + 4):
            break
        psi = complex(0.0, 0.0)
        for j in range(law.size - 1, -1, -1):
            psi = psi * turn + tilted[j]
        square = psi.real * psi.real + psi.imag * psi.imag
        log_size = 0.5 * n_tokens * np.log(max(square, 1e-300))
        if log_size > -_DIGITS - 4:
            angle = 2 * np.pi * m / period
            phase = n_tokens * np.arctan2(psi.imag, psi.real) - least * angle
            part = np.exp(log_size) * complex(np.cos(phase), np.sin(phase)) / (1 - fade * turn.conjugate())
            if whole:
                part *= 1 - np.exp(-theta * n_values) * complex(np.cos(n_values * angle), -np.sin(n_values * angle))
            total += part.real if m == 0 or 2 * m == period else 2 * part.real
        turn *= step
    return np.exp(n_tokens * cumulant - theta * least) * total / period


@part
def _tail(law, n_tokens, least):
    """P(sum >= least) for a law without zeros at its ends, and least above the mean of the sum."""
    variance = tilted_moments(law, 0.0)[2]
    floor = min(3 / np.sqrt(n_tokens * variance), 1.0)  # near the pole at 0 the integrand is sharp
    return _invert(law, n_tokens, least, max(floor, tilt(law, least / n_tokens)))


@kernel
def tail(law, n_tokens, least):
    """P(sum of n_tokens independent numbers >= least): law float64 [largest + 1].

    The terms that are added have one sign and are scaled by the tilt, so that small answers keep their digits.
    """
    top, bottom = law.size - 1, 0
    while law[top] == 0.0:
        top -= 1
    while law[bottom] == 0.0:
        bottom += 1
    law = law[bottom : top + 1]
    wanted, largest = least - n_tokens * bottom, n_tokens * (top - bottom)
    if wanted <= 0:
        return 1.0
    if wanted > largest:
        return 0.0
    if n_tokens == 1:
        return law[wanted:].sum()
    if wanted == largest:
        return max(law[-1] ** n_tokens, TINY)
    if wanted == 1:
        return -np.expm1(n_tokens * np.log1p(-law[1:].sum()))
    if wanted > n_tokens * tilted_moments(law, 0.0)[1]:
        return max(min(_tail(law, n_tokens, wanted), 1.0), TINY)
    return max(1 - _tail(law[::-1].copy(), n_tokens, largest - wanted + 1), 0.0)


@kernel
def fill_tails(laws, n_tokens, least, out):
    """out[i] = tail of law i: laws float64 [n, largest + 1], out float64 [n]."""
    for i in range(laws.shape[0]):
        out[i] = tail(laws[i], n_tokens, least)


def tails(laws: np.ndarray, n_tokens: int, least: int) -> np.ndarray:
    """P(a sum of `n_tokens` independent numbers is at least `least`), float64 [n], for each law of these numbers: laws float64
    [n, largest + 1], probabilities of 0, 1, ...

    Relative errors are near 1e-12, however small the probability; 0 only for what cannot be, else at least TINY.
    """
    laws = np.ascontiguousarray(laws, np.float64)
    out = np.empty(len(laws))
    fill_tails(laws, np.int64(n_tokens), np.int64(least), out)
    return out


@kernel
def _fill_products(a, b, out):
    """Products of polynomials, row by row: a, b and out float64 [n, terms]."""
    for i in range(a.shape[0]):
        out[i] = 0.0
        for j in range(a.shape[1]):
            factor, here = a[i, j], out[i, j : j + b.shape[1]]
            for k in range(b.shape[1]):
                here[k] += factor * b[i, k]


@kernel
def _fill_squares(a, out):
    """The same of a with itself, in half the time."""
    for i in range(a.shape[0]):
        out[i] = 0.0
        for j in range(a.shape[1]):
            factor, right, here = 2 * a[i, j], a[i, j + 1 :], out[i, 2 * j + 1 :]
            out[i, 2 * j] += a[i, j] * a[i, j]
            for k in range(right.size):
                here[k] += factor * right[k]


@kernel
def _fill_tails_of_sums(first, above, largest, least, out):
    """out[i] = P(A + B >= least): first float64 [n, sums], the law of A; above float64 [n, sums], P(B >= x); largest int64 [n],
    of A + B; out float64 [n].
    """
    for i in range(first.shape[0]):
        out[i] = 0.0
        if least > largest[i]:
            continue
        law, tail_of = first[i], above[i]
        low, high = max(least - tail_of.size + 1, 0), min(least + 1, law.size)
        a, b, c, d = 0.0, 0.0, 0.0, 0.0  # four sums at a time: one has to wait for itself
        for j in range(low, high - 3, 4):
            a += law[j] * tail_of[least - j]
            b += law[j + 1] * tail_of[least - j - 1]
            c += law[j + 2] * tail_of[least - j - 2]
            d += law[j + 3] * tail_of[least - j - 3]
        for j in range(high - max(high - low, 0) % 4, high):
            a += law[j] * tail_of[least - j]
        for j in range(high, law.size):
            b += law[j]
        out[i] = max(min(a + b + c + d, 1.0), TINY)


@kernel
def _fill_above(laws, out):
    """P(at least x) of some laws: both float64 [n, sums]."""
    for i in range(laws.shape[0]):
        total = 0.0
        for x in range(laws.shape[1] - 1, -1, -1):
            total += laws[i, x]
            out[i, x] = total


class TailsOfSums:
    """`tails` at many numbers, by multiplying polynomials: quicker for some hundred tokens or fewer, much slower above.

    All products are of positive numbers, so small answers keep their digits, and what falls below the smallest float does
    not count beside TINY. Tokens are taken in two halves, so that the longest polynomials are never multiplied out.
    """

    def __init__(self, laws: np.ndarray) -> None:
        laws = np.ascontiguousarray(laws, np.float64)
        self._powers = {0: np.ones((len(laws), 1)), 1: laws}
        self._largest = laws.shape[1] - 1 - (laws[:, ::-1] > 0).argmax(axis=1)
        self._above = (0, np.empty(0))

    def at(self, n_tokens: int, least: int) -> np.ndarray:
        """P(a sum of `n_tokens` numbers >= least), float64 [n]; quickest for one n_tokens after the other, ascending."""
        some = n_tokens // 2
        if self._above[0] != n_tokens:
            others = self._power(n_tokens - some)
            self._above = n_tokens, np.empty_like(others)
            _fill_above(others, self._above[1])
        out = np.empty(len(self._largest))
        _fill_tails_of_sums(self._power(some), self._above[1], n_tokens * self._largest, np.int64(least), out)
        return out

    def _power(self, n: int) -> np.ndarray:
        """Laws of sums of n numbers, float64 [n laws, n * largest + 1]."""
        if n not in self._powers:
            half = self._power(n // 2)
            power = np.empty((len(half), 2 * half.shape[1] - 1))
            _fill_squares(half, power)
            if n % 2:
                law, even = self._powers[1], power
                power = np.empty((len(law), even.shape[1] + law.shape[1] - 1))
                _fill_products(law, even, power)
            self._powers[n] = power
        return self._powers[n]


@part
def at_least_one(single, pairs):
    """Lower bound of P(any of some events), from the sum of their probabilities and a number that is not below the sum
    over all pairs of events (Dawson and Sankoff 1967): at least Bonferroni's single - pairs, and never negative.
    """
    if single <= 0.0:
        return 0.0
    kappa = 1 + np.floor(2 * pairs / single)
    return min(2 * single / (kappa + 1) - 2 * pairs / (kappa * (kappa + 1)), 1.0)


@kernel
def _hottest(laws):
    """The law with the largest mean, and that mean."""
    hottest, largest_mean = 0, -1.0
    for i in range(laws.shape[0]):
        total, first = 0.0, 0.0
        for j in range(laws.shape[1]):
            total += laws[i, j]
            first += laws[i, j] * j
        if first / total > largest_mean:
            hottest, largest_mean = i, first / total
    return hottest, largest_mean


@part
def _sum_of_tails(laws, n_tokens, least, floor, up):
    """Sum of the tails of some laws, not above 1: laws float64 [n, largest + 1].

    Where a law's Chernoff bound is negligible beside the largest tail, or beside `floor`, the bound (up) or 0 stands for
    the tail, so that the sum is not below (not above) the true one.
    """
    hottest, largest_mean = _hottest(laws)
    if up and least <= n_tokens * largest_mean:
        return 1.0
    total = tail(laws[hottest], n_tokens, least)
    small = _NEGLIGIBLE / laws.shape[0] * max(total, floor)
    theta = 0.0
    if total > 0.0 and n_tokens * largest_mean < least < n_tokens * (laws.shape[1] - 1):
        theta = min(tilt(laws[hottest], least / n_tokens), 50.0)
    top = laws.shape[1] - 1
    weights = np.empty(top + 1)
    for j in range(top + 1):
        weights[j] = np.exp(theta * (j - top))
    for i in range(laws.shape[0]):
        if i != hottest and total < 1.0:
            bound = 1.0
            if theta > 0.0:
                tilted = 0.0
                for j in range(top + 1):
                    tilted += laws[i, j] * weights[j]
                bound = np.exp(n_tokens * (np.log(tilted) + theta * top) - theta * least)
            if bound > small:
                total += tail(laws[i], n_tokens, least)
            elif up:
                total += bound
    return min(total, 1.0)


@kernel
def fill_layer_bounds(upper, hot_lower, pair_upper, n_tokens, least, out):
    """Bounds of P(max load >= least) in each layer: out float64 [layers, 2], lower and upper.

    upper float64 [layers, ranks, largest + 1], load laws of single tokens that are not below the true ones in
    stochastic order; hot_lower [layers, hot ranks, ...], of some ranks laws that are not above; pair_upper [layers,
    pairs of hot ranks, ...], of the sum of two ranks' loads.
    """
    for layer in range(upper.shape[0]):
        high = _sum_of_tails(upper[layer], n_tokens, least, 0.0, _UP)
        single = _sum_of_tails(hot_lower[layer], n_tokens, least, 0.0, _DOWN)
        pairs = 1.0
        if single < 1.0:  # else the sum was cut off
            pairs = _sum_of_tails(pair_upper[layer], n_tokens, 2 * least, single, _UP) if pair_upper.shape[1] else 0.0
        low = at_least_one(single, pairs)
        if pairs >= 1.0:  # which says nothing; one rank alone is a bound too
            low = tail(hot_lower[layer, _hottest(hot_lower[layer])[0]], n_tokens, least)
        out[layer, 0] = min(low, high)
        out[layer, 1] = high


@kernel
def join_layer_bounds(upper, hot_lower, pair_upper, out):
    """The same from tails that are known: upper float64 [layers, ranks], hot_lower [layers, hot ranks] at `least`, pair_upper
    [layers, pairs of hot ranks] at 2 * least; out float64 [layers, 2].
    """
    for layer in range(upper.shape[0]):
        single, pairs, hottest = min(hot_lower[layer].sum(), 1.0), pair_upper[layer].sum(), 0.0
        for p in hot_lower[layer]:
            hottest = max(hottest, p)
        out[layer, 1] = min(upper[layer].sum(), 1.0)
        low = hottest if single > _NEAR_1 or pairs >= 1.0 else at_least_one(single, pairs)
        out[layer, 0] = min(low, out[layer, 1])


class Family(NamedTuple):
    """Base laws with ascending means; the law of a mean is tilted from the base whose mean is nearest below."""

    laws: np.ndarray  # float64 [bases, largest + 1], none of them without spread
    means: np.ndarray  # float64 [bases]


BERNOULLI = Family(np.array([[0.5, 0.5]]), np.array([0.5]))
"""Of what happens to a token or not: sums are binomial."""


def family_of(laws: np.ndarray, n_bases: int) -> Family:
    """Base laws pooled from counted ones, float64 [n, largest + 1], by their means."""
    means = laws @ np.arange(laws.shape[1])
    order = np.argsort(means, kind="stable")
    pooled = np.array([laws[part].mean(axis=0) for part in np.array_split(order, min(n_bases, len(laws)))])
    kept = np.count_nonzero(pooled, axis=1) > 1
    pooled = pooled[kept] if kept.any() else (pooled[:1] + 1e-12) / (pooled[:1] + 1e-12).sum()
    return Family(np.ascontiguousarray(pooled), pooled @ np.arange(laws.shape[1]))


@kernel
def tilt_to(law, mean):
    """theta of either sign with this mean under the law tilted by exp(theta * j); the ends of the range stop at the bracket."""
    low, high, theta = -_BRACKET, _BRACKET, 0.0
    for _ in range(80):
        _, found, variance = tilted_moments(law, theta)
        if abs(found - mean) <= 1e-12 * mean:
            break
        if found < mean:
            low = theta
        else:
            high = theta
        newton = theta + (mean - found) / max(variance, 1e-300)
        theta = newton if low < newton < high else 0.5 * (low + high)
        if high - low < 1e-12:
            break
    return theta


@kernel
def place_in_family(means, laws, base_means, base, theta):
    """Base int64 [n] and tilt float64 [n] of the laws of some means, float64 [n]."""
    for i in range(means.size):
        b = 0
        while b + 1 < base_means.size and base_means[b + 1] <= means[i]:
            b += 1
        base[i] = b
        theta[i] = tilt_to(laws[b], means[i])


@kernel
def _normal_above(z):
    return 0.5 * math.erfc(z * 0.7071067811865476)


@kernel
def saddle_points(laws, per_token, theta, cumulant, variance):
    """Of each base law the tilt with the mean `per_token`, and cumulant and variance there: float64 [bases] each."""
    for b in range(laws.shape[0]):
        theta[b] = tilt_to(laws[b], per_token)
        cumulant[b], _, variance[b] = tilted_moments(laws[b], theta[b])


@kernel
def tail_of_tilted(n_tokens, least, theta_at, cumulant_at, variance_at, theta, cumulant, mean, variance):
    """P(sum >= least) under a law of tilt `theta` (of this cumulant, mean and variance); the saddle point is at `theta_at`."""
    gap = theta_at - theta
    sd = np.sqrt(n_tokens * variance)
    z = (least - 0.5 - n_tokens * mean) / sd
    exponent = gap * least - n_tokens * (cumulant_at - cumulant)
    if exponent < 1e-3 or abs(gap) < 1e-6:
        return _normal_above(z)
    if exponent > 650.0:  # within 1e-280 of it
        return 0.0 if gap > 0.0 else 1.0
    if n_tokens * variance_at < 0.3:  # at the end of the range there is one way to get there
        return min(np.exp(-exponent), 1.0)
    w = np.sqrt(2.0 * exponent) * (1.0 if gap > 0.0 else -1.0)
    u = -np.expm1(-gap) * np.sqrt(n_tokens * variance_at)
    density = np.exp(-0.5 * w * w) * 0.3989422804014327
    return min(max(_normal_above(w) + density * (1.0 / u - 1.0 / w), 0.0), 1.0)
