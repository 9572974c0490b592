"""Popularity of a layer such that the router picks each expert as often as measured.

Probability that the router picks each expert, given the scores of all others: closed in the expert's own noise.

A logit is ln(w_e) + ln(f_e) + Gumbel noise, so expert e arrives at an exponential time of rate w_e f_e and the first win
(see `sim.router.sampler`). Given the times of all others there is a latest time theta_e at which e would still be picked,
so its probability is 1 - exp(-w_e f_e theta_e). Averaged over the others' times this has far less noise than counting
picks, and it has a derivative. Ungrouped, theta_e is the k-th time of the others. Grouped, e must also come early enough
for its group to be kept, which is monotone too: the other groups' scores do not depend on e, and the k-th time is taken
over the groups that are kept together with e's.
"""

import copy
import time
from math import factorial
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from sim.fit.effects import DrawnEffects, RequestEffect, draw_effects
from sim.fit.kinds import Kinds
from sim.kernels import kernel
from sim.model import ModelSpec
from sim.router import score_law
from sim.streams import GROUP, REQUEST, STRENGTH, TOKEN, stream_key, uniforms
from sim.traffic.fitted import MOST_LOGIT
from sim.traffic.synthetic import of_one_strength, strengths

_NUMBERS, _OF_GROUPED = 2**20, 4  # experts times requests; as often as that where groups are kept, which adds noise
_MOST_REQUESTS, _LEAST_REQUESTS = 2**13, 2**12
_OF_A_KIND = 4096  # requests that the experts of one kind of tokens are fitted on
_FEW = 1024  # requests that the first rounds take, until
_NEAR = 0.03  # this rms
_MOST_ROUNDS = 60
_TOLERANCE = 1e-3  # rms of p fitted / p measured - 1
_MOST_PAIRS = 2**13  # of tokens, for a correlation
_MOST_STEP, _MOST_RATE = 2.0, 10.0
_MOST_STRENGTH = 10.0
_MOST_EFFECT = 80.0  # in logits: its exponential is a float32
_MOST = 700.0  # beyond it an expert is picked, and exp(-x) is hardly a number
_LOG2E = 1 / np.log(2)
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_ROUND = 1.5 * 2.0**52  # added to a number, leaves its nearest whole number in the last bits
_BIAS, _52 = np.int64(1023), np.int64(52)
_E = tuple(1 / factorial(n) for n in range(13))
_E0, _E1, _E2, _E3, _E4, _E5, _E6, _E7, _E8, _E9, _E10, _E11, _E12 = _E


class Popularity(NamedTuple):
    """Fitted popularity of a layer."""

    mu: np.ndarray  # float64 [experts], centred
    strength: float  # of the request effect
    correlation: float  # of two tokens' picks, that this gives
    rms: float  # of picks / wanted - 1 (or what the strength is off by, if more), on the random numbers of the fit


class LayerFit(NamedTuple):
    """A layer fitted, and checked on other random numbers."""

    decode: Popularity
    prefill: Popularity | None  # with the request effect
    kind_shares: np.ndarray | None  # float64 [kinds]
    kind_effects: np.ndarray | None  # float64 [kinds, experts], to 3 digits
    effect: RequestEffect | None
    local_share: float  # of its variance
    passage_share: float  # of that
    rms: list[float]  # of fitted / measured share - 1, weighted by shares, of decode, and of prefill if there is one
    seconds: float


