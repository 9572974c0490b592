"""Popularity of a layer such that the router's picks have given shares, and strength of its requests' taste."""

import time
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from sim.fit.effects import Taste, Tastes, draw_tastes
from sim.fit.selection import sum_selection
from sim.model import ModelSpec
from sim.router import score_law
from sim.streams import GROUP, TOKEN, stream_key, uniforms
from sim.traffic.synthetic import MOST_LOGIT

_NUMBERS = 2**22  # experts times requests
_MOST_REQUESTS, _LEAST_REQUESTS = 2**16, 2**12
_FEW = 1024  # requests that the first rounds take, until
_NEAR = 0.03  # this rms
_MOST_ROUNDS = 60
_TOLERANCE = 1e-3  # rms of p fitted / p measured - 1
_MOST_STEP = 2.0
_MOST_STRENGTH = 5.0


class Popularity(NamedTuple):
    """Fitted popularity of a layer."""

    mu: np.ndarray  # float64 [experts], centred
    strength: float  # of the requests' taste
    rms: float  # of picks / wanted - 1 (or what the strength is off by, if more), on the random numbers of the fit
    rounds: int


class LayerFit(NamedTuple):
    """A layer fitted, and checked on other random numbers."""

    decode: Popularity
    prefill: Popularity | None  # with the requests' taste
    rms: list[float]  # of fitted / measured share - 1, of decode, and of prefill if there is one
    seconds: float


class Noise:
    """The random numbers of a layer: the same in every round of its fit, and others for its check."""

    def __init__(self, model: ModelSpec, group_sigma: float, seed: int, layer: int, what: str = "fit") -> None:
        self.n = max(min(_NUMBERS // model.n_experts, _MOST_REQUESTS), _LEAST_REQUESTS)
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

    def draw(self, taste: Taste | None) -> Tastes | None:
        """Requests with these tastes; None without."""
        return None if taste is None else draw_tastes(taste, self.key, self.layer, self.n)

    def picks(self, mu: np.ndarray, tastes: Tastes | None, strength: float, n: int | None = None) -> np.ndarray:
        """Share of tokens that pick each expert, its derivative by mu, and of pairs of tokens of a request that both do:
        float64 [3, experts], from the first n requests (default: all).
        """
        model, sums, n = self.model, np.empty((3, len(mu))), n or self.n
        shared, own = self.groups[:n], np.zeros((1, 2, len(mu)), np.float32)
        if tastes is not None:
            shared = (shared + strength * tastes.shared[:n, None, :]).astype(np.float32)
            own = np.float32(strength) * tastes.own[:n]
        router = np.array([model.n_group, model.topk_group, model.top_k])
        sum_selection(np.exp(mu), self.noise[:n], np.exp(shared), np.exp(own, out=own), router, self.law, sums)
        sums /= n
        scale = model.top_k / sums[0].sum()  # a token picks top_k experts: takes off the noise that all share
        return sums * np.array([scale, scale, scale * scale])[:, None]


def fit_popularity(noise: Noise, p: np.ndarray, taste: Taste | None = None) -> Popularity:
    """Newton's method, expert by expert, on ln(-ln(1 - P)) of the probability P of being picked.

    Parameters
    ----------
    noise : Noise
    p : float64 [experts]
        Share of tokens that pick each expert, above 0 and below 1; sums to top_k.
    taste : Taste, optional
        Of requests; its strength is fitted along, so that the picks of two tokens of a request have its correlation.
    """
    target = np.log(-np.log1p(-p))
    mu = target - target.mean()
    drawn, strength = noise.draw(taste), 1.0
    n = _FEW
    best = Popularity(mu, strength, np.inf, 0)
    for rounds in range(1, _MOST_ROUNDS + 1):
        share, slope, both = noise.picks(mu, drawn, strength, n)
        rms = float(np.sqrt(np.mean((share / p - 1) ** 2)))
        found = float((both - share**2).sum() / (share * (1 - share)).sum())
        off = max(rms, 0.0 if taste is None else abs(found / taste.correlation - 1))
        if n == noise.n and off < best.rms:
            best = Popularity(mu, strength, off, rounds)
        if n == noise.n and off < _TOLERANCE:
            break
        n = noise.n if off < _NEAR or rounds >= _MOST_ROUNDS // 2 else n
        if taste is not None:
            strength *= float(np.clip(np.sqrt(taste.correlation / max(found, 1e-6)), 0.5, 2.0))
            strength = min(strength, _MOST_STRENGTH)
        share = np.clip(share, 1e-12, 1 - 1e-9)
        hazard = -np.log1p(-share)
        rate = np.clip(slope / ((1 - share) * hazard), 0.05, 1.0)
        mu = mu + np.clip((target - np.log(hazard)) / rate, -_MOST_STEP, _MOST_STEP)
        mu = np.clip(mu - mu.mean(), -MOST_LOGIT, MOST_LOGIT)
    return best


def fit_layer(
    model: ModelSpec, layer: int, p: np.ndarray, taste: Taste | None, *, seed: int, group_sigma: float
) -> LayerFit:
    """Fit the popularity of a layer without and, if they have one, with its requests' taste (see `fit_popularity`), and
    check what is written of it: mu to 4 digits.
    """
    started = time.perf_counter()
    noise = Noise(model, group_sigma, seed, layer)
    tastes = [None] if taste is None else [None, taste]
    found = [fit_popularity(noise, p, taste) for taste in tastes]
    check = Noise(model, group_sigma, seed, layer, "check")
    rms = []
    for popularity, taste in zip(found, tastes, strict=True):
        share = check.picks(np.round(popularity.mu, 4), check.draw(taste), popularity.strength)[0]
        rms.append(float(np.sqrt(np.mean((share / p - 1) ** 2))))
    return LayerFit(found[0], found[1] if len(found) > 1 else None, rms, time.perf_counter() - started)
