"""Deployments: layers drawn once, then many steps. How often some layer of a step has more on one rank than a capacity holds.

A deployment has the layers of a model, and some of them are bad in every step. Of each layer the share of the tokens that each
expert takes is estimated from tokens that are drawn for it; given its layers the tokens of a step are independent, so what a
rank receives is a sum of independent tokens, whose tail is known far below what can be sampled. Over ranks the tails are added
(an upper bound, tight where it matters).

Layers of a step are taken as independent given the deployment, and so are steps. Recorded layers share their tokens: the same
steps are bad in several layers, and steps follow on similar ones, which leaves the probability that some layer of some step
exceeds a capacity below this, not above. On gpt-oss-20b's recorded steps (`sim.cost.step_log`, 4,096 steps, 18 cells) the product
over layers is 6 % above what is replayed (-1 to 16) where that is about 0.5, 3 % (-1 to 11) near 0.1 and 1 % (0 to 7) near
0.01: far out, layers exceed one at a time. `layer_correlation` takes off a third of that. With steps taken as independent,
windows of 32 steps exceed 11 % (-4 to 36) more often than replayed ones.

The law of one token on a rank is taken as a function of the rank's mean load: laws counted in the first layers are pooled by
their means, and tilted in between (`sim.theory.tails`). Received tokens and rows of an expert are binomial.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from sim.kernels import kernel
from sim.placement import is_load_aware
from sim.router import draw_trials
from sim.scoring import count_received, rank_loads, receivers
from sim.sweeps.plan import Plan
from sim.sweeps.steps import place_pairs
from sim.theory.tails import (
    BERNOULLI,
    Family,
    family_of,
    place_in_family,
    saddle_points,
    tail_of_tilted,
    tilted_moments,
)

QUANTITIES = ("received", "pairs", "expert_rows")
FITTED_DEPLOYMENTS = 80
LAYER_TOKENS, KNOWN_LAYER_TOKENS = 2**11, 2**17
_LAW_LAYERS, _LAW_TOKENS = 128, 2**13  # behind the laws of single tokens
_BASES = 16
_HOTTEST = 4
"""Receivers of a layer that are looked at alone; the others are in groups that double, each as high as its first."""
_CHUNK_TOKENS = 2**19


@dataclass(frozen=True, eq=False)
class Deployments:
    """What one quantity is over many deployments, under a pair (placement, EP size).

    Attributes
    ----------
    family : Family
        Laws of one token on a receiver (a rank, or for 'expert_rows' a slot).
    base, tilted : int64 [deployments, layers, groups], float64 [..., 4]
        The laws of receivers of each layer in the family, hottest first, each for a group of which it is the hottest: the base
        law; its tilt, and cumulant, mean and variance there.
    sizes : int64 [groups]
        Receivers of each group.
    mean : float
        Of one token on one receiver, over all layers.
    rate_error : float
        Standard error of the hottest receivers' means, from counting.
    some_base, some_tilted : int64 [layers, receivers], float64 [layers, receivers, 4]
        The laws of all receivers of some layers.
    """

    family: Family
    base: np.ndarray
    tilted: np.ndarray
    sizes: np.ndarray
    mean: float
    rate_error: float
    some_base: np.ndarray
    some_tilted: np.ndarray

    def log_fine(self, n_tokens: int, capacity: int | np.ndarray) -> np.ndarray:
        """log P(no receiver of a layer has more than `capacity`), of each deployment's layers: float64 [deployments, layers].

        `capacity` is one for all, or int64 [deployments]. P(one has more) is the sum over receivers, at most 1 (-inf then).
        """
        out = np.empty(self.base.shape[:2])
        held = np.ascontiguousarray(np.broadcast_to(np.asarray(capacity, np.int64), len(out)))
        _fill_log_fine(self.family.laws, self.base, self.tilted, self.sizes, n_tokens, held, out)
        return out

    def capacities(self, n_tokens: int, log_fine: float, layer_correlation: float | None = None) -> np.ndarray:
        """Smallest capacity of each deployment, int64 [deployments], that all its layers keep within in a step with this log
        of a probability.
        """
        largest = n_tokens * (self.family.laws.shape[1] - 1)
        layers = np.arange(len(self.base))
        hottest = self.tilted[layers, self.tilted[:, :, 0, 2].argmax(axis=1), 0]
        sd = np.sqrt(n_tokens * hottest[:, 3]) + 1
        low = np.full(len(self.base), -1)
        high = np.minimum(n_tokens * hottest[:, 2] + 8 * sd, largest).astype(np.int64)

        def keeps(held: np.ndarray) -> np.ndarray:
            return of_step(self.log_fine(n_tokens, held), layer_correlation) >= log_fine

        while not (fits := keeps(high) | (high == largest)).all():
            low, high = np.where(fits, low, high), np.where(fits, high, np.minimum(high + 8 * sd, largest).astype(int))
        start = np.minimum((n_tokens * hottest[:, 2]).astype(np.int64), high - 1)
        low = np.where((low < 0) & (start >= 0) & ~keeps(start), start, low)
        while (high - low > 1).any():
            middle = np.where(high - low > 1, (low + high) // 2, high)
            fits = keeps(middle)
            low, high = np.where(fits, low, middle), np.where(fits, middle, high)
        return high

    def dropped_share(self, n_tokens: int, capacity: int) -> float:
        """Share of all that receivers get which lies beyond `capacity`, over all layers."""
        all_layers = -1, self.base.shape[2]
        # Of all receivers of some layers, or of the hottest ones of all layers: where they matter the latter.
        parts = (
            (self.some_base, self.some_tilted),
            (self.base.reshape(all_layers), self.tilted.reshape(*all_layers, 4)),
        )
        over = max(_mean_over(self.family.laws, *part, n_tokens, capacity) for part in parts)
        return float(over / (n_tokens * self.mean * self.sizes.sum()))


class _Rates(NamedTuple):
    """Means of one token on each receiver, of a pair's layers, in chunks of float64 [layers, receivers]."""

    ranks: list[np.ndarray]  # experts
    slots: list[np.ndarray]  # whether it goes there
    shares: list[np.ndarray]  # whether a rank has any of its experts