class Noise:
    """The random numbers of a layer: the same in every round of its fit, and others for its check."""

    def __init__(self, model: ModelSpec, group_sigma: float, seed: int, layer: int, what: str = "fit") -> None:
        self.n = max(min(_NUMBERS // model.n_experts, _MOST_REQUESTS), _LEAST_REQUESTS)
        self.n *= _OF_GROUPED if model.is_grouped else 1
        key, shape = stream_key(seed, f"popularity {what}"), (self.n, model.n_experts)
        self.model, self.law = model, score_law(model)
        noise = [-np.log1p(-uniforms(key, TOKEN, 2 * layer + t, shape)).astype(np.float32) for t in range(2)]
        self.noise = np.stack(noise, axis=1)
        self.groups = np.zeros((1, 1, model.n_experts), np.float32)
        if model.is_grouped and group_sigma > 0:
            drawn = group_sigma * ndtri(uniforms(key, GROUP, layer, (self.n, 2 * model.n_group)))
            of_token = drawn.astype(np.float32).reshape(self.n, 2, model.n_group)
            self.groups = np.repeat(of_token, model.group_size, axis=2)
        self.key, self.layer = key, layer

    def of_kinds(self, shares: np.ndarray, effects: np.ndarray) -> "Noise":
        """The same with kinds of tokens: each kind has its share of the first tokens of all requests, and of the second ones."""
        ends = np.cumsum(shares)
        places = np.stack(
            [np.arange(self.n), np.argsort(uniforms(self.key, GROUP, self.layer, (1, self.n))[0])], axis=1
        )
        of_token = np.minimum(np.searchsorted(ends, (places + 0.5) / self.n), len(ends) - 1)
        other = copy.copy(self)
        other.groups = self.groups + effects.astype(np.float32)[of_token]
        return other

    def draw(self, effect: RequestEffect | None) -> DrawnEffects | None:
        """Requests with this effect; None without."""
        return None if effect is None else draw_effects(effect, self.key, self.layer, self.n)

    def picks(self, mu: np.ndarray, drawn: DrawnEffects | None, strength: float, n: int | None = None) -> np.ndarray:
        """Share of tokens that pick each expert, its derivative by mu, and of pairs of tokens of a request that both do:
        float64 [3, experts], from the first n requests (default: all).
        """
        model, sums, n = self.model, np.empty((3, len(mu))), n or self.n
        shared, own = self.groups[:n], np.zeros((1, 2, len(mu)), np.float32)
        if drawn is not None:
            logits = np.clip(shared + strength * drawn.shared[:n, None, :], -_MOST_EFFECT, _MOST_EFFECT)
            shared = logits.astype(np.float32)
            own = np.clip(np.float32(strength) * drawn.own[:n], -_MOST_EFFECT, _MOST_EFFECT)
        router = np.array([model.n_group, model.topk_group, model.top_k])
        sum_selection(np.exp(mu), self.noise[:n], np.exp(shared), np.exp(own, out=own), router, self.law, sums)
        sums /= n
        scale = model.top_k / sums[0].sum()  # a token picks top_k experts: takes off the noise that all share
        return sums * np.array([scale, scale, scale * scale])[:, None]

    def half_shared(self, mu: np.ndarray, effect: RequestEffect, strength: float) -> float:
        """Correlation of two tokens' picks where half of the request effect's variance is theirs alone, over that where they
        share all of it; on the same random numbers.
        """
        n = min(self.n, _MOST_PAIRS)
        drawn = ndtri(uniforms(self.key, REQUEST, 2**20 + self.layer, (n, 3 * (len(mu) + len(effect.loadings)))))
        of_both, *of_one = np.split(drawn, 3, axis=1)
        of_request = strengths(effect.strength_sd, uniforms(self.key, STRENGTH, 2**20 + self.layer, (1, n)))[0]
        router, own = (
            np.array([self.model.n_group, self.model.topk_group, self.model.top_k]),
            np.ones((1, 2, len(mu)), np.float32),
        )
        found = []
        for parts in ([of_both], [np.sqrt(0.5) * (of_both + other) for other in of_one]):
            normals = np.stack(parts, axis=1)
            effects = normals[..., : len(mu)] * effect.sd + normals[..., len(mu) :] @ effect.loadings
            effects = of_one_strength(effects, effect.variance) * of_request[:, None, None]
            logits = np.clip(self.groups[:n] + strength * effects, -_MOST_EFFECT, _MOST_EFFECT)
            sums = np.empty((3, len(mu)))
            sum_selection(np.exp(mu), self.noise[:n], np.exp(logits).astype(np.float32), own, router, self.law, sums)
            share, both = sums[0] / n, sums[2] / n
            found.append(float((both - share**2).sum()))
        return found[1] / found[0] if found[0] > 0 else 0.5


def fit_kind_effects(noise: Noise, kinds: Kinds) -> np.ndarray:
    """What kinds of tokens add to the logits, float64 [kinds, experts], of mean 0 over tokens: each kind picks its experts."""
    logits = np.stack([fit_popularity(noise, p, n_requests=_OF_A_KIND).mu for p in kinds.picked])
    return logits - kinds.shares @ logits / kinds.shares.sum()


def fit_popularity(
    noise: Noise, p: np.ndarray, effect: RequestEffect | None = None, n_requests: int | None = None
) -> Popularity:
    """Newton's method, expert by expert, on ln(-ln(1 - P)) of the probability P of being picked.

    Parameters
    ----------
    noise : Noise
    p : float64 [experts]
        Share of tokens that pick each expert, above 0 and below 1; sums to top_k.
    effect : RequestEffect, optional
        Its strength is fitted along, so that the picks of two tokens of a request have its correlation.
    n_requests : int, optional
        By default all of the noise.
    """
    most = n_requests or noise.n
    target = np.log(-np.log1p(-p))
    mu = target - target.mean()
    drawn, strength = noise.draw(effect), 1.0
    n = _FEW
    best = Popularity(mu, strength, 0.0, np.inf)
    for rounds in range(1, _MOST_ROUNDS + 1):
        share, slope, both = noise.picks(mu, drawn, strength, n)
        rms = float(np.sqrt(np.mean((share / p - 1) ** 2)))
        found = float((both - share**2).sum() / (share * (1 - share)).sum())
        off = rms
        if effect is not None and not (strength == _MOST_STRENGTH and found < effect.correlation):
            off = max(rms, abs(found / effect.correlation - 1))
        if n == most and off < best.rms:
            best = Popularity(mu, strength, found, off)
        if n == most and off < _TOLERANCE:
            break
        n = most if off < _NEAR or rounds >= _MOST_ROUNDS // 2 else n
        if effect is not None:
            strength *= float(np.clip(np.sqrt(effect.correlation / max(found, 1e-6)), 0.5, 2.0))
            strength = min(strength, _MOST_STRENGTH)
        share = np.clip(share, 1e-12, 1 - 1e-9)
        hazard = -np.log1p(-share)
        rate = np.clip(_without_others(slope, noise.model.top_k) / ((1 - share) * hazard), 0.05, _MOST_RATE)
        mu = mu + np.clip((target - np.log(hazard)) / rate, -_MOST_STEP, _MOST_STEP)
        mu = np.clip(mu - mu.mean(), -MOST_LOGIT, MOST_LOGIT)
    return best


def _without_others(slope: np.ndarray, top_k: int) -> np.ndarray:
    """How the picks of experts rise with mu, float64 [experts], were the loss of all others to them made good.

    All picks sum to top_k, whatever mu: so their derivatives are taken as diag(a) - a a' / sum(a), of which `slope` is the
    diagonal, as it is for top-1 without effects, where a is the share. A step of (wanted - found) / a then is Newton's. One by
    the slope alone overshoots where few experts have most of the load.
    """
    a, total = slope, float(top_k)
    for _ in range(20):
        a = total / 2 * (1 - np.sqrt(np.maximum(1 - 4 * slope / total, 0)))
        total = float(a.sum())
    return np.maximum(a, slope)


def fit_layer(
    model: ModelSpec, layer: int, p: np.ndarray, effect: RequestEffect | None, kinds: Kinds | None = None, *, seed: int,
    group_sigma: float, n_requests: int | None = None,
) -> LayerFit:  # fmt: skip
    """Fit the popularity of a layer with its kinds of tokens, if any, and, if it has one, with its request effect too (see
    `fit_popularity`), and check what is written of it: mu to 4 digits.
    """
    started = time.perf_counter()
    noise, check = (Noise(model, group_sigma, seed, layer, what) for what in ("fit", "check"))
    kind_shares = kind_effects = None
    if kinds is not None:
        kind_shares, kind_effects = kinds.shares, np.round(fit_kind_effects(noise, kinds), 3)
        noise, check = (x.of_kinds(kind_shares, kind_effects) for x in (noise, check))
    phases: tuple[RequestEffect | None, ...] = (None,) if effect is None else (None, effect)
    found, rms = [], []
    for of_phase in phases:
        popularity = fit_popularity(noise, p, of_phase, n_requests)
        share = check.picks(np.round(popularity.mu, 4), check.draw(of_phase), popularity.strength)[0]
        rms.append(float(np.sqrt(p @ (share / p - 1) ** 2 / p.sum())))
        found.append(popularity)
    local_share = passage_share = 0.0
    if effect is not None and effect.far < found[1].correlation:
        # c(r) of effects that correlate by r is a power series: taken as c(1) (a r + (1 - a) r**2), with the measured c(1/2).
        a = float(np.clip(4 * check.half_shared(found[1].mu, effect, found[1].strength) - 1, 0.0, 1.0))
        ratio = np.minimum(np.array([effect.passage, effect.far]) / found[1].correlation, 1.0)
        in_passage, in_request = 2 * ratio / (a + np.sqrt(a * a + 4 * (1 - a) * ratio) + 1e-300)
        local_share, passage_share = 1 - in_request, (in_passage - in_request) / (1 - in_request)
    seconds = time.perf_counter() - started
    prefill = found[1] if len(found) > 1 else None
    shares = float(local_share), float(passage_share)
    return LayerFit(found[0], prefill, kind_shares, kind_effects, effect, *shares, rms, seconds)


@kernel(forceinline=True)
def exp_of_minus(x):
    """exp(-x), float64, for x from 0 to 700, to 4e-16 relative: unlike a call into a maths library it vectorises."""
    shifted = np.float64(_ROUND - x * _LOG2E)
    k = shifted - _ROUND
    r = -x - k * _LN2_HIGH - k * _LN2_LOW
    p = _E12
    p = p * r + _E11
    p = p * r + _E10
    p = p * r + _E9
    p = p * r + _E8
    p = p * r + _E7
    p = p * r + _E6
    p = p * r + _E5
    p = p * r + _E4
    p = p * r + _E3
    p = p * r + _E2
    p = p * r + _E1
    p = p * r + _E0
    return p * np.int64((shifted.view(np.int64) + _BIAS) << _52).view(np.float64)


@kernel
def _first_times(time, lo, hi, first, n_first):
    """Merge time[lo:hi] into the ascending list `first` of the earliest times, of which n_first are filled; returns n_first."""
    most = first.size
    for e in range(lo, hi):
        t = time[e]
        if n_first < most or t < first[n_first - 1]:
            place = n_first if n_first < most else most - 1
            while place > 0 and first[place - 1] > t:
                first[place] = first[place - 1]
                place -= 1
            first[place] = t
            n_first = min(n_first + 1, most)
    return n_first


@kernel
def _score(time, law):
    """Score of an arrival, 1 / (b + a t)."""
    return 1.0 / (law[0] + law[1] * time)


@kernel
def _latest_for_group(others_best, others_second, cut, law):
    """Latest time at which an expert lifts its group's score above `cut`, given the two best scores beside it."""
    both = law[2] > 0
    alone = others_best + (others_second if both else 0.0)
    if alone > cut:
        return np.inf
    needed = cut - (others_best if both else 0.0)
    if needed <= 0.0:
        return np.inf
    return max((1.0 / needed - law[0]) / law[1], 0.0)


@kernel
def fill_latest(time, n_group, topk_group, top_k, law, latest):
    """theta of every expert, float64 [experts], from the arrival times of all."""
    first = np.empty(top_k + 1)
    n_experts = time.size
    size = n_experts // n_group
    if n_group == 1:
        _first_times(time, 0, n_experts, first, 0)
        last = first[top_k - 1]
        for e in range(n_experts):
            latest[e] = first[top_k] if time[e] <= last else last
        return
    best, score = np.empty((n_group, 3)), np.empty(n_group)
    for g in range(n_group):
        best[g] = np.inf
        _first_times(time, g * size, (g + 1) * size, best[g][: min(3, size)], 0)
        score[g] = _score(best[g, 0], law) + (_score(best[g, 1], law) if law[2] > 0 else 0.0)
    order = np.argsort(-score)
    for g in range(n_group):
        # The groups that are kept with g, and the score that g must beat.
        n_first, n_kept, cut = _first_times(time, g * size, (g + 1) * size, first, 0), 1, -np.inf
        for i in range(n_group):
            h = order[i]
            if h != g:
                if n_kept < topk_group:
                    n_first = _first_times(time, h * size, (h + 1) * size, first, n_first)
                else:
                    cut = score[h]
                    break
                n_kept += 1
        full = n_first > top_k  # else the kept groups hold no more than top_k experts, and all of them are picked
        for e in range(g * size, (g + 1) * size):
            late = np.inf
            if full:
                late = first[top_k] if time[e] <= first[top_k - 1] else first[top_k - 1]
            if cut > -np.inf:
                i = 1 if time[e] == best[g, 0] else 0
                j = i + 1 if time[e] != best[g, 1] or i == 1 else 2
                second = _score(best[g, j], law) if j < min(3, size) else 0.0
                beside = _score(best[g, i], law) if i < min(3, size) else 0.0
                late = min(late, _latest_for_group(beside, second, cut, law))
            latest[e] = late


@kernel
def sum_selection(weight, noise, shared, own, router, law, sums):
    """Sums over requests of each expert's probability of being picked.

    weight float64 [experts]; noise float32 [requests, tokens of a request, experts], standard exponentials; shared float32
    [requests or 1, tokens or 1, experts], the part of f that a token's experts have from common causes; own float32
    [requests or 1, 1 + draws, experts], the part that is an expert's alone: first what all experts have where another one
    is looked at, then draws of an expert's own effect that its probability is averaged over; router int64 [3], n_group,
    topk_group, top_k; law as `router.score_law`; sums float64 [3, experts]: probabilities (mean over tokens), their
    derivatives by ln(weight), and products of those of the first and last token.
    """
    n_experts, n_tokens, n_draws = weight.size, noise.shape[1], own.shape[1] - 1
    time, latest = np.empty(n_experts), np.empty(n_experts)
    rate, picked = np.empty((n_tokens, n_experts)), np.empty((n_tokens, n_experts))
    sums[:] = 0.0
    for q in range(noise.shape[0]):
        of_request, alone = shared[q % shared.shape[0]], own[q % own.shape[0]]
        for t in range(n_tokens):
            common = of_request[t % of_request.shape[0]]
            for e in range(n_experts):
                time[e] = noise[q, t, e] / (weight[e] * common[e] * alone[0, e])
            fill_latest(time, router[0], router[1], router[2], law, latest)
            for e in range(n_experts):
                rate[t, e] = weight[e] * common[e] * latest[e]
        for i in range(1, 1 + n_draws):
            for t in range(n_tokens):
                for e in range(n_experts):
                    x = min(rate[t, e] * alone[i, e], _MOST)
                    missed = exp_of_minus(x)
                    picked[t, e] = 1.0 - missed
                    sums[0, e] += picked[t, e]
                    sums[1, e] += x * missed
            for e in range(n_experts):
                sums[2, e] += picked[0, e] * picked[-1, e]
    sums[:2] /= n_tokens * n_draws
    sums[2] /= n_draws
