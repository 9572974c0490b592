"""Request effects: what a request adds to the logits of a layer, the covariance between experts that tokens show of it, and
requests drawn by a Latin hypercube.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from sim.kernels import kernel
from sim.model import ModelSpec
from sim.router import route_layers
from sim.streams import REQUEST, STRENGTH, fill_words, stream_key, uniforms
from sim.traffic import SyntheticTraffic
from sim.traffic.synthetic import of_one_strength, strengths

_REQUESTS, _TOKENS = 2048, 8  # drawn in a turn, and half of the tokens of each
_SCALINGS, _MATCHINGS = 6, 14  # turns
_FIRST_VARIANCE = 2.0
_DAMPING, _MOST_STEP, _POPULARITY_STEP = 0.5, 1.0, 0.9
_OWN = 4  # draws of an expert's own effect that a request is averaged over


class RequestEffect(NamedTuple):
    """Distribution of the request effect of a layer, in units of its strength: see `FittedLayers`."""

    sd: np.ndarray  # float64 [experts]
    loadings: np.ndarray  # float64 [factors, experts]
    correlation: float  # of two tokens' picks, that the strength is to give: covariance / variance, summed over experts
    passage: float  # the same of two tokens that share a passage and no context
    far: float  # the same of two tokens that share the topic alone
    strength_sd: float = 0.0  # between requests, of the logarithm of their strength

    @property
    def variance(self) -> float:
        """Mean over experts."""
        return float((self.sd**2 + (self.loadings**2).sum(axis=0)).mean())


class DrawnEffects(NamedTuple):
    """What drawn requests add to the logits, per unit of strength: by common factors, and by experts' own (see
    `sum_selection`).
    """

    shared: np.ndarray  # float64 [requests, experts]
    own: np.ndarray  # float32 [requests, 1 + _OWN, experts]


def match_covariance(
    model: ModelSpec, group_sigma: float, p: np.ndarray, wanted: np.ndarray, noise: float, start: np.ndarray
) -> np.ndarray:
    """Covariance of a request effect between experts, such that the picks of two tokens of a request covary as measured.

    A damped fixed point: the picks of drawn requests are counted, and what they lack in covariance goes into that of the
    logits, over p (1 - p) of both experts; popularity is kept along.

    Parameters
    ----------
    p : float64 [experts]
        Share of tokens that pick each expert.
    wanted : float64 [experts, experts]
        Covariance of the picks of two tokens of a request.
    noise : float
        Its squared error, summed over the entries: the less the start is off, beside that, the less is taken from it.
    start : float64 [experts, experts]
        Covariance of the logits, up to a factor.

    Returns
    -------
    float64 [experts, experts]
        Covariance of the logits, of mean variance 1.
    """
    traffic = SyntheticTraffic("request effect", group_sigma=group_sigma)
    target = np.log(-np.log1p(-p))
    mu, covariance, slope = target - target.mean(), start * _FIRST_VARIANCE, p * (1 - p)
    trace = max(float(np.trace(wanted)), 1e-12)
    for turn in range(_SCALINGS + _MATCHINGS):
        z = ndtri(uniforms(stream_key(turn, "request effect"), REQUEST, 0, (_REQUESTS, len(p))))
        variance, factor = np.linalg.eigh(covariance)
        effects = z @ (factor * np.sqrt(np.maximum(variance, 0))).T
        logits = mu + of_one_strength(effects, np.trace(covariance) / len(p))
        ids = route_layers(model, traffic, turn, "request effect", logits, 0, 2 * _TOKENS)
        counts = np.stack([count_picks(part, len(p)) for part in (ids[:, :_TOKENS], ids[:, _TOKENS:])]) / _TOKENS
        mean = counts.mean(axis=(0, 1))
        found = counts[0].T @ counts[1] / _REQUESTS - np.outer(*counts.mean(axis=1))
        found = (found + found.T) / 2
        if turn < _SCALINGS:
            covariance *= np.clip(trace / max(float(np.trace(found)), 1e-12), 0.5, 2.0)
        else:
            if turn == _SCALINGS:
                off = float(((wanted - found) ** 2).sum())
                known = 1 - noise / max(off, 1e-12)
                if known <= 0:
                    break  # the start is as near as the tokens can tell
                wanted = found + known * (wanted - found)
            lacking = _DAMPING * np.clip((wanted - found) / np.outer(slope, slope), -_MOST_STEP, _MOST_STEP)
            variance, factor = np.linalg.eigh(covariance + lacking)
            covariance = (factor * np.maximum(variance, 0)) @ factor.T
        mu += _POPULARITY_STEP * (target - np.log(-np.log1p(-np.clip(mean, 1e-4, 0.999))))
    return covariance / max(float(np.trace(covariance)) / len(p), 1e-12)


def count_picks(ids: np.ndarray, n_experts: int) -> np.ndarray:
    """Tokens of each row that take each expert, int64 [rows, n_experts]: ids int16 [rows, tokens, top_k]."""
    of_row = ids.reshape(len(ids), -1) + n_experts * np.arange(len(ids))[:, None]
    return np.bincount(of_row.ravel(), minlength=len(ids) * n_experts).reshape(len(ids), n_experts)


@kernel
def fill_own(ranks, quantiles, sd, own):
    """Experts' own effects: ranks int32 [2 experts, n], of the effect and then of its strata; quantiles float64
    [n, 1 + strata], of one and the other; sd float64 [experts]; own float32 [n, 1 + strata, experts].
    """
    n_experts = sd.size
    for q in range(own.shape[0]):
        for e in range(n_experts):
            own[q, 0, e] = quantiles[ranks[e, q], 0] * sd[e]
            in_strata = quantiles[ranks[n_experts + e, q]]
            for i in range(1, own.shape[1]):
                own[q, i, e] = in_strata[i] * sd[e]


def draw_effects(effect: RequestEffect, key: np.ndarray, layer: int, n: int) -> DrawnEffects:
    """Effects of n requests. An expert's own are stratified: the _OWN of a request that `sum_selection` averages over, and
    those of all requests by a Latin hypercube, so each is one of n quantiles.
    """
    n_factors, n_experts = effect.loadings.shape
    words = np.empty((-(-(2 * n_experts + n_factors) // 4) * 4, n), np.uint32)
    fill_words(key, REQUEST, layer, np.arange(n), words)
    ranks = np.empty((2 * n_experts + n_factors, n), np.int32)
    for of_effect, out in zip(words, ranks, strict=False):  # the last block has words to spare
        out[np.argsort(of_effect, kind="stable")] = np.arange(n)
    levels = (np.arange(n) + 0.5) / n
    quantiles = ndtri(np.stack([levels, *((stratum + levels) / _OWN for stratum in range(_OWN))], axis=1))
    own = np.empty((n, 1 + _OWN, n_experts), np.float32)
    fill_own(ranks[: 2 * n_experts], quantiles, effect.sd, own)
    shared = quantiles[ranks[2 * n_experts :], 0].T @ effect.loadings
    square = ((shared + own[:, 0]) ** 2).mean(axis=1, keepdims=True)
    scale = np.sqrt(effect.variance / np.maximum(square, 1e-30))
    if effect.strength_sd:
        scale *= strengths(effect.strength_sd, uniforms(key, STRENGTH, layer, (1, n)).reshape(n, 1))
    own *= scale[:, None].astype(np.float32)
    return DrawnEffects(shared * scale, own)