def sample_deployments(plan: Plan, n_layers: int, n_deployments: int, n_threads: int) -> list[dict[str, Deployments]]:
    """Of each pair of a plan's grid, and each of QUANTITIES.

    Of a workload whose layers are known there is one deployment. Placements that are fitted to drawn layers cost the tokens of
    their fits: they have at most FITTED_DEPLOYMENTS, the first of them all.
    """
    known = plan.workload.n_layers is not None
    n_tokens = KNOWN_LAYER_TOKENS if known else LAYER_TOKENS
    pairs = range(len(plan.grid.pairs))
    fitted = [p for p in pairs if plan.placements[p] is None and is_load_aware(plan.grid.pairs[p][0])]
    n_fitted = min(FITTED_DEPLOYMENTS, n_deployments)
    stages = [(range(0, n_fitted * n_layers), list(pairs))]
    if n_fitted < n_deployments:
        stages.append((range(n_fitted * n_layers, n_deployments * n_layers), [p for p in pairs if p not in fitted]))
    with ThreadPoolExecutor(n_threads) as pool:
        laws_of = _token_laws(plan, n_layers if known else min(_LAW_LAYERS, n_layers * n_deployments), pool)
        rates: list[_Rates] = [_Rates([], [], []) for _ in pairs]
        for draws, some in stages:
            if not some:
                continue
            size = max(_CHUNK_TOKENS // n_tokens, 1)
            chunks = [range(first, min(first + size, draws.stop)) for first in range(draws.start, draws.stop, size)]
            found = list(pool.map(lambda chunk, some=some: _count_rates(plan, chunk, some, n_tokens), chunks))
            for i, p in enumerate(some):
                for what in range(len(rates[p])):
                    rates[p][what].extend(of_chunk[i][what] for of_chunk in found)
        return list(pool.map(lambda p: _of_pair(plan, p, rates[p], laws_of[p], n_layers, n_tokens, known), pairs))


def _count_rates(plan: Plan, draws: range, pairs: list[int], n_tokens: int) -> list[tuple[np.ndarray, ...]]:
    """Of each pair the means of one token, in the order of `_Rates`, of some layer draws."""
    steps = np.array([n_tokens])
    counts, ids = draw_trials(plan.model, plan.workload, plan.seed, draws, 2**62, steps, n_tokens)
    found: dict[int, tuple[np.ndarray, ...]] = {}
    for group in place_pairs(plan, draws, pairs):
        assigned = group.assign(counts)
        to = receivers(np.array([plan.grid.pairs[p][1] for p in group.pairs]), plan.ranks_per_node)
        received, _ = count_received(group.slots_of_all(ids), steps, group.rows, group.layouts, to)
        for i, p in enumerate(group.pairs.tolist()):
            loads = np.zeros((len(draws), plan.grid.pairs[p][1]), np.int64)
            row = np.ascontiguousarray(group.rows[:, i : i + 1])
            rank_loads(assigned, np.zeros(1, np.int64), row, group.layouts, np.zeros(1, np.int64), loads)
            shares = received[:, 0, to.first_rank[i] : to.first_rank[i + 1]]
            found[p] = loads / n_tokens, assigned[:, 0] / n_tokens, shares / n_tokens
    return [found[p] for p in pairs]


def _token_laws(plan: Plan, n_layers: int, pool: ThreadPoolExecutor) -> list[np.ndarray]:
    """Of each pair P(a token has j experts on a rank), of ranks of some layers, float64 [layers * ranks, top_k + 1]."""
    pairs = range(len(plan.grid.pairs))
    groups = list(place_pairs(plan, range(n_layers), pairs))
    width = plan.grid.top_k + 1

    def count(layer: int) -> dict[int, np.ndarray]:
        trials = range(layer, layer + 1)
        _, ids = draw_trials(plan.model, plan.workload, plan.seed, trials, 2**62, np.array([_LAW_TOKENS]), _LAW_TOKENS)
        laws = {}
        for group in groups:
            here = group._replace(rows=group.rows[layer : layer + 1])
            slots = here.slots_of_all(ids)[0]
            for i, p in enumerate(group.pairs.tolist()):
                tally = np.zeros((plan.grid.pairs[p][1], width), np.int64)
                _tally_loads(slots, group.layouts.ranks[here.rows[0, i]], tally)
                laws[p] = tally / _LAW_TOKENS
        return laws

    found = list(pool.map(count, range(n_layers)))
    return [np.concatenate([laws[p] for laws in found]) for p in pairs]


@kernel
def _tally_loads(ids, rank, tally):
    """Add tokens by their number of experts on each rank: ids [tokens, top_k]; tally int64 [ranks, top_k + 1]."""
    load = np.zeros(tally.shape[0], np.int64)
    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            load[rank[ids[t, k]]] += 1
        for k in range(ids.shape[1]):
            r = rank[ids[t, k]]
            if load[r]:
                tally[r, load[r]] += 1
                load[r] = 0
    for r in range(tally.shape[0]):
        tally[r, 0] = ids.shape[0] - tally[r, 1:].sum()


def _of_pair(
    plan: Plan, pair: int, rates: _Rates, laws: np.ndarray, n_layers: int, n_tokens: int, known: bool
) -> dict[str, Deployments]:
    """Deployments of each quantity."""
    family = family_of(laws, _BASES)
    j = np.arange(laws.shape[1])
    variance = float(np.mean(laws @ j**2 - (laws @ j) ** 2))
    ranks, slots, shares = (np.concatenate(of_chunks) for of_chunks in rates)
    if not known:
        ranks = _without_noise(ranks, variance / n_tokens)
        slots, shares = (_without_noise(p, float(np.mean(p * (1 - p))) / n_tokens) for p in (slots, shares))
    return {
        "received": _deployments(BERNOULLI, shares, n_layers, n_tokens),
        "pairs": _deployments(family, ranks, n_layers, n_tokens),
        "expert_rows": _deployments(BERNOULLI, slots, n_layers, n_tokens),
    }


def _without_noise(rates: np.ndarray, noise: float) -> np.ndarray:
    """Rates float64 [layers, receivers] pulled in towards each receiver's mean over layers, to the spread that they have
    without the noise of counting, a variance.
    """
    mean = rates.mean(axis=0)
    spread = float(np.mean((rates - mean) ** 2))
    return mean + (rates - mean) * max(1 - noise / spread, 0.0) ** 0.5 if spread > 0 else rates


def _in_family(family: Family, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    flat = np.ascontiguousarray(means.reshape(-1))
    base, tilted = np.empty(flat.size, np.int64), np.empty((flat.size, 4))
    theta = np.empty(flat.size)
    place_in_family(flat, family.laws, family.means, base, theta)
    _fill_tilted(family.laws, base, theta, tilted)
    return base.reshape(means.shape), tilted.reshape(*means.shape, 4)


@kernel
def _fill_tilted(laws, base, theta, tilted):
    for i in range(base.size):
        tilted[i, 0] = theta[i]
        tilted[i, 1], tilted[i, 2], tilted[i, 3] = tilted_moments(laws[base[i]], theta[i])


def _deployments(family: Family, rates: np.ndarray, n_layers: int, n_tokens: int) -> Deployments:
    """From the means of all layers, float64 [deployments * layers, receivers]."""
    first = _first_of_groups(rates.shape[1])
    hottest = -np.sort(-rates, axis=1)[:, first]
    base, tilted = _in_family(family, hottest.reshape(-1, n_layers, len(first)))
    sizes = np.diff(np.append(first, rates.shape[1]))
    some = _in_family(family, rates[: max(_LAW_LAYERS, n_layers)])
    hot = float(hottest.max())
    error = (hot * max(1 - hot, 0.0) if family is BERNOULLI else hot) / n_tokens
    return Deployments(family, base, tilted, sizes, float(rates.mean()), error**0.5, *some)


def _first_of_groups(n: int) -> np.ndarray:
    """Places, from the hottest on, of the first receiver of each group: 0, 1, 2, 3, 4, 8, 16, ..."""
    return np.array([i for i in range(n) if i < _HOTTEST or i & (i - 1) == 0], np.int64)


def of_step(log_fine: np.ndarray, layer_correlation: float | None) -> np.ndarray:
    """log P(no layer of a step exceeds) from that of its layers, float64 [deployments, layers]: their sum where layers are
    independent.

    `layer_correlation` is the variance of a step's mean over its n layers, relative to independent ones: a correlation of
    r = (layer_correlation - 1) / (n - 1) of any two. To first order in r, with normal dependence, P(no layer exceeds) is
    1 + r * (sum over pairs of layers of g_i g_j) times as large, g = normal density at the layer's quantile / (1 - p); and at
    most that of the worst layer alone.
    """
    total = log_fine.sum(axis=1)
    if layer_correlation is None or log_fine.shape[1] < 2:
        return total
    fine = np.exp(log_fine)
    g = np.exp(-(ndtri(np.maximum(-np.expm1(log_fine), 1e-300)) ** 2) / 2) / np.sqrt(2 * np.pi)
    g = np.where(fine > 0, g / np.maximum(fine, 1e-300), 0.0)
    pairs = (g.sum(axis=1) ** 2 - (g**2).sum(axis=1)) / 2
    return np.minimum(total + np.log1p((layer_correlation - 1) / (log_fine.shape[1] - 1) * pairs), log_fine.min(axis=1))


@kernel
def _layer_log_fine(base, tilted, sizes, n_tokens, least, at_theta, at_cumulant, at_variance):
    """log P(no receiver of a layer reaches `least`), of groups base, sizes [groups], tilted [groups, 4]."""
    total, rest = 0.0, sizes.sum()
    for i in range(base.size):
        b = base[i]
        theta, cumulant, mean, variance = tilted[i]
        tail = tail_of_tilted(
            n_tokens, least, at_theta[b], at_cumulant[b], at_variance[b], theta, cumulant, mean, variance
        )
        total += sizes[i] * tail
        if total >= 1.0:
            return -np.inf
        rest -= sizes[i]
        if rest * tail <= 1e-9 * total:  # hottest first: no other has more
            break
    return np.log1p(-total)


@kernel
def _fill_log_fine(laws, base, tilted, sizes, n_tokens, capacity, out):
    n_bases = laws.shape[0]
    at_theta, at_cumulant, at_variance = np.empty(n_bases), np.empty(n_bases), np.empty(n_bases)
    for d in range(base.shape[0]):
        least = capacity[d] + 1
        if least > n_tokens * (laws.shape[1] - 1):
            out[d] = 0.0
            continue
        if d == 0 or capacity[d] != capacity[d - 1]:
            saddle_points(laws, least / n_tokens, at_theta, at_cumulant, at_variance)
        for layer in range(base.shape[1]):
            out[d, layer] = _layer_log_fine(
                base[d, layer], tilted[d, layer], sizes, n_tokens, least, at_theta, at_cumulant, at_variance
            )


@kernel
def _mean_over(laws, base, tilted, n_tokens, capacity):
    """Sum over receivers of E(x - capacity)+, mean over layers: base [layers, receivers], tilted [layers, receivers, 4]."""
    least, n_bases = capacity + 1, laws.shape[0]
    if least > n_tokens * (laws.shape[1] - 1):
        return 0.0
    at_theta, at_cumulant, at_variance = np.empty(n_bases), np.empty(n_bases), np.empty(n_bases)
    saddle_points(laws, least / n_tokens, at_theta, at_cumulant, at_variance)
    total = 0.0
    for layer in range(base.shape[0]):
        for i in range(base.shape[1]):
            b = base[layer, i]
            theta, cumulant, mean, variance = tilted[layer, i]
            sd = np.sqrt(n_tokens * variance)
            z = (capacity - n_tokens * mean) / max(sd, 1e-12)
            if z > 2.0:  # beyond it the tail falls by a factor with each token more
                above = tail_of_tilted(
                    n_tokens, least, at_theta[b], at_cumulant[b], at_variance[b], theta, cumulant, mean, variance
                )
                total += above / -np.expm1(-(at_theta[b] - theta))
            else:
                density = np.exp(-0.5 * z * z) * 0.3989422804014327
                total += sd * density - sd * z * 0.5 * math.erfc(z * 0.7071067811865476)
    return total / base.shape[0]
