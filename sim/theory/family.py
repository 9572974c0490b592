"""Tails of sums of tokens whose law is one of a family: tilted from a few base laws, and told apart by its mean alone.

A rank with a larger share of a layer's tokens has a law that is, to a good approximation, the common one tilted by
exp(theta * j). Tails of such sums come from the saddlepoint approximation for whole numbers (Lugannani and Rice 1980; Daniels
1987, first continuity correction): at any depth within 1 % of the exact ones from 128 tokens on and within 4 % from 16 on,
which a test holds against `tails`.
"""

import math
from typing import NamedTuple

import numpy as np

from sim.kernels import kernel
from sim.theory.tails import tilted_moments

_BRACKET = 60.0  # no law that was counted needs a stronger tilt


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
