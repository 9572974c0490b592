"""Popularity of a layer such that the router's picks have given shares, and strength of its requests' taste."""

from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from sim.model import ModelSpec
from sim.router import score_law
from sim.streams import GROUP, REQUEST, TOKEN, stream_key, uniforms
from sim.traffic.selection import sum_selection
from sim.workload.fitted import MOST_LOGIT

_REQUESTS = 4096
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
    rms: float  # of picks / wanted - 1, on the random numbers of the fit
    rounds: int


class Noise:
    """The random numbers of a layer: the same in every round of its fit, and others for its check."""

    def __init__(self, model: ModelSpec, group_sigma: float, seed: int, layer: int, what: str = "fit") -> None:
        key, shape = stream_key(seed, f"popularity {what}"), (_REQUESTS, model.n_experts)
        self.model, self.law = model, score_law(model)
        noise = [-np.log1p(-uniforms(key, TOKEN, 2 * layer + t, shape)) for t in range(2)]
        self.noise = np.stack(noise).astype(np.float32)
        self.groups = np.zeros((2, *shape))
        if model.is_grouped and group_sigma > 0:
            drawn = ndtri(uniforms(key, GROUP, layer, (2 * _REQUESTS, model.n_group)))
            self.groups = group_sigma * np.repeat(drawn, model.group_size, axis=1).reshape(2, *shape)
        self.key, self.layer = key, layer
        self.factor = np.exp(self.groups).astype(np.float32)

    def taste(self, taste: Taste) -> np.ndarray:
        """What each request adds to the logits, float64 [requests, experts], stratified in each normal (a Latin hypercube)."""
        n_experts = self.model.n_experts
        u = uniforms(self.key, REQUEST, self.layer, (_REQUESTS, n_experts + len(taste.loadings)))
        normals = ndtri((np.argsort(np.argsort(u, axis=0), axis=0) + 0.5) / _REQUESTS)
        return normals[:, :n_experts] * taste.sd + normals[:, n_experts:] @ taste.loadings

    def picks(self, mu: np.ndarray, added: np.ndarray | None) -> np.ndarray:
        """Share of tokens that pick each expert, its derivative by mu, and of pairs of tokens of a request that both do:
        float64 [3, experts]; `added` to the logits of each request.
        """
        factor = self.factor if added is None else np.exp(self.groups + added).astype(np.float32)
        model, sums = self.model, np.empty((3, len(mu)))
        sum_selection(np.exp(mu), self.noise, factor, model.n_group, model.topk_group, model.top_k, self.law, sums)
        sums /= np.array([2 * _REQUESTS, 2 * _REQUESTS, _REQUESTS])[:, None]
        scale = model.top_k / sums[0].sum()  # a token picks top_k experts: takes off the noise that all share
        return sums * np.array([scale, scale, scale * scale])[:, None]


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
    drawn = None if taste is None else noise.taste(taste)
    rms, best = np.inf, Popularity(mu, strength, np.inf, 0)
    for rounds in range(1, _MOST_ROUNDS + 1):
        share, slope, both = noise.picks(mu, None if drawn is None else strength * drawn)
        rms = float(np.sqrt(np.mean((share / p - 1) ** 2)))
        found = float((both - share**2).sum() / (share * (1 - share)).sum())
        off = abs(found / correlation - 1) if drawn is not None else 0.0
        if max(rms, off) < max(best.rms, _TOLERANCE):
            best = Popularity(mu, strength, max(rms, off), rounds)
        if max(rms, off) < _TOLERANCE:
            return Popularity(mu, strength, rms, rounds)
        if drawn is not None:
            strength *= float(np.clip(np.sqrt(correlation / max(found, 1e-6)), 0.5, 2.0))
            strength = min(strength, _MOST_STRENGTH)
        share = np.clip(share, 1e-12, 1 - 1e-9)
        hazard = -np.log1p(-share)
        rate = np.clip(slope / ((1 - share) * hazard), 0.05, 1.0)
        mu = mu + np.clip((target - np.log(hazard)) / rate, -_MOST_STEP, _MOST_STEP)
        mu = np.clip(mu - mu.mean(), -MOST_LOGIT, MOST_LOGIT)
    return best
