"""Popularity of a layer such that the router's picks have given shares, and strength of its requests' taste."""

from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from sim.model import ModelSpec
from sim.router import score_law
from sim.streams import GROUP, REQUEST, TOKEN, stream_key, uniforms
from sim.traffic.selection import sum_selection
from sim.workload.fitted import MOST_LOGIT

_NUMBERS = 2**22  # experts times requests
_MOST_REQUESTS, _LEAST_REQUESTS = 2**16, 2**12
_FEW = 1024  # requests that the first rounds take, until
_NEAR = 0.03  # this rms
_OWN = 4  # own tastes of an expert that a request is averaged over
_MOST_ROUNDS = 60
_TOLERANCE = 1e-3  # rms of p fitted / p measured - 1
_MOST_STEP = 2.0
_MOST_STRENGTH = 5.0


class Taste(NamedTuple):
    """What requests of a layer prefer, in units of a strength: see `FittedLayers`."""

    sd: np.ndarray  # float64 [experts]
    loadings: np.ndarray  # float64 [factors, experts]


class Popularity(NamedTuple):
    """Fitted popularity of a layer."""

    mu: np.ndarray  # float64 [experts], centred
    strength: float  # of the requests' taste
    rms: float  # of picks / wanted - 1 (or what the strength is off by, if more), on the random numbers of the fit
    rounds: int


class Noise:
    """The random numbers of a layer: the same in every round of its fit, and others for its check."""

    def __init__(self, model: ModelSpec, group_sigma: float, seed: int, layer: int, what: str = "fit") -> None:
        self.n = max(min(_NUMBERS // model.n_experts, _MOST_REQUESTS), _LEAST_REQUESTS)
        key, shape = stream_key(seed, f"popularity {what}"), (self.n, model.n_experts)
        self.model, self.law = model, score_law(model)
        noise = [-np.log1p(-uniforms(key, TOKEN, 2 * layer + t, shape)).astype(np.float32) for t in range(2)]
        self.noise = np.stack(noise, axis=1)
        self.groups = np.zeros((self.n, 1, 1), np.float32)
        if model.is_grouped and group_sigma > 0:
            drawn = group_sigma * ndtri(uniforms(key, GROUP, layer, (self.n, 2 * model.n_group)))
            of_token = drawn.astype(np.float32).reshape(self.n, 2, model.n_group)
            self.groups = np.repeat(of_token, model.group_size, axis=2)
        self.key, self.layer = key, layer

    def draw(self, taste: Taste | None) -> "Tastes":
        """What requests add to the logits, per unit of strength. An expert's own tastes are stratified: the _OWN of a
        request that `sum_selection` averages over, and those of all requests by a Latin hypercube.
        """
        if taste is None:
            return Tastes(None, None)
        n_experts, n_factors = len(taste.sd), len(taste.loadings)
        u = uniforms(self.key, REQUEST, self.layer, (self.n, 2 * n_experts + n_factors))
        u = (np.argsort(np.argsort(u, axis=0), axis=0) + 0.5) / self.n
        first, second, of_factors = np.split(u, [n_experts, 2 * n_experts], axis=1)
        strata = (np.arange(_OWN)[None, :, None] + second[:, None, :]) / _OWN
        own = ndtri(np.concatenate([first[:, None, :], strata], axis=1)) * taste.sd
        return Tastes(ndtri(of_factors) @ taste.loadings, own.astype(np.float32))

    def picks(self, mu: np.ndarray, tastes: "Tastes", strength: float, n: int | None = None) -> np.ndarray:
        """Share of tokens that pick each expert, its derivative by mu, and of pairs of tokens of a request that both do:
        float64 [3, experts], from the first n requests (default: all).
        """
        model, sums, n = self.model, np.empty((3, len(mu))), n or self.n
        shared: np.ndarray = np.broadcast_to(self.groups[:n], self.noise[:n].shape)
        own = np.ones((1, 2, len(mu)), np.float32)
        if tastes.shared is not None and tastes.own is not None:
            shared = shared + strength * tastes.shared[:n, None, :]
            own = np.exp(np.float32(strength) * tastes.own[:n])
        shared = np.exp(shared.astype(np.float32))
        router = np.array([model.n_group, model.topk_group, model.top_k])
        sum_selection(np.exp(mu), self.noise[:n], shared, own, router, self.law, sums)
        sums /= n
        scale = model.top_k / sums[0].sum()  # a token picks top_k experts: takes off the noise that all share
        return sums * np.array([scale, scale, scale * scale])[:, None]


class Tastes(NamedTuple):
    """Of drawn requests what is added to the logits per unit of strength: float [requests, experts] by common factors, and
    float32 [requests, 1 + _OWN, experts] by experts' own (see `sum_selection`); None without request effects.
    """

    shared: np.ndarray | None
    own: np.ndarray | None


def fit_popularity(
    noise: Noise, p: np.ndarray, taste: Taste | None = None, correlation: float = 0.0, strength: float = 1.0
) -> Popularity:
    """Newton's method, expert by expert, on ln(-ln(1 - P)) of the probability P of being picked.

    Parameters
    ----------
    noise : Noise
    p : float64 [experts]
        Share of tokens that pick each expert, above 0 and below 1; sums to top_k.
    taste : Taste, optional
        Of requests; its strength is fitted along, so that of two tokens of a request the picks have the `correlation`
        (covariance summed over experts / variance summed over experts).
    """
    target = np.log(-np.log1p(-p))
    mu = target - target.mean()
    drawn = noise.draw(taste)
    n = _FEW
    best = Popularity(mu, strength, np.inf, 0)
    for rounds in range(1, _MOST_ROUNDS + 1):
        share, slope, both = noise.picks(mu, drawn, strength, n)
        rms = float(np.sqrt(np.mean((share / p - 1) ** 2)))
        found = float((both - share**2).sum() / (share * (1 - share)).sum())
        off = max(rms, abs(found / correlation - 1) if taste is not None else 0.0)
        if n == noise.n and off < best.rms:
            best = Popularity(mu, strength, off, rounds)
        if n == noise.n and off < _TOLERANCE:
            break
        n = noise.n if off < _NEAR or rounds >= _MOST_ROUNDS // 2 else n
        if taste is not None:
            strength *= float(np.clip(np.sqrt(correlation / max(found, 1e-6)), 0.5, 2.0))
            strength = min(strength, _MOST_STRENGTH)
        share = np.clip(share, 1e-12, 1 - 1e-9)
        hazard = -np.log1p(-share)
        rate = np.clip(slope / ((1 - share) * hazard), 0.05, 1.0)
        mu = mu + np.clip((target - np.log(hazard)) / rate, -_MOST_STEP, _MOST_STEP)
        mu = np.clip(mu - mu.mean(), -MOST_LOGIT, MOST_LOGIT)
    return best
